"""Weights on their way to vLLM: no file is left behind, and none is lost for want of room."""

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from workers.vllm import weights_file
from workers.vllm.weights_file import PREFIX, own_folder, sweep, write_set

TENSORS = {"a": torch.arange(8.0), "b": torch.ones(2, 2)}


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Folders in place of shared memory and of the disk's temporary folder."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(weights_file, "SHARED", str(memory))
    monkeypatch.setattr(weights_file.tempfile, "gettempdir", lambda: str(disk))
    return memory, disk


def test_weights_pass_through_memory_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, places: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(weights_file.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert weights_file.folder_for(1 << 29) == str(places[0])
    assert weights_file.folder_for(1 << 30) == str(places[1])


def test_a_set_is_written_and_removed(places: tuple[Path, Path]) -> None:
    with contextlib.ExitStack() as cleanup:
        path, digests = write_set(TENSORS, cleanup)
        assert Path(path).parent.parent == places[0]
        assert f"{PREFIX}{os.getpid()}-" in path
        assert load_file(path)["a"].equal(TENSORS["a"])
        assert set(digests) == {"a", "b"}
        write_set(TENSORS, cleanup)
        assert Path(path).exists(), "another swap swept it"
    assert not any(places[0].iterdir())


@contextlib.contextmanager
def writer(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a folder with a file in ``place``."""
    code = (
        "import sys, time; from pathlib import Path; from workers.vllm.weights_file import own_folder\n"
        "with own_folder(sys.argv[1]) as folder:\n"
        "    Path(folder, 'model.safetensors').write_bytes(bytes(1000)); print(folder, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(places: tuple[Path, Path]) -> None:
    for place in places:
        with writer(place) as process:
            assert process.stdout is not None
            folder = Path(process.stdout.readline().strip())
            assert folder.parent == place
            sweep()
            assert (folder / "model.safetensors").exists()
            process.kill()
            process.wait(timeout=30.0)
            assert folder.exists()
            with contextlib.ExitStack() as cleanup:
                write_set(TENSORS, cleanup)
            assert not folder.exists()


def test_what_belongs_to_others_is_not_swept(
    monkeypatch: pytest.MonkeyPatch, places: tuple[Path, Path], tmp_path: Path
) -> None:
    memory, _ = places
    target = tmp_path / "target"
    target.mkdir()
    (memory / f"{PREFIX}link").symlink_to(target)
    (memory / f"{PREFIX}file").touch()
    (memory / "dapo-async-other").mkdir()
    (memory / f"{PREFIX}1-abc").mkdir()
    monkeypatch.setattr(weights_file.os, "getuid", lambda: 4_000_000)
    sweep()
    assert len(list(memory.iterdir())) == 4, "somebody else's"
    monkeypatch.undo()
    monkeypatch.setattr(weights_file, "SHARED", str(memory))
    sweep()
    assert {path.name for path in memory.iterdir()} == {f"{PREFIX}link", f"{PREFIX}file", "dapo-async-other"}
    assert target.is_dir()


def test_a_sweeper_between_folder_and_lock_costs_one_more_try(
    monkeypatch: pytest.MonkeyPatch, places: tuple[Path, Path]
) -> None:
    lock, swept = fcntl.flock, []

    def flock(held: int, how: int) -> None:
        if not swept:
            swept.append(held)
            sweep()
        lock(held, how)

    monkeypatch.setattr(weights_file.fcntl, "flock", flock)
    with own_folder(str(places[0])) as folder:
        assert [str(path) for path in places[0].iterdir()] == [folder]
    assert swept


NO_ROOM = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", NO_ROOM)
def test_without_room_in_memory_the_disk_is_used_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, places: tuple[Path, Path], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    write = weights_file.write_weights

    def full(path: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        found = write(path, tensors)
        if str(places[0]) in path:
            raise error
        return found

    monkeypatch.setattr(weights_file, "write_weights", full)
    with caplog.at_level(logging.WARNING), contextlib.ExitStack() as cleanup:
        path, _ = write_set(TENSORS, cleanup)
        assert Path(path).parent.parent == places[1]
        assert not any(places[0].iterdir()), "half a file takes the room of others"
    (told,) = caplog.messages
    assert f"no room left for weights of 48 bytes: they go through {places[1]}" in told
    assert not any(places[1].iterdir())


def test_any_other_trouble_and_a_full_disk_are_raised(
    monkeypatch: pytest.MonkeyPatch, places: tuple[Path, Path]
) -> None:
    raised: list[Exception] = [
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
        *NO_ROOM,
    ]

    tried: list[Path] = []

    def fail(path: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        tried.append(Path(path).parent.parent)
        raise error

    monkeypatch.setattr(weights_file, "write_weights", fail)
    for error in raised:
        with contextlib.ExitStack() as cleanup, pytest.raises(type(error)):
            write_set(TENSORS, cleanup)
        assert not any(places[0].iterdir())
        assert not any(places[1].iterdir())
    assert tried == [places[0], *places, *places], "only missing room is a reason to go to the disk"


IN_A_FULL_FILE_SYSTEM = """
import contextlib, sys, torch
from workers.vllm import weights_file
weights_file.SHARED, weights_file.tempfile.tempdir, weights_file.SPARE_BYTES = sys.argv[1], sys.argv[2], -(1 << 30)
with contextlib.ExitStack() as cleanup:
    print(weights_file.write_set({"a": torch.zeros(1 << 20)}, cleanup)[0])
"""


@pytest.mark.slow
def test_a_file_system_that_is_really_full_is_recognised(places: tuple[Path, Path]) -> None:
    small = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {places[0]}"
    try:
        subprocess.run([*small, mount], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a small file system here")
    command = [*small, f'{mount} && exec "$@"', "sh", sys.executable, "-c", IN_A_FULL_FILE_SYSTEM, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"{places[1]}/{PREFIX}")
    assert "no room left" in done.stderr
