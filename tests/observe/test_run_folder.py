"""A run folder's lock, where the file system has none. Two real processes: tests/whole_run/test_endings.py."""

import errno
import logging
from pathlib import Path

import pytest

from dapo_async.errors import CheckpointError
from dapo_async.observe import run_folder
from dapo_async.observe.run_folder import only_writer


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, "as the file system says")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch, number)
    with caplog.at_level(logging.WARNING), only_writer(tmp_path):
        assert "this file system has no locks" in caplog.text


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EIO, "cannot be locked"), (errno.EWOULDBLOCK, "is being trained by another process")]
)
def test_any_other_refusal_ends_it(number: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, number)
    with pytest.raises(CheckpointError, match=told), only_writer(tmp_path):
        pytest.fail("nobody may write")
