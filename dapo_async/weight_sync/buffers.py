"""Memory for published sets, used again and never written under a reader.

A buffer is shared memory where that is wanted, else memory of this process. It may be written again once nobody can
read it any more. One that is not given back in time is not taken back but dropped, and lives on until its last reader
is gone, so that a slow, stopped or dead worker never sees a set change, and nobody has to judge which of these it is.

Not owned: what is written (``snapshot``), and who reads: the publisher says so, under its lock.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from dapo_async.weight_sync.lending import lend
from dapo_async.weight_sync.shared_memory import SharedFile

log = logging.getLogger(__name__)

MAX_BUFFERS = 3  # served, being written, and one whose readers are late: first-touch of memory costs 30 copies
OLD_SETS = 8  # sets that are published before a buffer that is still read is given up

_numbers = itertools.count()


class Buffer:
    """Room for one set. Its memory is touched once and then used again."""

    def __init__(self, num_bytes: int, shared: bool) -> None:
        self.num_bytes = num_bytes
        self.file = SharedFile(max(1, num_bytes)) if shared else None
        if self.file is not None:
            self.whole = self.file.room[:num_bytes]
        else:
            self.whole = torch.empty(num_bytes, dtype=torch.uint8)
        self.pinned: bool | None = None  # None: no GPU has had to write to it yet
        self.version = -1
        self.turn = 0  # how many sets had been published when it was taken
        # Subscribers that map it, and a number for each message on its way with its bytes.
        self.readers: set[str | int] = set()

    def read_by(self, reader: str) -> bool:
        """Note a reader. False if it was one already: another connection of its may have led to it."""
        new = reader not in self.readers
        self.readers.add(reader)
        return new

    def lend(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        """Pieces of it for the network, which counts as a reader until the last of them is freed, in any thread."""
        reader = next(_numbers)
        self.readers.add(reader)
        loan = lend(self.whole.data_ptr(), self.num_bytes, self.whole, partial(self.readers.discard, reader))
        view = memoryview(loan).cast("B")
        return [view[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]


class Buffers:
    """At most ``MAX_BUFFERS`` buffers of one size. Its methods are called under the publisher's lock."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self._all: list[Buffer] = []
        self._turn = 0
        self.made = 0  # buffers, since the start
        self.dropped = 0  # of them, those that were not given back in time
        self.gone: list[Buffer] = []  # to be let go of without the lock: unpinning takes its time

    def take(self, version: int, num_bytes: int, serving: Buffer | None) -> Buffer:
        """A buffer to write ``version`` to: one that nobody reads, or a new one. Raises ``OSError`` without room."""
        self._turn += 1
        self._all = [buffer for buffer in self._all if buffer.num_bytes == num_bytes]
        # Who reads what is so old has most likely died: it would else be kept as long as the others can take turns.
        for old in [b for b in self._all if b.readers and b is not serving and self._turn - b.turn > OLD_SETS]:
            self._drop(old)
        free = [buffer for buffer in self._all if buffer is not serving and not buffer.readers]
        if free:
            taken = free[0]
        else:
            late = [buffer for buffer in self._all if buffer is not serving]
            if len(self._all) >= MAX_BUFFERS:
                self._drop(min(late, key=lambda buffer: buffer.version))
            taken = self._new(num_bytes)
            self.made += 1
            self._all.append(taken)
        taken.version, taken.turn = version, self._turn
        return taken

    def _drop(self, buffer: Buffer) -> None:
        self._all.remove(buffer)
        self.gone.append(buffer)
        self.dropped += 1

    def _new(self, num_bytes: int) -> Buffer:
        try:
            return Buffer(num_bytes, self.shared)
        except OSError as error:
            if not self.shared:
                raise
            log.warning("no shared memory of %d MiB (%s): weights travel over the network", num_bytes >> 20, error)
            self.shared = False
            return Buffer(num_bytes, shared=False)

    def release(self, reader: str, versions: Iterable[int]) -> None:
        """``reader`` maps these versions no longer."""
        for buffer in self._all:
            if buffer.version in versions:
                buffer.readers.discard(reader)

    @property
    def names(self) -> list[str]:
        """Names of the shared files in use."""
        return [buffer.file.name for buffer in self._all if buffer.file is not None]
