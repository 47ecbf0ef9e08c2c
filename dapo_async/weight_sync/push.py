"""What a push sends: a published set in shared memory, as the deltas since an older set, or whole.

Owned here: which of these ways a set can travel, which one a worker's request gets, and the messages. No socket and no
thread; whether there is anything newer to send, and which ways the settings allow, the publisher knows.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dapo_async.transport.messages import (
    ON_WEIGHTS,
    Codec,
    Frame,
    WeightsDelta,
    WeightsPush,
    WeightsRequest,
    WeightsShared,
)
from dapo_async.weight_sync.delta import MAX_DELTAS, Delta, make_delta
from dapo_async.weight_sync.snapshot import Snapshot

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
        """Shared memory if this worker can read it, else deltas if it keeps their base, else the whole set."""
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
