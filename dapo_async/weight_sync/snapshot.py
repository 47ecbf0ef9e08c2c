"""One published set of weights: the one copy that publishing makes.

It goes from the live tensors, in serving precision, each piece digested while it is in the processor's cache, straight
into the buffer that is served. No socket and no thread.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import TensorInfo
from dapo_async.weight_sync.buffers import Buffer
from dapo_async.weight_sync.encoding import (
    CHUNK_BYTES,
    SERVING_DTYPES,
    combine,
    digest_piece,
    in_parallel,
    offsets_of,
    size_of,
    stamp_of,
)
from dapo_async.weight_sync.gpu_copy import copy_out, pin


class Snapshot(NamedTuple):
    """One set of weights in a buffer, which must not be written while this is served."""

    version: int
    infos: list[TensorInfo]
    digest: str
    buffer: Buffer
    num_bytes: int  # of the tensors
    seconds: float  # wall time of copy and digest

    def frames(self) -> list[memoryview]:
        """The bytes of each tensor, for reading while it is served."""
        offsets, _ = offsets_of(self.infos)
        return [
            self.buffer.whole[offset : offset + size_of(info)].numpy().data
            for info, offset in zip(self.infos, offsets, strict=True)
        ]

    def lent_frames(self) -> list[memoryview]:
        """The same for the network: the buffer is not written before they are freed. Under the publisher's lock."""
        return self.buffer.lend(offsets_of(self.infos)[0], [size_of(info) for info in self.infos])


def fill(
    buffer: Buffer,
    version: int,
    tensors: Mapping[str, Tensor],
    infos: list[TensorInfo],
    ready: torch.cuda.Event | None = None,
) -> Snapshot:
    """Copy ``tensors`` into ``buffer`` as ``infos`` say, and digest what was written.

    ``ready``: when tensors on a GPU have their values (``gpu_copy.moment``); their copies wait for it, and for nothing
    that was queued there since. None: they have them now.
    """
    started = time.monotonic()
    if buffer.file is not None:
        buffer.file.open()
    offsets, _ = offsets_of(infos)
    pairs: list[tuple[Tensor, Tensor]] = []
    for info, offset in zip(infos, offsets, strict=True):
        source, size = tensors[info.name].detach(), size_of(info)
        if tuple(source.shape) != tuple(info.shape):
            raise WeightsError(f"{info.name} changed its shape while it was published")
        if size:
            pairs.append((source, buffer.whole[offset : offset + size].view(SERVING_DTYPES[info.dtype])))
    on_gpu = [pair for pair in pairs if pair[0].is_cuda]
    if on_gpu:
        if buffer.pinned is None:
            buffer.pinned = pin(buffer.whole, buffer, on_gpu[0][0].device)
        copy_out(on_gpu, ready)
    pieces = [piece for source, target in pairs for piece in _pieces(source, target)]
    num_bytes = sum(size_of(info) for info in infos)
    digest = combine(infos, in_parallel(_finish_piece, pieces, num_bytes))
    if buffer.file is not None:
        buffer.file.close(stamp_of(infos, digest))
    return Snapshot(version, infos, digest, buffer, num_bytes, time.monotonic() - started)


def _pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Pieces of ``target``, each with its source, or None where it has been copied already."""
    step = CHUNK_BYTES // target.dtype.itemsize
    sources = itertools.repeat(None) if source.is_cuda else source.reshape(-1).split(step)
    return zip(sources, target.split(step), strict=False)


def _finish_piece(piece: tuple[Tensor | None, Tensor]) -> bytes:
    source, target = piece
    if source is not None:
        target.copy_(source)  # digested while it is in the processor's cache
    return digest_piece(target.view(torch.uint8).numpy().data)
