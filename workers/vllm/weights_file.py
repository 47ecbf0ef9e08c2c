"""The file by which a worker hands weights to vLLM's processes: where it lies, and that nobody's is left behind.

A file in memory lives until somebody removes it, and a worker that is killed removes nothing. So each lies in a folder
that its writer locks: the lock ends with the process however that ends, and a folder without one is swept. Imports no
vLLM.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from workers.serving_weights import write_weights

log = logging.getLogger("worker")
SHARED = "/dev/shm"
PREFIX = "dapo-async-swap-"
SPARE_BYTES = 16 << 20  # for the file's header, and for others
NO_SPACE = f"(os error {errno.ENOSPC})"  # how safetensors tells it


def write_set(tensors: Mapping[str, Tensor], cleanup: contextlib.ExitStack) -> tuple[str, dict[str, str]]:
    """Write ``tensors`` for another process. Returns the file and the tensors' digests; ``cleanup`` removes it.

    Raises ``OSError`` or ``SafetensorError`` if it cannot be written, in memory and then on disk.
    """
    sweep()
    num_bytes, disk = sum(tensor.nbytes for tensor in tensors.values()), tempfile.gettempdir()
    place = folder_for(num_bytes)
    try:
        return _write_in(place, tensors, cleanup)
    except (OSError, SafetensorError) as error:
        if place == disk or not _lacks_space(error):
            raise
        # Others, such as a second worker that swaps, took the room after we looked.
        log.warning("%s has no room left for weights of %d bytes: they go through %s, slower", place, num_bytes, disk)
    return _write_in(disk, tensors, cleanup)


def folder_for(num_bytes: int) -> str:
    """Where weights of this size can pass from process to process: in memory if there is room, else on disk."""
    shared = Path(SHARED)
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > num_bytes + SPARE_BYTES:
        return str(shared)
    return tempfile.gettempdir()


@contextlib.contextmanager
def own_folder(place: str) -> Iterator[str]:
    """A new folder in ``place``, this process's until the end of the block or of the process."""
    folder, held = _make_own(place)
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        os.close(held)


def sweep() -> None:
    """Remove the folders of this user's processes that have ended."""
    for place in {SHARED, tempfile.gettempdir()}:
        for folder in Path(place).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # it is gone, in use, or not ours to remove
                _sweep(folder)


def _make_own(place: str) -> tuple[str, int]:
    """A new folder and the open descriptor that holds its lock."""
    while True:
        folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place)
        # A sweeper may come between the folder and its lock.
        with contextlib.suppress(FileNotFoundError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            if _locked(held) and Path(folder).is_dir():
                return folder, held
            os.close(held)


def _locked(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # where folders cannot be locked, no sweeper can lock one either, and so removes none
        return True
    return True


def _sweep(folder: Path) -> None:
    """Remove ``folder`` if nobody holds it. Raises ``OSError`` if somebody does."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(held).st_uid == os.getuid():
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            log.info("removed %s, left by a worker that was killed", folder)
    finally:
        os.close(held)


def _write_in(place: str, tensors: Mapping[str, Tensor], cleanup: contextlib.ExitStack) -> tuple[str, dict[str, str]]:
    with contextlib.ExitStack() as own:
        path = f"{own.enter_context(own_folder(place))}/model.safetensors"
        found = write_weights(path, tensors)
        cleanup.enter_context(own.pop_all())
        return path, found


def _lacks_space(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or NO_SPACE in str(error)
