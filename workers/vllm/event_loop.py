"""An asyncio event loop in a thread of its own, for an engine whose callers know nothing of coroutines."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from dapo_async.errors import StallError
from dapo_async.system.background import Background

T = TypeVar("T")
WAIT_S = 0.5  # between two calls of ``on_wait``


class EventLoop:
    """Runs from its making until ``close``. ``call``, ``close`` and ``check`` are for other threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.loop = asyncio.new_event_loop()
        self._thread = Background(name, self._run)
        self._thread.start()
        self.check = self._thread.check
        self.soon = self.loop.call_soon_threadsafe

    def call(
        self, coroutine: Coroutine[Any, Any, T], seconds: float, what: str, on_wait: Callable[[], None] = lambda: None
    ) -> T:
        """Its result. ``on_wait`` is called now and then meanwhile, and what it raises ends the wait.

        Raises what the coroutine raises, and ``StallError`` if it takes longer than ``seconds`` to ``what``.
        """
        future, deadline = asyncio.run_coroutine_threadsafe(coroutine, self.loop), time.monotonic() + seconds
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(WAIT_S)
                if future.done():
                    return future.result(0)  # a TimeoutError of its own
                on_wait()
                if time.monotonic() > deadline:
                    raise StallError(f"{self._name} took longer than {seconds:g} s to {what}")
        finally:
            future.cancel()

    def close(self, seconds: float) -> None:
        """End the thread; a loop that hangs is left to the end of the process."""
        self.soon(self.loop.stop)
        with contextlib.suppress(StallError):
            self._thread.join(seconds)
            self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
