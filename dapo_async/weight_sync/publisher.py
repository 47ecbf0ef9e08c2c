"""The learner's end of the weights socket: serves the newest published set to every worker that asks.

It owns the weights ``Listener`` and two threads: one copies, digests and encodes what the learner publishes, the other
answers requests. ``publish`` only names the live tensors to the first, so that training never waits for the network;
before the learner changes them it calls ``wait_copied``. A slow worker skips versions instead of queueing them: it has
one open request and gets one answer to it, so at most one set is on its way to it. ``push.Offer.answer`` chooses
what is sent.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dapo_async.config.settings import WeightsWay
from dapo_async.errors import ConfigError, ProtocolError, StallError, WeightsError
from dapo_async.system.background import Background
from dapo_async.transport.curve import ListenerKeys
from dapo_async.transport.messages import ON_WEIGHTS, Codec, Refused, WeightsReleased, WeightsRequest, WeightsUnchanged
from dapo_async.transport.sockets import Listener
from dapo_async.weight_sync.buffers import Buffers
from dapo_async.weight_sync.delta import MAX_DELTAS, Delta
from dapo_async.weight_sync.encoding import check_frame_sizes, offsets_of, tensor_infos
from dapo_async.weight_sync.gpu_copy import moment
from dapo_async.weight_sync.push import Offer, deltas_to, make_offer
from dapo_async.weight_sync.shared_memory import available
from dapo_async.weight_sync.snapshot import Snapshot, fill

log = logging.getLogger(__name__)

QUEUE = 4  # messages per worker: an answer on its way, and signs of life
IDLE_S = 60.0  # longest sleep of the encoder; it is notified, so this bounds nothing but a lost notification
LOOK_S = 0.2  # between two looks at whether the encoder is alive


class PublisherCounts(NamedTuple):
    """Totals since the start."""

    published: int = 0  # sets that became ready to serve
    superseded: int = 0  # sets replaced by a newer one before they were copied
    full: int = 0  # answers handed to the network: sets that travelled whole
    delta: int = 0
    shm: int = 0
    sent_bytes: int = 0  # of whole sets and deltas
    undelivered: int = 0  # answers to workers that had gone
    refused: int = 0  # messages that were no acceptable request
    unshared: int = 0  # workers that could not open the shared memory they were offered
    copy_s: float = 0.0  # wall seconds of copying and digesting
    blocked_s: float = 0.0  # wall seconds of the learner in ``publish`` and ``wait_copied``


class _PendingSet(NamedTuple):
    version: int
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype | None
    ready: torch.cuda.Event | None  # when tensors on a GPU have their values


class Publisher:
    """See the module. All methods may be called from any thread."""

    def __init__(
        self,
        address: str,
        *,
        incarnation: str,
        max_message_bytes: int,
        heartbeat_s: float,
        insecure: bool = False,
        keys: ListenerKeys | None = None,
        way: WeightsWay = "auto",
    ) -> None:
        """Listen on ``address`` and begin to serve.

        Raises ``ConfigError`` as ``Listener`` does, and if ``way`` is "shm" where there is no such memory.
        """
        self.incarnation = incarnation
        self._way = way
        self._buffers = Buffers(shared=way in ("auto", "shm") and available())
        if way == "shm" and not self._buffers.shared:
            raise ConfigError('weights.way = "shm" needs Linux (memfd_create, which this system lacks or forbids)')
        self._max_message_bytes = max_message_bytes
        self._listener = Listener(
            address, max_message_bytes=max_message_bytes, insecure=insecure, keys=keys, queue=QUEUE
        )
        self._heartbeat_s, self._codec = heartbeat_s, Codec(ON_WEIGHTS)
        self._parked: dict[bytes, WeightsRequest] = {}
        self._unshared: set[str] = set()  # workers that could not open shared memory
        self._news = threading.Condition()
        self._waiting: _PendingSet | None = None
        self._last_given = self._last_copied = -1
        self._sends_ago = MAX_DELTAS + 1  # sets published since one travelled whole or as a delta
        self._ready: Offer | None = None
        self._closing, self._counts = False, PublisherCounts()
        self._threads = (Background("weights encoder", self._encode), Background("weights publisher", self._serve))
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        """Where subscribers connect."""
        return self._listener.address

    @property
    def published(self) -> int:
        """Newest version that workers can fetch; -1: none yet."""
        ready = self._ready
        return -1 if ready is None else ready.version

    @property
    def counts(self) -> PublisherCounts:
        """Totals since the start."""
        return self._counts

    def metrics(self) -> dict[str, float]:
        """What a run logs of it, as ``observe.metrics`` declares."""
        ready, counts = self._ready, self._counts
        values = {
            "publish/versions": counts.published,
            "publish/bytes": 0 if ready is None else ready.snapshot.num_bytes,
            "publish/sent_bytes": counts.sent_bytes,
            "publish/pushes_full": counts.full,
            "publish/pushes_delta": counts.delta,
            "publish/pushes_shm": counts.shm,
            "publish/unshared": counts.unshared,
            "publish/buffers_dropped": self._buffers.dropped,
            "publish/blocked_s": counts.blocked_s,
        }
        if ready is not None and ready.deltas:
            values["publish/delta_share"] = ready.deltas[-1].num_bytes / ready.snapshot.num_bytes
        return values

    def publish(self, version: int, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Leave a set for the encoder and return at once; a set still waiting there is superseded.

        The encoder copies the tensors, rounded to ``dtype`` (None: each its own); until ``wait_copied`` has returned
        nobody may change them. Raises ``WeightsError`` if ``version`` does not rise, ``ConfigError`` if a tensor is
        larger than a frame may be.
        """
        started = time.monotonic()
        check_frame_sizes(tensors, dtype, self._max_message_bytes)
        with self._news:
            if version <= self._last_given:
                raise WeightsError(f"versions must rise: {version} was published after {self._last_given}")
            if self._waiting is not None:
                self._count(superseded=1)
            self._last_given = version
            self._waiting = _PendingSet(version, tensors, dtype, moment(tensors.values()))
            self._news.notify_all()
            self._count(blocked_s=time.monotonic() - started)

    def wait_copied(self, timeout_s: float) -> None:
        """Wait until everything published is copied, so that its tensors may change.

        Raises ``StallError`` after ``timeout_s`` seconds, ``DapoError`` if the encoder ended.
        """
        started = time.monotonic()
        with self._news:
            while self._last_copied < self._last_given:
                self._threads[0].check()
                left = started + timeout_s - time.monotonic()
                if left <= 0:
                    raise StallError(
                        f"the learner waited {timeout_s:g} s for weights {self._last_given} to be copied before its "
                        "next optimizer step"
                    )
                self._news.wait(timeout=min(left, LOOK_S))
            self._count(blocked_s=time.monotonic() - started)

    def check(self) -> None:
        """Raise ``DapoError`` saying which thread ended and why, if one did."""
        for thread in self._threads:
            thread.check()

    def close(self, timeout_s: float = 10.0) -> None:
        """End both threads and close the socket. Raises ``StallError`` if a thread does not end in time."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._listener.wake()
        for thread in self._threads:
            thread.join(timeout_s)
        self._listener.close()

    # --- the encoder's thread -----------------------------------------------------------------------------

    def _encode(self) -> None:
        while (given := self._take()) is not None:
            infos = tensor_infos(given.tensors.items(), given.dtype)
            before = self._ready
            with self._news:
                serving = None if before is None else before.snapshot.buffer
                buffer = self._buffers.take(given.version, offsets_of(infos)[1], serving)
            self._buffers.gone.clear()
            snapshot = fill(buffer, given.version, given.tensors, infos, given.ready)
            with self._news:
                self._last_copied = given.version
                self._news.notify_all()
            del given  # and with it what holds the tensors
            ready = self._offer(snapshot, before)
            with self._news:
                self._ready = ready
                self._sends_ago += 1
                self._count(published=1, copy_s=snapshot.seconds)
            self._listener.wake()

    def _take(self) -> _PendingSet | None:
        with self._news:
            while self._waiting is None and not self._closing:
                self._news.wait(timeout=IDLE_S)
            given, self._waiting = self._waiting, None
            return None if self._closing else given

    def _offer(self, snapshot: Snapshot, before: Offer | None) -> Offer:
        with self._news:
            files, sends_ago = self._buffers.names, self._sends_ago
        deltas: tuple[Delta, ...] = ()
        # Made only if some worker has lately been sent what they can be applied to.
        if before is not None and self._way in ("auto", "delta") and sends_ago <= MAX_DELTAS:
            deltas = deltas_to(snapshot, before, self._max_message_bytes)
        return make_offer(snapshot, self.incarnation, deltas, files)

    # --- the publisher's thread ---------------------------------------------------------------------------

    def _serve(self) -> None:
        next_beat = time.monotonic() + self._heartbeat_s
        while not self._closing:
            received = self._listener.receive(max(0.0, next_beat - time.monotonic()))
            if received is not None:
                self._receive(*received)
            for peer in [peer for peer, request in self._parked.items() if self._is_news(request)]:
                self._push(peer, self._parked.pop(peer))
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._heartbeat_s
                self._beat()

    def _receive(self, peer: bytes, frames: list[memoryview]) -> None:
        try:
            message = self._codec.decode(frames)
            if not isinstance(message, WeightsRequest | WeightsReleased):
                raise ProtocolError("unexpected", f"{type(message).__name__} is not for a publisher")
        except ProtocolError as error:
            log.warning("refused a message on the weights socket: %s", error)
            self._count(refused=1)
            self._listener.send(peer, self._codec.encode(Refused(reason=error.reason, detail=error.detail)))
            return
        if isinstance(message, WeightsReleased):
            with self._news:
                self._buffers.release(message.reader, message.versions)
            return
        if message.unshared and message.worker not in self._unshared:
            self._unshared.add(message.worker)
            self._count(unshared=1)
            log.warning("worker %s gets its weights over the network: %s", message.worker, message.unshared)
        self._parked[peer] = message

    def _is_news(self, request: WeightsRequest) -> bool:
        ready = self._ready
        return ready is not None and (ready.version > request.have or request.incarnation != self.incarnation)

    def _push(self, peer: bytes, request: WeightsRequest) -> None:
        with self._news:  # what is sent cannot be written again from here on
            ready = self._ready
            assert ready is not None
            by, frames, num_bytes = ready.answer(request)
            new = by == "shm" and ready.snapshot.buffer.read_by(request.reader)
        if self._listener.send(peer, frames):
            with self._news:
                self._sends_ago = self._sends_ago if by == "shm" else 0
                self._count(sent_bytes=num_bytes, **{by: 1})
        else:
            self._count(undelivered=1)
            if new:
                with self._news:
                    self._buffers.release(request.reader, [ready.version])

    def _beat(self) -> None:
        unchanged = self._codec.encode(WeightsUnchanged())
        for peer in list(self._parked):
            if not self._listener.send(peer, unchanged):
                del self._parked[peer]
                self._count(undelivered=1)

    def _count(self, **more: float) -> None:
        with self._news:
            counts = self._counts._asdict()
            self._counts = PublisherCounts(**{name: value + more.get(name, 0) for name, value in counts.items()})
