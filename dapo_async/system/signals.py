"""Ctrl-C and SIGTERM as a question that a long piece of work asks itself."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a question that the learner asks, and the second into the end."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            # The workers' sentinels see our end and follow.
            os._exit(128 + number)
        self.received = number

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to both signals inside; elsewhere than in the main thread there is nothing to listen to."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
