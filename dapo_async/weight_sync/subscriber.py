"""A worker's end of the weights socket: fetches every newer set in the background and keeps the newest.

It owns the weights ``Dialer`` and one thread, which asks the publisher, checks what comes (incarnation, version,
sizes, digest) and asks again. What does not pass is refused, counted and asked for anew, whole. The worker takes the
newest set between two decode steps and never waits for one that is on its way.

The tensors of a set that came over the network are lent: their memory is the base that the next delta is applied to, in
place where nobody reads it any more, else to a copy. Those of a set in shared memory are the learner's own, and it is
told once the worker has let go of them all. Either way nobody may write to them, and none changes while it is held.
"""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from dapo_async.errors import ConfigError, ProtocolError, StallError, WeightsError
from dapo_async.system.background import Background
from dapo_async.transport.curve import DialerKeys
from dapo_async.transport.messages import (
    ON_WEIGHTS,
    Codec,
    Frame,
    Message,
    Refused,
    TensorInfo,
    WeightsDelta,
    WeightsPush,
    WeightsReleased,
    WeightsRequest,
    WeightsShared,
    WeightsUnchanged,
)
from dapo_async.transport.sockets import Dialer
from dapo_async.weight_sync.delta import apply_delta
from dapo_async.weight_sync.encoding import decode_weights
from dapo_async.weight_sync.lending import Lender
from dapo_async.weight_sync.shared_memory import SharedReader, Unreachable

log = logging.getLogger(__name__)

SEND_S = 1.0  # a fresh dialer always has room for one request
MAX_PATIENCE_S = 3600.0


class _Target(NamedTuple):
    """One learner. Compared by identity: the same learner asked for again is a new target."""

    address: str
    incarnation: str


class _Base(NamedTuple):
    """What a delta can be applied to."""

    version: int
    infos: list[TensorInfo]
    lenders: dict[str, Lender]

    def lend(self) -> dict[str, Tensor]:
        return {name: lender.lend() for name, lender in self.lenders.items()}


class Subscriber:
    """See the module. All methods may be called from any thread."""

    def __init__(
        self,
        address: str,
        *,
        worker: str,
        incarnation: str,
        max_message_bytes: int,
        heartbeat_s: float,
        keys: DialerKeys | None = None,
        grace_s: float = 30.0,
        retry_s: float = 0.5,
        on_arrival: Callable[[], None] | None = None,
    ) -> None:
        """Subscribe to the learner ``incarnation`` at ``address`` and begin to fetch.

        A publisher that is silent for ``3 * heartbeat_s + grace_s`` seconds is connected to anew. A set arrives as one
        message, so a slow network is silent too: this patience doubles each time it was in vain. A refused set is asked
        for again after ``retry_s`` seconds. ``on_arrival`` is called in the thread for each new set, so that a worker
        with nothing to decode can be woken (``Dialer.wake``) instead of looking again and again.
        """
        self.refusals: Counter[str] = Counter()  # by reason
        self._worker, self._reader = worker, secrets.token_hex(16)
        self._max_message_bytes, self._keys = max_message_bytes, keys
        self._first_patience_s = self._patience_s = 3 * heartbeat_s + grace_s
        self._retry_s = retry_s
        self._on_arrival = on_arrival
        self._codec = Codec(ON_WEIGHTS)
        self._arrived = threading.Condition()
        self._target = _Target(address, incarnation)
        self._have = -1
        self._base: _Base | None = None
        self._shared = SharedReader()
        self._unshared = ""  # why shared memory cannot be used here
        self._newest: tuple[int, dict[str, Tensor]] | None = None
        self._closing = False
        self._dialer: Dialer | None = None
        self._thread = Background("weights subscriber", self._run)
        self._thread.start()

    @property
    def refused(self) -> int:
        """Sets and messages refused since the start, for any reason."""
        return sum(self.refusals.values())

    @property
    def has_newer(self) -> bool:
        """Whether ``newest`` would return a set."""
        with self._arrived:
            return self._newest is not None

    def newest(self) -> tuple[int, dict[str, Tensor]] | None:
        """Version and tensors of the newest set, each set once; None if there is none newer. Never waits.

        The tensors are to be read, not written, and let go of once they are taken over.
        """
        if self._shared.has_released:  # another thread let go; this one may take the locks of a wake
            self._wake()
        with self._arrived:
            newest, self._newest = self._newest, None
            return newest

    def wait_first(self, timeout_s: float) -> tuple[int, dict[str, Tensor]]:
        """Wait for a set and take it as ``newest`` does.

        Raises ``StallError`` after ``timeout_s`` seconds and ``DapoError`` if the thread ended.
        """
        deadline = time.monotonic() + timeout_s
        while (newest := self.newest()) is None:
            self.check()
            with self._arrived:
                left = deadline - time.monotonic()
                if left <= 0:
                    refusals = ", ".join(f"{count} x {reason}" for reason, count in self.refusals.items()) or "none"
                    raise StallError(
                        f"worker {self._worker} waited {timeout_s:g} s for its first weights from "
                        f"{self._target.address}; refused so far: {refusals}"
                    )
                if self._newest is None:
                    self._arrived.wait(timeout=min(left, 1.0))
        return newest

    def restart(self, address: str, incarnation: str) -> None:
        """Forget what was fetched and subscribe to another learner, or to another life of this one."""
        with self._arrived:
            self._target = _Target(address, incarnation)
            self._newest = None
        self._wake()

    def check(self) -> None:
        """Raise ``DapoError`` saying why, if the thread ended."""
        self._thread.check()

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread and its socket. Raises ``StallError`` if it does not end in time."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        # A dialer made after this look is made by a thread that then looks at the target and at ``closing``.
        dialer = self._dialer
        if dialer is not None:
            dialer.wake()

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        target: _Target | None = None
        while not self._closing:
            if self._target is not target:
                target = self._target
                self._have = -1
                self._base, self._unshared = None, ""
                self._shared = SharedReader()  # what is still read of the former one is no news to the next
                self._patience_s = self._first_patience_s
            assert target is not None
            with Dialer(target.address, max_message_bytes=self._max_message_bytes, keys=self._keys) as dialer:
                self._dialer = dialer
                self._talk(dialer, target)

    def _talk(self, dialer: Dialer, target: _Target) -> None:
        """Ask and listen until the publisher is silent for too long, or nobody wants this target any more."""
        ask_at, give_up_at = time.monotonic(), float("inf")
        while not self._closing and self._target is target:
            if released := self._shared.released():
                dialer.send(self._codec.encode(WeightsReleased(reader=self._reader, versions=released)), SEND_S)
            now = time.monotonic()
            if now >= give_up_at:
                log.warning("no sign of life from %s for %g s: connecting anew", target.address, self._patience_s)
                self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S)
                return
            if now >= ask_at:
                dialer.send(self._codec.encode(self._request(target)), SEND_S)
                ask_at, give_up_at = float("inf"), now + self._patience_s
            frames = dialer.receive(min(ask_at, give_up_at) - now)
            if frames is None:
                dialer.handshakes.look()
                if dialer.handshakes.final:
                    raise ConfigError(f"{target.address} does not let this worker in: {dialer.handshakes.final}")
                continue
            pause_s = self._receive(frames, target)
            if pause_s is None:
                give_up_at = time.monotonic() + self._patience_s
            else:
                ask_at, give_up_at = time.monotonic() + pause_s, float("inf")

    def _request(self, target: _Target) -> WeightsRequest:
        base = -1 if self._base is None else self._base.version
        return WeightsRequest(
            worker=self._worker,
            reader=self._reader,
            incarnation=target.incarnation,
            have=self._have,
            base=base,
            unshared=self._unshared[:500],
        )

    def _receive(self, frames: list[memoryview], target: _Target) -> float | None:
        """Take in a message. Seconds until the next request may be sent; None if the one that is open stays open."""
        message: Message | None = None
        try:
            message = self._codec.decode(frames)
            if isinstance(message, WeightsUnchanged):
                return None
            push = self._check(message, target)
            tensors = self._tensors(push, frames[1:])
        except Unreachable as error:
            log.info("asks for weights over the network: %s", error)
            self._unshared = str(error)
            return 0.0
        except ProtocolError as error:
            if isinstance(message, WeightsShared):
                self._shared.let_go(message.version)
            return self._refuse(error.reason, error.detail)
        except WeightsError as error:
            if isinstance(message, WeightsShared):
                self._unshared = str(error)
            return self._refuse("mismatch", str(error))
        with self._arrived:
            if self._target is target:
                self._have = push.version
                self._newest = (push.version, tensors)
                self._arrived.notify_all()
        if self._on_arrival is not None:
            self._on_arrival()
        return 0.0

    def _tensors(self, push: WeightsPush | WeightsDelta | WeightsShared, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """The verified set. Raises ``Unreachable``, ``ProtocolError`` or ``WeightsError``."""
        if isinstance(push, WeightsShared):
            self._base = None
            return self._shared.read(push)
        if isinstance(push, WeightsPush):
            tensors = decode_weights(push, frames)
            lenders = {name: Lender(tensor) for name, tensor in tensors.items()}
            self._base = _Base(push.version, push.tensors, lenders)
            return self._base.lend()
        base, self._base = self._base, None  # of no set, should this delta not pass
        if base is None or base.version != push.base:
            raise ProtocolError("base", f"a delta from version {push.base} came, which is not kept here")
        kept = {name: lender.tensor for name, lender in base.lenders.items()}
        unread = {name for name, lender in base.lenders.items() if not lender.is_read}  # and only this thread lends
        tensors = apply_delta(push, frames, base.infos, kept, unread)
        # What stays in its memory stays with its lender, who knows who reads it as part of an older set.
        lenders = {
            name: base.lenders[name] if tensor is kept[name] else Lender(tensor) for name, tensor in tensors.items()
        }
        self._base = _Base(push.version, base.infos, lenders)
        return self._base.lend()

    def _check(self, message: Message, target: _Target) -> WeightsPush | WeightsDelta | WeightsShared:
        if isinstance(message, Refused):
            raise ProtocolError("request", f"the publisher refused the request: {message.reason}: {message.detail}")
        if not isinstance(message, WeightsPush | WeightsDelta | WeightsShared):
            raise ProtocolError("unexpected", f"{type(message).__name__} is not for a subscriber")
        if message.incarnation != target.incarnation:
            raise ProtocolError("incarnation", f"weights of learner {message.incarnation}, not of {target.incarnation}")
        if message.version <= self._have:
            raise ProtocolError("older", f"version {message.version} came after version {self._have}")
        return message

    def _refuse(self, reason: str, detail: str) -> float:
        log.warning("refused weights (%s): %s", reason, detail)
        self.refusals[reason] += 1
        self._base = None  # the next set comes whole
        return self._retry_s
