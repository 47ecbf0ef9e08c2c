"""Whole runs as a user starts them, and what they left, for the benchmarks that compare them.

Owned here: starting a command and watching its memory, the folder and the metrics of a training run, a demo made
once and a policy trained for a while. Not owned: what is compared (each benchmark).
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dapo_async.config.toml import load_config
from dapo_async.demo.demo import prepare_demo
from dapo_async.errors import DapoError

LOOK_S = 0.25  # between two looks at the memory of a run
LIMIT_S = 1800.0
STOP_S = 60.0  # for a command to end once it is told to, and write what it has; then it is killed
QUIET = ["evaluation.max_prompts=8", "evaluation.every=0", "run.target_accuracy=0"]  # hardly any evaluation


class CompletionOutput(NamedTuple):
    """A command that ended well."""

    output: str  # the end of what it printed
    peak_rss_mb: float  # most resident memory of all its processes together, in MiB; shared pages count for each


class Material(NamedTuple):
    """Model and prompts that runs start from."""

    model: str
    train: str
    heldout: str

    @property
    def settings(self) -> list[str]:
        """Settings of ``dapo-async train`` that use them in the place of the configuration's demo."""
        return ["demo.task=", f"model.path={self.model}", f"data.train={self.train}", f"data.heldout={self.heldout}"]


def run(command: Sequence[str]) -> CompletionOutput:
    """Run ``command`` to its end. Ends this program with the command's last words if it fails or takes too long.

    Whatever ends this program first ends the command, too: an interruption, SIGTERM, an error.
    """
    started, peak = time.monotonic(), 0
    with (
        _term_raises(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    peak = max(peak, _rss_of_all(process.pid))
                    if time.monotonic() - started > LIMIT_S:
                        raise SystemExit(f"{' '.join(command)}\ndid not end in {LIMIT_S:g} s") from None
        finally:
            _end(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{output[-4000:]}")
    return CompletionOutput(output[-4000:], peak / 2**20)


@contextmanager
def _term_raises() -> Iterator[None]:
    """SIGTERM ends this program by an exception, so that what it started is ended as well."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[str]) -> None:
    """End ``process`` if it has not ended. A training run then stops its own workers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _rss_of_all(pid: int) -> int:
    """Resident bytes of a process and all that it started."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:  # one of them has just ended
        return total
    return total


def train_measured(config: str, settings: Sequence[str], folder: Path, name: str) -> tuple[Path, float]:
    """One ``dapo-async train``. Returns its run folder and its peak memory in MiB; ends this program if it fails."""
    command = [sys.executable, "-m", "dapo_async.cli", "train", config]
    for setting in [f"run.folder={folder}", f"run.name={name}", *settings]:
        command += ["--set", setting]
    finished = run(command)
    return max(folder.glob(f"{name}*"), key=lambda path: path.stat().st_mtime), finished.peak_rss_mb


def train(config: str, settings: Sequence[str], folder: Path, name: str) -> Path:
    """One ``dapo-async train``. Returns its run folder; ends this program if it fails."""
    return train_measured(config, settings, folder, name)[0]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics that a run logged, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's trained batches, in order."""
    return [line for line in logged(folder) if "time/step" in line]


def demo(config: str, settings: Sequence[str]) -> Material:
    """Model and prompts of the configuration's demo, built if they are not there yet."""
    shown = -1

    def progress(done: int, total: int, text: str) -> None:
        nonlocal shown
        if (percent := 100 * done // max(1, total)) >= shown + 20:
            shown = percent
            print(f"{text}: {percent} %", flush=True)

    try:
        made, _ = prepare_demo(load_config(config, settings), progress)
    except DapoError as error:
        raise SystemExit(str(error)) from None
    return Material(made.model.path, made.data.train, made.data.heldout)


def frozen_policy(config: str, batches: int, settings: Sequence[str], folder: Path) -> Material:
    """The configuration's policy after ``batches`` batches, with its prompts."""
    material = demo(config, settings)
    if not batches:
        return material
    trained = train(config, [*QUIET, *material.settings, *settings, f"run.batches={batches}"], folder, "policy")
    return material._replace(model=str(trained / "checkpoints" / f"step_{batches}"))
