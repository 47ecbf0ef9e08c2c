"""Memory that the learner writes and workers of the same host map: one copy of a set of weights for all of them.

It owns making, finding and mapping such a file. The file has no name in any folder (``memfd_create``): workers open it
through ``/proc/PID/fd``, where only the same user may look. The kernel frees it with the last process that has it
open or mapped, so that nothing is left behind, however either side ends; and it is not bounded by the size of
/dev/shm, which is 64 MiB in many containers. It is sealed against shrinking, so that reading a mapping never fails.
Not owned: who may write when (``snapshot``), and what is in it.
"""

import ctypes
import fcntl
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.protocol import TensorInfo, WeightsShared
from dapo_async.weights import (
    MAX_DIMENSIONS,
    SERVING_DTYPES,
    bytes_of,
    check_digest,
    check_names,
    offsets_of,
    size_of,
)

NAME = re.compile(r"dapo-async-weights-[0-9a-f]{32}")


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
    """The learner's side: a file of ``num_bytes`` bytes, mapped for writing. It ends with its last reference."""

    def __init__(self, num_bytes: int) -> None:
        """Raises ``OSError`` if the system has no room for it."""
        self.pid = os.getpid()
        self.name = f"dapo-async-weights-{secrets.token_hex(16)}"
        self.descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.fchmod(self.descriptor, 0o600)
        os.ftruncate(self.descriptor, num_bytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        # The mapping lives as long as tensors over it, and is not closed before.
        self.mapping = mmap.mmap(self.descriptor, num_bytes)


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
        """The tensors of ``message``, without a copy, verified.

        What is written to them stays in this process. Raises ``Unreachable``, or ``WeightsError`` if names, sizes or
        digest do not agree; the version then counts as released.
        """
        for name in self._mappings.keys() - set(message.files):
            del self._mappings[name]
        try:
            tensors = self._map(message)
        except (Unreachable, WeightsError):
            self._released.append(message.version)
            raise
        try:
            frames = [bytes_of(tensor) for tensor in tensors.values()]
            check_digest(message.version, message.digest, message.tensors, frames)
        except WeightsError:
            self._mappings.pop(message.file)  # somebody here may have written to it
            raise
        return tensors

    def _map(self, message: WeightsShared) -> dict[str, Tensor]:
        check_names(message.tensors)
        offsets, num_bytes = offsets_of(message.tensors)
        if any(len(info.shape) > MAX_DIMENSIONS for info in message.tensors):
            raise WeightsError(f"version {message.version} has a tensor of more than {MAX_DIMENSIONS} dimensions")
        mapping = self._mappings.get(message.file) or _open(message, num_bytes)
        if len(mapping) != max(1, num_bytes):
            raise WeightsError(f"version {message.version} has {num_bytes} bytes, its file has {len(mapping)}")
        self._mappings[message.file] = mapping
        return _tensors(mapping, message.tensors, offsets, lambda: self._released.append(message.version))


def _open(message: WeightsShared, num_bytes: int) -> mmap.mmap:
    """Map the file copy-on-write: writing to it is impossible from here."""
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
        if os.fstat(descriptor).st_size != max(1, num_bytes):
            raise WeightsError(f"version {message.version} has {num_bytes} bytes, its file has another size")
        return mmap.mmap(descriptor, max(1, num_bytes), access=mmap.ACCESS_COPY)
    except OSError as error:  # a limit on address space, or a system that never promises more than it has
        raise Unreachable(f"cannot map {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _tensors(
    mapping: mmap.mmap, infos: Sequence[TensorInfo], offsets: Sequence[int], on_release: Callable[[], None]
) -> dict[str, Tensor]:
    """Views of the mapping; ``on_release`` is called when the last of them, and of their own views, is gone."""
    owner = (ctypes.c_char * len(mapping)).from_buffer(mapping)
    weakref.finalize(owner, on_release).atexit = False
    found = {}
    for info, offset in zip(infos, offsets, strict=True):
        dtype = SERVING_DTYPES[info.dtype]
        if size_of(info):
            count = size_of(info) // dtype.itemsize
            found[info.name] = torch.frombuffer(owner, dtype=dtype, count=count, offset=offset).reshape(info.shape)
        else:
            found[info.name] = torch.empty(info.shape, dtype=dtype)
    return found
