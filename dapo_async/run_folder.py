"""The folder a run leaves behind: which one it is, and the files that live in it.

runs/NAME/config.json, metrics.jsonl, events.out.tfevents.*, samples.jsonl, ledger.jsonl, lengths.jsonl, summary.json,
          checkpoints/step_N/, logs/
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from dapo_async.checkpoint import latest_checkpoint
from dapo_async.config import Config
from dapo_async.errors import CheckpointError, DapoError
from dapo_async.intake import plain
from dapo_async.metrics import MetricWriter
from dapo_async.records import open_ledger, open_lengths, open_samples


class RunFolder:
    """An open run folder. ``resume_step`` is the batch it goes on after; None for a new run."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self.metrics = MetricWriter(path, resume_step)
        self.samples = open_samples(path, resume_step)
        self.ledger = open_ledger(path, resume_step)
        self.lengths = open_lengths(path, resume_step)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as a JSON file, whole or not at all."""
        target = self.path / name
        part = target.with_name(f"{name}.part")
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(part, target)

    def close(self) -> None:
        """Close the files."""
        for file in (self.metrics, self.samples, self.ledger, self.lengths):
            file.close()


def new_run(config: Config) -> Path:
    """Make the folder of a new run: ``run.name``, or with the next free number behind it if that is taken."""
    parent = Path(config.run.folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = parent / (config.run.name if number == 1 else f"{config.run.name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise DapoError(f"run.folder = {parent}: cannot be written: {error.strerror or error}") from None
    raise AssertionError("count never ends")


def run_to_resume(config: Config) -> tuple[Path, Path | None]:
    """The newest folder of ``run.name`` that has a checkpoint, and that; if none has, the newest folder and None.

    Raises ``CheckpointError`` if there is no such run.
    """
    parent = Path(config.run.folder)
    numbered = [p for p in parent.glob(f"{config.run.name}-*") if p.name[len(config.run.name) + 1 :].isdecimal()]
    numbered.sort(key=lambda p: int(p.name.rpartition("-")[2]))
    runs = [p for p in (parent / config.run.name, *numbered) if p.is_dir()]
    if not runs:
        raise CheckpointError(f"{parent / config.run.name}: no such run to resume; start it without --resume")
    checkpoints = [(run, latest_checkpoint(run / "checkpoints")) for run in runs]
    return next((found for found in reversed(checkpoints) if found[1]), checkpoints[-1])


def write_config(folder: RunFolder, config: Config) -> None:
    """``config.json``: the resolved configuration."""
    folder.write_json("config.json", plain(config))
