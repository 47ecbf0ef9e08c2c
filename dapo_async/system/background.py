"""A thread that must not end unnoticed."""

import sys
import threading
from collections.abc import Callable

from dapo_async.errors import DapoError, StallError


class Background:
    """A daemon thread with a name, whose ending is an event: ``check`` tells who ended, and why."""

    def __init__(self, name: str, loop: Callable[[], None]) -> None:
        """``loop`` runs until it is asked, by means of its own, to return. It starts with ``start``."""
        self.name = name
        self._loop = loop
        self._error: BaseException | None = None
        self._joining = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start it, once."""
        self._thread.start()

    def check(self) -> None:
        """Raise ``DapoError`` if the thread ended by an error, or without being asked."""
        if self._error is not None:
            error = self._error
            raise DapoError(f"the {self.name} thread ended: {type(error).__name__}: {error}") from error
        if self._thread.ident is not None and not self._thread.is_alive() and not self._joining:
            raise DapoError(f"the {self.name} thread ended without being asked")

    def join(self, timeout_s: float) -> None:
        """Wait for the end. Raises ``StallError`` if it takes longer than ``timeout_s`` seconds."""
        self._joining = True
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise StallError(f"the {self.name} thread did not end within {timeout_s:g} s of being asked")

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            # The error is kept, not caught: Python also prints its traceback where the process logs.
            self._error = sys.exception()
