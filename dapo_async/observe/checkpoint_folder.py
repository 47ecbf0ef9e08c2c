"""The folder of checkpoints: which are complete, how one appears at once, and which are kept.

A checkpoint is built under another name, described file by file in ``manifest.json``, flushed to disk and renamed, so
that one named ``step_N`` with a valid manifest is complete whatever crashed. Knows nothing of what the files mean. One
process writes into a folder; any may read.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dapo_async.errors import CheckpointError, DamagedCheckpoint
from dapo_async.observe.files import writing

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"

# A checkpoint that is about to be replaced by one of the same step keeps its contents and gets the suffix.
_NAME = re.compile(r"step_(\d+)(\.replaced)?")


class FileInfo(msgspec.Struct, forbid_unknown_fields=True):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``manifest.json``: what a checkpoint consists of."""

    format: int = FORMAT
    step: int
    config_digest: str  # of ``fixed``; empty: not said
    fixed: dict[str, Any] = {}  # settings that a resume must not change, by name; none in older checkpoints
    versions: dict[str, str]  # of the libraries that wrote it
    files: dict[str, FileInfo]


def checkpoints_to_try(folder: Path, named: str = "") -> list[Path]:
    """What a resume may go on from, the first choice first: all that is there, damaged ones too, the newest first; or
    the one that is ``named``, such as ``step_40``. Raises ``CheckpointError`` if that is not there.
    """
    found = [
        (int(match[1]), not match[2], path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))
    ]
    newest_first = [path for *_, path in sorted(found, reverse=True)]
    if not named:
        return newest_first
    if folder / named not in newest_first:
        there = ", ".join(path.name for path in reversed(newest_first)) or "none"
        raise CheckpointError(f"{folder / named}: no such checkpoint; there are: {there}")
    return [folder / named]


def set_aside(folder: Path, after_step: int) -> None:
    """Rename checkpoints of later steps to ``step_N.dropped``: the run goes on from an earlier one, not from them."""
    for path in checkpoints_to_try(folder):
        if int(path.name.partition("_")[2].partition(".")[0]) > after_step:
            aside = path.with_name(f"{path.name}.dropped")
            shutil.rmtree(aside, ignore_errors=True)
            with writing(aside):
                path.rename(aside)
            log.warning("%s is of a later step than the one that is gone on from: it is kept as %s", path, aside.name)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``, or None. Reads names and sizes, not contents."""
    complete = _complete_checkpoints(Path(folder))
    return complete[-1] if complete else None


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, lowest step first; of two of one step, the one to be replaced first."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and _is_complete(path):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found)]


def _is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def read_manifest(path: Path) -> Manifest:
    """The manifest of ``path``, every file of which exists in its full size. Raises ``CheckpointError``."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        what = f"has no {MANIFEST}: it is incomplete" if path.is_dir() else "no such checkpoint"
        raise DamagedCheckpoint(f"{path}: {what}") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path}: {MANIFEST} cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest.format}, this version reads format {FORMAT}")
    for name, info in manifest.files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != info.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {info.bytes}"
            raise DamagedCheckpoint(f"{path}: {name} {found}: the checkpoint is incomplete")
    return manifest


def check_contents(path: Path) -> Manifest:
    """The manifest of ``path``, after reading every file once. Raises ``CheckpointError``, also for a changed byte."""
    manifest = read_manifest(path)
    for name, info in manifest.files.items():
        if _describe(path / name) != info:
            raise DamagedCheckpoint(
                f"{path}: {name} is damaged: its content does not match {MANIFEST}; use another checkpoint"
            )
    return manifest


def fixed_digest(fixed: Mapping[str, Any]) -> str:
    """A digest of the values, in order; empty without any."""
    return hashlib.sha256(msgspec.json.encode(list(fixed.values()))).hexdigest()[:16] if fixed else ""


def write_manifest(building: Path, step: int, fixed: Mapping[str, Any], versions: dict[str, str]) -> None:
    """Describe every file of ``building`` and flush all of it to disk."""
    files = {}
    for path in sorted(building.rglob("*")):
        if path.is_file():
            _sync(path)
            files[path.relative_to(building).as_posix()] = _describe(path)
    manifest = Manifest(step=step, config_digest=fixed_digest(fixed), fixed=dict(fixed), versions=versions, files=files)
    (building / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    for path in (building / MANIFEST, *(path for path in building.rglob("*") if path.is_dir()), building):
        _sync(path)


def publish(building: Path, target: Path) -> None:
    """Give a complete checkpoint its name. There is no moment without a complete checkpoint of that step."""
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    building.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def keep_newest(folder: Path, keep_last: int, newest: Path) -> None:
    """Remove all complete checkpoints but the ``keep_last`` of the highest steps, and never ``newest``."""
    for path in _complete_checkpoints(folder)[:-keep_last]:
        if path != newest:
            # Under this name a half-removed checkpoint is a leftover.
            _remove(path, path.with_name(f"{path.name}.tmp-removed"))


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted writer left. A folder has one writer, so nobody is at work on it."""
    for path in folder.glob("step_*.tmp-*"):
        _remove(path, path)
    for path in folder.glob("step_*.replaced"):
        if _is_complete(path.with_suffix("")):
            _remove(path, path)


def _remove(path: Path, under: Path) -> None:
    """Remove a folder, under another name first. What the disk keeps (a file that somebody reads) is left for later."""
    try:
        shutil.rmtree(path.rename(under))
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error)


def _describe(path: Path) -> FileInfo:
    with path.open("rb") as file:
        return FileInfo(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
