"""What every test gets: fixed seeds, one torch thread, and a check that it leaves nothing running."""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import dapo_async  # noqa: F401  # before transformers: it hides companions of torch that cannot be imported

GRACE_S = 3.0

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_nothing_running() -> Iterator[None]:
    """Fails a test whose threads or child processes outlive it by more than a short grace."""
    threads, processes = set(threading.enumerate()), set(children())
    yield
    deadline = time.monotonic() + GRACE_S
    while left := [*_new_threads(threads), *_new_children(processes)]:
        if time.monotonic() > deadline:
            pytest.fail(f"left running: {', '.join(left)}")
        time.sleep(0.02)


def _new_threads(before: set[threading.Thread]) -> list[str]:
    return [
        f"thread {thread.name}"
        for thread in threading.enumerate()
        # A dummy stands for a thread that Python did not start (torch's autograd); a monitor of tqdm and pyzmq's
        # collector of sent buffers start once and never end.
        if thread not in before
        and not isinstance(thread, threading._DummyThread)
        and type(thread).__name__ not in ("TMonitor", "GarbageCollectorThread")
    ]


def _new_children(before: set[int]) -> list[str]:
    return [f"process {pid} ({command})" for pid, command in children().items() if pid not in before]


def children() -> dict[int, str]:
    """Command line of each child process of this one, by pid; none where the system has no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended meanwhile
            continue
        # multiprocessing keeps one tracker per interpreter, which ends with it.
        if int(parent) == os.getpid() and "resource_tracker" not in command:
            found[int(stat.parent.name)] = command[:200] or "a zombie"
    return found
