"""Whole runs over an encrypted wire: who has keys trains, through a learner's death too, and who has none is told."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dapo_async.config.settings import Config
from dapo_async.transport.keys import make_keys
from tests.whole_run.test_training import (
    Process,
    check_trained_once,
    demo,  # noqa: F401  # a fixture
    free_port,
    joined_worker,
    lines,
    settings,
    steps,
)


@contextmanager
def turned_away(address: str, *arguments: str) -> Iterator[Callable[[], str]]:
    """``work`` that will not be let in. Yields what waits for its end, as by a user's mistake, and tells its words."""
    line = [sys.executable, "-m", "dapo_async.cli", "work", "--connect", address, "--name", "stranger", *arguments]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:

        def words() -> str:
            _, told = process.communicate(timeout=60.0)
            assert process.returncode == 2, told
            assert "Traceback" not in told
            return told

        try:
            yield words
        finally:
            process.kill()


@pytest.mark.slow
def test_a_run_with_keys_survives_its_learner_and_lets_nobody_else_in(
    demo: Config,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Weights go over the network, encrypted, to a worker of its own start and to one that joined from elsewhere."""
    make_keys(tmp_path / "keys", "worker")
    make_keys(tmp_path / "others", "worker")
    address = f"tcp://127.0.0.1:{free_port()}"
    config = settings(
        demo,
        tmp_path,
        run={"batches": 40},
        checkpoint={"every": 1},
        network={"control": address, "keys": str(tmp_path / "keys" / "learner"), "silence_s": 3.0},
        schedule={"max_staleness": 2},
        weights={"way": "delta"},
        workers={"step_delay_s": 0.03},
    )
    own = "--keys", str(tmp_path / "keys" / "worker")
    with (
        turned_away(address, "--keys", str(stranger_keys(tmp_path))) as words,
        joined_worker(address, tmp_path / "worker.txt", *own) as worker,
    ):
        first = Process(config, tmp_path)
        assert "does not let this worker in: it does not know this worker's key" in words()
        first.wait_for_steps(4)
        first.process.kill()
        assert first.end() == -signal.SIGKILL
        again = Process(config, tmp_path, "--resume")
        assert again.end() == 0, again.text()
        assert worker.wait(timeout=30.0) == 0
    check_trained_once(again.run, 40)
    workers = {sample["worker"] for sample in lines(again.run / "samples.jsonl")}
    assert workers == {"w0", "joined"}
    last = steps(again.run)[-1]
    assert last["publish/pushes_full"] + last["publish/pushes_delta"] > 2
    assert "is on no list" in first.text()


def stranger_keys(folder: Path) -> Path:
    """Keys of another worker, who knows this learner's public key, as anybody may."""
    known = folder / "keys" / "worker" / "learner.public"
    stranger = folder / "others" / "worker"
    (stranger / "learner.public").write_bytes(known.read_bytes())
    return stranger


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True])
def test_keys_on_one_side_only_are_told_on_the_other(
    demo: Config,  # noqa: F811
    tmp_path: Path,
    encrypted: bool,
) -> None:
    make_keys(tmp_path / "keys", "worker")
    if encrypted:
        keys, arguments, told = str(tmp_path / "keys" / "learner"), [], "it encrypts, and this worker was given no keys"
    else:
        keys, arguments = "", ["--keys", str(tmp_path / "keys" / "worker")]
        told = "it does not encrypt, and this worker was given keys"
    address = f"tcp://127.0.0.1:{free_port()}"
    config = settings(demo, tmp_path, run={"batches": 10_000}, network={"control": address, "keys": keys})
    run = Process(config, tmp_path)
    try:
        with turned_away(address, *arguments) as words:
            run.wait_for_steps(1)
            assert told in words()
        run.wait_for_steps(len(lines(run.run / "ledger.jsonl")) + 2)  # it is not disturbed
    finally:
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.text()
