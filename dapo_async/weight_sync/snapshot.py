"""One published set: the one copy that it is, and the ways in which workers can have it.

The copy goes from the live tensors, in serving precision, each piece digested while it is in the processor's cache,
straight into the buffer that is served. An offer of it chooses, for each request, between shared memory, the deltas
since an older set, and the whole set, and makes the messages. No socket and no thread.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import (
    ON_WEIGHTS,
    Codec,
    Frame,
    TensorInfo,
    WeightsDelta,
    WeightsPush,
    WeightsRequest,
    WeightsShared,
)
from dapo_async.weight_sync.buffers import Buffer
from dapo_async.weight_sync.delta import MAX_DELTAS, Delta, make_delta
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


# --- the ways to workers -------------------------------------------------------------------------------


By = Literal["full", "delta", "shm"]


class Payload(NamedTuple):
    """A message for one worker."""

    by: By
    frames: list[Frame]
    num_bytes: int  # of weights on the network


class Offer(NamedTuple):
    """A snapshot and its ways."""

    snapshot: Snapshot
    incarnation: str
    deltas: tuple[Delta, ...]  # each begins where the one before ends, the last one ends in ``snapshot``
    full: list[Frame]  # the message, without the tensors
    shared: list[Frame]  # empty: not in shared memory

    @property
    def version(self) -> int:
        """Of the snapshot."""
        return self.snapshot.version

    def answer(self, request: WeightsRequest) -> Payload:
        """The cheapest way that this worker can take."""
        if self.shared and not request.unshared:
            return Payload("shm", self.shared, 0)
        bases = [delta.base for delta in self.deltas]
        if request.incarnation != self.incarnation or request.base not in bases:
            return Payload("full", [*self.full, *self.snapshot.lent_frames()], self.snapshot.num_bytes)
        steps = self.deltas[bases.index(request.base) :]
        message = WeightsDelta(
            version=self.version,
            base=request.base,
            incarnation=self.incarnation,
            digest=self.snapshot.digest,
            steps=[step.parts for step in steps],
        )
        frames: list[Frame] = [frame for step in steps for frame in (step.gaps, step.values)]
        return Payload("delta", [*Codec(ON_WEIGHTS).encode(message), *frames], sum(step.num_bytes for step in steps))


def make_offer(snapshot: Snapshot, incarnation: str, deltas: tuple[Delta, ...], files: list[str]) -> Offer:
    """``files`` are the names of all shared files in use."""
    codec = Codec(ON_WEIGHTS)
    version, infos, digest = snapshot.version, snapshot.infos, snapshot.digest
    push = WeightsPush(version=version, incarnation=incarnation, digest=digest, tensors=infos)
    shared: list[Frame] = []
    if (file := snapshot.buffer.file) is not None:
        message = WeightsShared(
            version=version,
            incarnation=incarnation,
            digest=digest,
            tensors=infos,
            pid=file.pid,
            descriptor=file.descriptor,
            file=file.name,
            files=files,
        )
        shared = codec.encode(message)
    return Offer(snapshot, incarnation, deltas, codec.encode(push), shared)


def deltas_to(snapshot: Snapshot, before: Offer, max_frame_bytes: int) -> tuple[Delta, ...]:
    """The newest steps that lead to ``snapshot``, as many as together stay below a whole set; none if not even one.

    ``before`` is the offer of the set published before.
    """
    old = before.snapshot
    if old.infos != snapshot.infos:
        return ()
    limit = snapshot.num_bytes
    newest = make_delta(old.version, snapshot.version, snapshot.infos, old.frames(), snapshot.frames(), limit)
    if newest is None or max(len(newest.gaps), len(newest.values)) > max_frame_bytes:
        return ()
    return _smaller_than([*before.deltas, newest], snapshot.num_bytes)


def _smaller_than(deltas: Sequence[Delta], num_bytes: int) -> tuple[Delta, ...]:
    """The longest tail of at most ``MAX_DELTAS`` deltas that together have less than ``num_bytes``."""
    kept: list[Delta] = []
    for delta in reversed(deltas[-MAX_DELTAS:]):
        num_bytes -= delta.num_bytes
        if num_bytes <= 0:
            break
        kept.insert(0, delta)
    return tuple(kept)
