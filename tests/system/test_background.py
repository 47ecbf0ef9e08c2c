"""Threads whose ending is an event: named, checked, joined with a deadline."""

import threading
import time

import pytest

from dapo_async.errors import DapoError, StallError
from dapo_async.system.background import Background

PATIENCE_S = 30.0


def test_a_background_loop_that_is_asked_to_end_is_no_error() -> None:
    asked = threading.Event()
    loop = Background("loop", lambda: assert_true(asked.wait(timeout=PATIENCE_S)))
    loop.check()
    loop.start()
    loop.check()
    asked.set()
    loop.join(PATIENCE_S)
    loop.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_a_background_loop_is_told_with_its_name() -> None:
    def fail() -> None:
        raise KeyError("the cause")

    loop = Background("weights publisher", fail)
    loop.start()
    loop.join(PATIENCE_S)
    with pytest.raises(DapoError, match=r"weights publisher thread ended: KeyError: 'the cause'") as caught:
        loop.check()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_background_loop_that_ends_unasked_is_an_error() -> None:
    loop = Background("loop", lambda: None)
    loop.start()
    deadline = time.monotonic() + PATIENCE_S
    while "loop" in {thread.name for thread in threading.enumerate()} and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(DapoError, match="loop thread ended without being asked"):
        loop.check()


def test_joining_a_loop_that_never_ends_says_so() -> None:
    asked = threading.Event()
    loop = Background("deaf", lambda: assert_true(asked.wait(timeout=PATIENCE_S)))
    loop.start()
    with pytest.raises(StallError, match=r"deaf thread did not end within 0\.01 s"):
        loop.join(0.01)
    asked.set()
    loop.join(PATIENCE_S)


def assert_true(value: bool) -> None:
    assert value
