"""Memory that the learner writes and workers of the same host map: one copy of a set of weights for all of them.

It owns making, finding and mapping such a file. The file has no name in any folder (``memfd_create``): workers open it
through ``/proc/PID/fd``, where only the same user may look. The kernel frees it with the last process that has it
open or mapped, so that nothing is left behind, however either side ends; and it is not bounded by the size of
/dev/shm, which is 64 MiB in many containers. It is sealed against shrinking, so that reading a mapping never fails.

A set is verified once for all its workers, not by each of them. The learner takes its digest from the very pages that
they map and writes it into the file's first page (the stamp). The kernel lets nobody write to them but the learner
through its first mapping, and the learner does not before the last reader is gone, and wipes the stamp first. So a
worker that finds the stamp of the set it was told of has that set, bit for bit, for as long as it reads.

Not owned: who may write when (``snapshot``), and what is in it.
"""

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import TensorInfo, WeightsShared
from dapo_async.weight_sync.encoding import (
    MAX_DIMENSIONS,
    SERVING_DTYPES,
    STAMP_BYTES,
    check_names,
    offsets_of,
    size_of,
    stamp_of,
)
from dapo_async.weight_sync.lending import lend

NAME = re.compile(r"dapo-async-weights-[0-9a-f]{32}")
F_SEAL_FUTURE_WRITE = 0x10  # of Linux; not in fcntl
HEADER_BYTES = mmap.PAGESIZE  # before the set: its stamp, and nothing else


def available() -> bool:
    """Whether this system lets this process make such files: Linux, unless forbidden."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        SharedFile(1)
    except OSError:
        return False
    return True


class SharedFile:
    """The learner's side: a file with room for ``num_bytes`` bytes, mapped. It ends with its last reference."""

    def __init__(self, num_bytes: int) -> None:
        """Raises ``OSError`` if the system has no room for it. It may be written to."""
        self.pid = os.getpid()
        self.name = f"dapo-async-weights-{secrets.token_hex(16)}"
        self.descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.fchmod(self.descriptor, 0o600)
        os.ftruncate(self.descriptor, HEADER_BYTES + num_bytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        # The mapping lives as long as tensors over it, and is not closed before. Nobody gets another one to write to.
        self._mapping = mmap.mmap(self.descriptor, HEADER_BYTES + num_bytes)
        with contextlib.suppress(OSError):  # Linux before 5.1
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        self.room = torch.frombuffer(self._mapping, dtype=torch.uint8)[HEADER_BYTES:]

    def open(self) -> None:
        """What is in it counts as no set from here on: the next one is about to be written."""
        self._mapping[:STAMP_BYTES] = bytes(STAMP_BYTES)

    def close(self, stamp: bytes) -> None:
        """It holds the set of this ``stamp``, and is not written to before ``open``."""
        self._mapping[:STAMP_BYTES] = stamp


class Unreachable(Exception):
    """This process cannot open the file: it is on another host, in another container, or of another user."""


class SharedReader:
    """A worker's side: maps the files of one learner, and tells which sets are not read any more. One thread."""

    def __init__(self) -> None:
        self._mappings: dict[str, mmap.mmap] = {}  # kept: mapping anew costs more than verifying
        self._released: list[int] = []  # appended to in any thread, whenever the last tensor of a set is freed

    @property
    def has_released(self) -> bool:
        """Whether ``released`` has something to tell. From any thread."""
        return bool(self._released)

    def released(self) -> list[int]:
        """Versions that nobody here reads any more, each once."""
        gone = self._released[:]
        del self._released[: len(gone)]
        return gone

    def let_go(self, version: int) -> None:
        """This set will not be read here."""
        self._released.append(version)

    def read(self, message: WeightsShared) -> dict[str, Tensor]:
        """The tensors of ``message``, without a copy. Writing to them ends this process.

        Raises ``Unreachable``, or ``WeightsError`` if names, sizes or the file's stamp do not agree; the version then
        counts as released.
        """
        for name in self._mappings.keys() - set(message.files):
            del self._mappings[name]
        try:
            return self._map(message)
        except (Unreachable, WeightsError):
            self._released.append(message.version)
            raise

    def _map(self, message: WeightsShared) -> dict[str, Tensor]:
        check_names(message.tensors)
        offsets, num_bytes = offsets_of(message.tensors)
        if any(len(info.shape) > MAX_DIMENSIONS for info in message.tensors):
            raise WeightsError(f"version {message.version} has a tensor of more than {MAX_DIMENSIONS} dimensions")
        mapping = self._mappings.get(message.file) or _open(message, num_bytes)
        if len(mapping) != HEADER_BYTES + max(1, num_bytes):
            room = len(mapping) - HEADER_BYTES
            raise WeightsError(f"version {message.version} has {num_bytes} bytes, its file has room for {room}")
        self._mappings[message.file] = mapping
        if mapping[:STAMP_BYTES] != stamp_of(message.tensors, message.digest):
            raise WeightsError(f"{message.file} does not hold version {message.version} with {message.digest}")
        return _tensors(mapping, message.tensors, offsets, lambda: self._released.append(message.version))


def _open(message: WeightsShared, num_bytes: int) -> mmap.mmap:
    """Map the file for reading: writing to it is impossible from here."""
    if not NAME.fullmatch(message.file):
        raise WeightsError(f"{message.file[:50]!r} is no name of a shared file")
    path = f"/proc/{message.pid}/fd/{message.descriptor}"
    try:
        # On another host the path may exist and be anything; only the right file has this name.
        if os.readlink(path) != f"/memfd:{message.file} (deleted)":
            raise Unreachable(f"{path} is another file here")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Unreachable(f"cannot open {path}: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_size != HEADER_BYTES + max(1, num_bytes):
            raise WeightsError(f"version {message.version} has {num_bytes} bytes, its file has another size")
        return mmap.mmap(descriptor, HEADER_BYTES + max(1, num_bytes), access=mmap.ACCESS_READ)
    except OSError as error:  # a limit on address space, or a system that never promises more than it has
        raise Unreachable(f"cannot map {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _tensors(
    mapping: mmap.mmap, infos: Sequence[TensorInfo], offsets: Sequence[int], on_release: Callable[[], None]
) -> dict[str, Tensor]:
    """Views of the mapping; ``on_release`` is called when the last of them, and of their own views, is gone."""
    # torch has no read-only tensors and takes no read-only memory without a warning: so it is told the address.
    address = np.frombuffer(mapping, np.uint8).ctypes.data + HEADER_BYTES
    loan = lend(address, len(mapping) - HEADER_BYTES, mapping, on_release)
    found = {}
    for info, offset in zip(infos, offsets, strict=True):
        dtype = SERVING_DTYPES[info.dtype]
        if size_of(info):
            count = size_of(info) // dtype.itemsize
            found[info.name] = torch.frombuffer(loan, dtype=dtype, count=count, offset=offset).reshape(info.shape)
        else:
            found[info.name] = torch.empty(info.shape, dtype=dtype)
    return found
