"""A worker that is killed while vLLM starts leaves nothing behind, whoever started it."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dapo_async.config.settings import Config
from dapo_async.run.launch import train
from dapo_async.system.signals import StopSignals
from tests.conftest import children
from tests.whole_run.test_training import demo, free_port, settings  # noqa: F401
from tests.workers.vllm.test_engine import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(300)]
LIMIT_S = 120.0
MOMENTS_S = (0.0, 0.3, 1.0, 3.0)  # after vLLM's process has appeared


def marked(mark: str) -> dict[int, str]:
    """Every living process that inherited this environment variable, orphans included, with its command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # another user's, or ended meanwhile
            continue
    return found


def wait_until_spawned(worker: subprocess.Popen[bytes], mark: str, log: Path) -> None:
    """Until the worker has a child process that is vLLM's."""
    deadline = time.monotonic() + LIMIT_S
    while not any("spawn_main" in command for command in marked(mark).values()):
        assert worker.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


@pytest.mark.slow
def test_a_worker_killed_while_vllm_starts_leaves_nothing_behind(demo: Config, tmp_path: Path) -> None:  # noqa: F811
    address = f"tcp://127.0.0.1:{free_port()}"
    config = settings(demo, tmp_path, workers={"count": 0}, network={"control": address}, data={"heldout": ""})
    stop, before = StopSignals(), set(children())
    learner = threading.Thread(target=train, args=(config,), kwargs={"stop": stop}, name="learner")
    learner.start()
    try:
        for moment_s in MOMENTS_S:
            mark, log = f"DAPO_ASYNC_TEST={secrets.token_hex(8)}", tmp_path / f"{moment_s}.log"
            command = [sys.executable, "-m", "dapo_async.cli", "work", "--connect", address, "--engine", "vllm"]
            name, _, value = mark.partition("=")
            with log.open("wb") as out:
                worker = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {name: value})
            try:
                wait_until_spawned(worker, mark, log)
                time.sleep(moment_s)
            finally:
                worker.send_signal(signal.SIGKILL)
                worker.wait(timeout=30.0)
            deadline = time.monotonic() + 10.0
            while left := marked(mark):
                if time.monotonic() > deadline:
                    for pid in left:
                        os.kill(pid, signal.SIGKILL)
                    pytest.fail(f"left running when the worker was killed {moment_s} s after vLLM's start: {left}")
                time.sleep(0.02)
    finally:
        stop.received = signal.SIGTERM
        learner.join(timeout=60.0)
    assert not learner.is_alive()
    assert set(children()) <= before
