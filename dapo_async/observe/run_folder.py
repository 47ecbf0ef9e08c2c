"""The folder a run leaves behind: which one it is, and the files that live in it.

runs/NAME/config.json, metrics.jsonl, events.out.tfevents.*, samples.jsonl, ledger.jsonl, lengths.jsonl, summary.json,
          checkpoints/step_N/, logs/, lock
"""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_async.config.settings import Config
from dapo_async.config.toml import changed_settings, plain
from dapo_async.errors import CheckpointError, one_line
from dapo_async.observe.checkpoint_folder import latest_checkpoint
from dapo_async.observe.files import write_json, writing
from dapo_async.observe.metric_writer import MetricWriter
from dapo_async.observe.records import NO_STEP, JsonLines, whole_lines

log = logging.getLogger(__name__)


class RunFolder:
    """An open run folder. ``resume_step`` is the batch it goes on after; None for a new run."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self.resume_step = resume_step
        self.metrics = MetricWriter(path, resume_step)
        self.samples = JsonLines(path / "samples.jsonl", resume_step)  # of Sample
        self.ledger = JsonLines(path / "ledger.jsonl", resume_step)  # of TrainedBatch
        self.lengths = JsonLines(path / "lengths.jsonl", resume_step)  # of Lengths

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as a JSON file, whole or not at all. Raises ``DapoError`` if the disk refuses."""
        write_json(self.path / name, value)

    def close(self) -> None:
        """Close the files."""
        for file in (self.metrics, self.samples, self.ledger, self.lengths):
            file.close()


def new_run(config: Config) -> Path:
    """Make the folder of a new run: ``run.name``, or with the next free number behind it if that is taken."""
    parent = Path(config.run.folder)
    with writing(f"run.folder = {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = parent / (config.run.name if number == 1 else f"{config.run.name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    raise AssertionError("count never ends")


def run_to_resume(config: Config) -> tuple[Path, Path | None]:
    """The newest folder of ``run.name`` that has a checkpoint, and that; if none has, the newest folder and None.

    A newer folder without a checkpoint is left as it is: nothing in it can be gone on with, and beginning it anew would
    drop what it logged. The log says so. Raises ``CheckpointError`` if there is no such run.
    """
    parent = Path(config.run.folder)
    numbered = [p for p in parent.glob(f"{config.run.name}-*") if p.name[len(config.run.name) + 1 :].isdecimal()]
    numbered.sort(key=lambda p: int(p.name.rpartition("-")[2]))
    runs = [p for p in (parent / config.run.name, *numbered) if p.is_dir()]
    if not runs:
        raise CheckpointError(f"{parent / config.run.name}: no such run to resume; start it without --resume")
    checkpoints = [(run, latest_checkpoint(run / "checkpoints")) for run in runs]
    run, checkpoint = next((found for found in reversed(checkpoints) if found[1]), checkpoints[-1])
    if run != runs[-1]:
        log.warning(
            "%s has no checkpoint: %s, which is older, is resumed; to begin %s anew instead, set run.name to it",
            runs[-1],
            run,
            runs[-1].name,
        )
    return run, checkpoint


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Be the only process that writes into this run folder, inside. Raises ``CheckpointError`` naming the other one.

    The kernel lets go of the lock with the process, however that ends.
    """
    with contextlib.ExitStack() as cleanup:
        with writing(path / "lock"):
            file = cleanup.enter_context((path / "lock").open("a+", encoding="utf-8", errors="replace"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                log.warning("%s: this file system has no locks: no other run may write here (%s)", path, error.strerror)
                yield
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(f"{path}: cannot be locked against other runs: {error.strerror}") from None
            file.seek(0)
            holder = one_line(file.readline(500).strip()) or "another process"
            raise CheckpointError(
                f"{path} is being trained by {holder}: end that one first, or give this one another run.name"
            ) from None
        with writing(path / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {platform.node()}\n")
            file.flush()
        yield


def check_ledger(path: Path, step: int) -> None:
    """Raise ``CheckpointError`` unless the ledger of this run folder tells of each batch until ``step`` once.

    Reads only: what a resume drops stays where it is.
    """
    ledger = path / "ledger.jsonl"
    try:
        steps = [record["step"] for record in whole_lines(ledger)] if ledger.exists() else []
    except OSError as error:
        raise CheckpointError(f"{ledger}: cannot be read: {error.strerror or error}") from None
    told = [one for one in steps if one <= step]
    if told != list(range(1, step + 1)):
        raise CheckpointError(
            f"{ledger} tells of {len(told)} batches until step {step}, where the checkpoint stands: lines were lost or "
            "added, so which groups were trained is not known. Bring the file back, or begin a new run (another "
            "run.name) with the checkpoint's folder as model.path"
        )


def begin_life(folder: RunFolder, config: Config) -> None:
    """Write ``config.json``, the resolved configuration; of a resumed run, log first how it goes on."""
    if folder.resume_step is not None:
        _tell_resumption(folder, config, folder.resume_step)
    folder.write_json("config.json", plain(config))


def _tell_resumption(folder: RunFolder, config: Config, step: int) -> None:
    """Where it goes on, what is dropped for it, and which settings are not what they were."""
    dropped = folder.ledger.num_dropped
    if step == NO_STEP:
        after = f" (steps it has logged, now dropped: {dropped})" if dropped else ""
        log.warning("%s has no checkpoint: it begins anew%s", folder.path, after)
    else:
        after = f" (steps logged after it, now dropped: {dropped})" if dropped else ""
        log.info("resuming %s at step %d%s", folder.path, step, after)
    try:
        before = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
        changed = changed_settings(_by_name(before), _by_name(plain(config)))
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s: cannot tell which settings changed: config.json is not readable (%s)", folder.path, error)
        return
    if changed:
        log.info("changed since: %s", changed)


def _by_name(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in config.items() for name, value in values.items()}
