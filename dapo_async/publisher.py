"""The learner's end of the weights socket: serves the newest published set to every worker that asks.

It owns the weights ``Listener`` and two threads: one encodes and digests what the learner publishes, the other
answers requests. ``publish`` only leaves the newest set for the first, so training never waits for the network,
and a slow worker skips versions instead of queueing them. A worker has one open request and gets one answer to
it, so at most one set is on its way to each. The learner calls ``check`` regularly.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from dapo_async.background import Background
from dapo_async.channels import Frame, Listener
from dapo_async.errors import ConfigError, ProtocolError, WeightsError
from dapo_async.protocol import ON_WEIGHTS, Codec, Refused, WeightsRequest, WeightsUnchanged
from dapo_async.weights import encode_weights

log = logging.getLogger(__name__)

QUEUE = 4  # messages per worker: an answer on its way, and signs of life
IDLE_S = 60.0  # longest sleep of the encoder; it is notified, so this bounds nothing but a lost notification


class PublisherCounts(NamedTuple):
    """Totals since the start."""

    published: int  # sets that became ready to serve
    superseded: int  # sets replaced by a newer one before they were encoded
    pushes: int  # sets handed to the network, over all workers
    pushed_bytes: int
    undelivered: int  # answers to workers that had gone
    refused: int  # messages that were no acceptable request
    encode_s: float  # wall seconds of encoding and digesting


class _Ready(NamedTuple):
    version: int
    frames: list[Frame]
    num_bytes: int


class Publisher:
    """See the module. All methods may be called from any thread."""

    def __init__(
        self, address: str, *, incarnation: str, max_message_bytes: int, heartbeat_s: float, insecure: bool = False
    ) -> None:
        """Listen on ``address`` and begin to serve. Raises ``ConfigError`` as ``Listener`` does."""
        self.incarnation = incarnation
        self._heartbeat_s = heartbeat_s
        self._max_message_bytes = max_message_bytes
        self._listener = Listener(address, max_message_bytes=max_message_bytes, insecure=insecure, queue=QUEUE)
        self._codec = Codec(ON_WEIGHTS)
        self._pushed_versions: dict[str, int] = {}
        self._parked: dict[bytes, WeightsRequest] = {}
        self._news = threading.Condition()
        self._waiting: tuple[int, Mapping[str, Tensor]] | None = None
        self._last_given = -1
        self._ready: _Ready | None = None
        self._closing = False
        self._counts = PublisherCounts(0, 0, 0, 0, 0, 0, 0.0)
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
    def num_bytes(self) -> int:
        """Size of the newest version that workers can fetch."""
        ready = self._ready
        return 0 if ready is None else ready.num_bytes

    @property
    def counts(self) -> PublisherCounts:
        """Totals since the start."""
        return self._counts

    @property
    def pushed_versions(self) -> dict[str, int]:
        """By worker's name: the last version that was sent to it."""
        return dict(self._pushed_versions)

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Leave a set for the encoder and return at once; a set still waiting there is superseded.

        The tensors must be copies that nobody changes (``weights.serving_tensors``). Raises ``WeightsError`` if
        ``version`` does not rise, ``ConfigError`` if a tensor is larger than a frame may be.
        """
        for name, tensor in tensors.items():
            if tensor.nbytes > self._max_message_bytes:
                raise ConfigError(
                    f"network.max_message_mb = {self._max_message_bytes >> 20} is too small for the weights: "
                    f"{name} has {tensor.nbytes / (1 << 20):.1f} MiB"
                )
        with self._news:
            if version <= self._last_given:
                raise WeightsError(f"versions must rise: {version} was published after {self._last_given}")
            if self._waiting is not None:
                self._count(superseded=1)
            self._last_given = version
            self._waiting = (version, tensors)
            self._news.notify()

    def check(self) -> None:
        """Raise ``DapoError`` saying which thread ended and why, if one did."""
        for thread in self._threads:
            thread.check()

    def close(self, timeout_s: float = 10.0) -> None:
        """End both threads and close the socket. Raises ``StallError`` if a thread does not end in time."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._listener.wake()
        for thread in self._threads:
            thread.join(timeout_s)
        self._listener.close()

    # --- the encoder's thread -----------------------------------------------------------------------------

    def _encode(self) -> None:
        while (given := self._take()) is not None:
            version, tensors = given
            started = time.monotonic()
            push, frames = encode_weights(version, tensors, self.incarnation)
            # A codec of its own: the other one belongs to the thread that serves.
            head = Codec(ON_WEIGHTS).encode(push)
            self._ready = _Ready(version, [*head, *frames], sum(frame.nbytes for frame in frames))
            self._count(published=1, encode_s=time.monotonic() - started)
            self._listener.wake()

    def _take(self) -> tuple[int, Mapping[str, Tensor]] | None:
        with self._news:
            while self._waiting is None and not self._closing:
                self._news.wait(timeout=IDLE_S)
            given, self._waiting = self._waiting, None
            return None if self._closing else given

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
            request = self._codec.decode(frames)
            if not isinstance(request, WeightsRequest):
                raise ProtocolError("unexpected", f"{type(request).__name__} is not for a publisher")
        except ProtocolError as error:
            log.warning("refused a message on the weights socket: %s", error)
            self._count(refused=1)
            self._listener.send(peer, self._codec.encode(Refused(reason=error.reason, detail=error.detail)))
        else:
            self._parked[peer] = request

    def _is_news(self, request: WeightsRequest) -> bool:
        ready = self._ready
        return ready is not None and (ready.version > request.have or request.incarnation != self.incarnation)

    def _push(self, peer: bytes, request: WeightsRequest) -> None:
        ready = self._ready
        assert ready is not None
        if self._listener.send(peer, ready.frames):
            self._pushed_versions[request.worker] = ready.version
            self._count(pushes=1, pushed_bytes=ready.num_bytes)
        else:
            self._count(undelivered=1)

    def _beat(self) -> None:
        unchanged = self._codec.encode(WeightsUnchanged(version=self.published))
        for peer in list(self._parked):
            if not self._listener.send(peer, unchanged):
                del self._parked[peer]
                self._count(undelivered=1)

    def _count(self, **more: float) -> None:
        with self._news:
            counts = self._counts._asdict()
            self._counts = PublisherCounts(**{name: value + more.get(name, 0) for name, value in counts.items()})
