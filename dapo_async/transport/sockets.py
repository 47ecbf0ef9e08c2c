"""Sockets: one listener and many dialers exchange lists of frames, and nothing here knows what they mean.

It owns every ZeroMQ setting but encryption (``curve``), and the rule of who may listen where; ``messages`` owns what
is said. A socket belongs to the one thread that receives and sends on it; only ``wake`` may be called by others.

Every socket has a context, hence an I/O thread, of its own: bulk on the weights socket never delays control,
and closing one never waits for another. ZeroMQ's own heartbeats stay off, because a reply to them cannot
overtake a large frame; TCP keep-alive finds dead hosts, the messages' own heartbeats find dead processes.
"""

import contextlib
import errno
import math
import secrets
import socket
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

import zmq

from dapo_async.errors import ConfigError
from dapo_async.transport.addresses import check_address
from dapo_async.transport.curve import (
    WATCHED,
    DialerKeys,
    Gate,
    Handshakes,
    ListenerKeys,
    encrypt_dialer,
    encrypt_listener,
)

LINGER_MS = 500  # what a closing socket may spend on delivering what it still holds
UNBOUNDED = 0  # of a queue: for events, which would else stop the I/O thread that reports them
RECONNECT_MS = (50, 1000)  # first and longest pause between two attempts to connect
ZERO_COPY_BYTES = 1 << 16  # smaller frames are copied: cheaper than tracking them, and they pin no receive buffer

Frame = bytes | bytearray | memoryview


class Channel:
    """What ``Listener`` and ``Dialer`` share: a socket, waiting on it, being woken from that wait, closing it."""

    def __init__(self, kind: int, max_message_bytes: int, queue: int) -> None:
        self._context, self._socket = _open(kind, max_message_bytes, queue)
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._bell_lock = threading.Lock()
        self._incoming = zmq.Poller()
        self._incoming.register(self._socket, zmq.POLLIN)
        self._incoming.register(self._alarm.fileno(), zmq.POLLIN)

    def wake(self) -> None:
        """Make the current or else the next wait of ``receive`` end early. From any thread, also after ``close``."""
        # A full pipe means that the alarm is ringing already.
        with self._bell_lock, contextlib.suppress(BlockingIOError):
            if self._bell.fileno() >= 0:
                self._bell.send(b"!")

    def close(self) -> None:
        """Deliver for at most ``LINGER_MS`` what was sent, then let go of everything. A second call does nothing."""
        _shut(self._context, self._socket)
        with self._bell_lock:
            self._bell.close()
        self._alarm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self, events: int) -> zmq.Socket[bytes]:
        """A socket that tells what happens to this one's connections."""
        address = f"inproc://{secrets.token_hex(8)}"
        self._socket.monitor(address, events)
        monitor = _make(self._context, zmq.PAIR, max_message_bytes=1 << 16, queue=UNBOUNDED)
        monitor.connect(address)
        return monitor

    def _receive(self, timeout_s: float) -> list[zmq.Frame] | None:
        """The next message, or None after ``timeout_s`` or a wake."""
        frames = self._take()
        if frames is None and timeout_s > 0:
            ready = dict(self._incoming.poll(_milliseconds(timeout_s)))
            if self._alarm.fileno() in ready:
                self._silence_alarm()
            frames = self._take()
        return frames

    def _take(self) -> list[zmq.Frame] | None:
        with contextlib.suppress(zmq.Again):
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        return None

    def _silence_alarm(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._alarm.recv(4096):
                pass

    def _send(self, frames: Sequence[Frame]) -> bool:
        # Room made by the peer is noticed at most once a millisecond, unless one asks for the socket's events:
        # without that, a short queue looks full though all of it has long been delivered.
        if self._offer(frames):
            return True
        self._socket.getsockopt(zmq.EVENTS)
        return self._offer(frames)

    def _offer(self, frames: Sequence[Frame]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False, track=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
                return False
            raise
        return True


class Listener(Channel):
    """The learner's end of a socket: many peers, each with an identity of its own."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        insecure: bool = False,
        keys: ListenerKeys | None = None,
        queue: int = 1000,
        count_disconnects: bool = False,
    ) -> None:
        """Listen on ``address``, such as ``tcp://127.0.0.1:*`` (``*`` picks a free port).

        ``max_message_bytes`` bounds every frame: a peer that sends a larger one is disconnected (see
        ``disconnects``), the others are not disturbed. With ``keys`` all is encrypted and only whom they admit gets in.
        ``queue`` bounds the messages waiting per peer, each way. Raises ``ConfigError`` if the address is not well
        formed, is taken, is not of this machine, or is beyond loopback without ``keys`` or ``insecure``.
        """
        _check_listen(address, insecure or keys is not None)
        super().__init__(zmq.ROUTER, max_message_bytes, queue)
        self._gate: Gate | None = None
        if keys is not None:
            self._gate = Gate(_make(self._context, zmq.REP, max_message_bytes=1 << 16, queue=UNBOUNDED), keys.admits)
            self._incoming.register(self._gate.socket, zmq.POLLIN)
            encrypt_listener(self._socket, keys)
        # A peer that is gone or slow is reported by send; one that reconnects takes its place over.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._disconnects = 0
        self._monitor = self._watch(zmq.EVENT_DISCONNECTED) if count_disconnects else None
        try:
            self._socket.setsockopt(zmq.IPV6, int("[" in address))
            self._socket.bind(address.replace("//localhost:", "//127.0.0.1:"))
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f'cannot listen on "{address}": {_bind_advice(error)}') from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """As ``Channel`` says."""
        if self._monitor is not None:
            self._monitor.close()
        if self._gate is not None:
            self._gate.socket.close()
        super().close()

    def disconnects(self) -> int:
        """Connections that have ended until now: of a peer that left, of a network that broke, and of a peer that was
        cut off because its frame was larger than ``max_message_bytes``. ZeroMQ does not tell which."""
        with contextlib.suppress(zmq.Again):
            while self._monitor is not None and self._monitor.recv_multipart(zmq.DONTWAIT):
                self._disconnects += 1
        return self._disconnects

    def receive(self, timeout_s: float) -> tuple[bytes, list[memoryview]] | None:
        """Sender and frames of the next message; None after ``timeout_s`` seconds or a ``wake``.

        The frames stay valid as long as they are referenced.
        """
        frames = self._receive(timeout_s)
        if self._gate is not None:
            self._gate.answer()
        return None if frames is None else (frames[0].bytes, [_view(frame) for frame in frames[1:]])

    def send(self, peer: bytes, frames: Iterable[Frame]) -> bool:
        """Queue a message; False if ``peer`` is gone or its queue is full. Never waits.

        Large frames are not copied and must not change until they have been sent.
        """
        return self._send([peer, *frames])


class Dialer(Channel):
    """A worker's end of a socket. It connects, and reconnects, by itself and in the background."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        keys: DialerKeys | None = None,
        identity: bytes | None = None,
        queue: int = 1000,
    ) -> None:
        """Connect to a ``Listener``; it need not be there yet.

        With ``keys`` all is encrypted, and nobody is talked to but the listener that they name. ``identity`` is random
        unless given. The bounds are those of ``Listener``. Raises ``ConfigError`` if ``address`` is not well formed.
        """
        super().__init__(zmq.DEALER, max_message_bytes, queue)
        self.handshakes = Handshakes(self._watch(WATCHED), encrypted=keys is not None)
        self._outgoing = zmq.Poller()
        self._outgoing.register(self._socket, zmq.POLLOUT)
        if keys is not None:
            encrypt_dialer(self._socket, keys)
        try:
            self._socket.setsockopt(zmq.ROUTING_ID, identity or b"\x01" + secrets.token_bytes(15))
            self._socket.setsockopt(zmq.IPV6, int("[" in address))
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f'cannot connect to "{address}": {error.strerror}; an address looks like "tcp://127.0.0.1:5555"'
            ) from None

    def close(self) -> None:
        """As ``Channel`` says."""
        self.handshakes.close()
        super().close()

    def receive(self, timeout_s: float) -> list[memoryview] | None:
        """Frames of the next message, valid while referenced; None after ``timeout_s`` seconds or a ``wake``."""
        frames = self._receive(timeout_s)
        return None if frames is None else [_view(frame) for frame in frames]

    def send(self, frames: Iterable[Frame], timeout_s: float) -> bool:
        """Queue a message, waiting at most ``timeout_s`` seconds for room; False if there is none.

        It is delivered once connected. Large frames are not copied and must not change until they have been sent.
        """
        frames = list(frames)
        return self._send(frames) or (bool(self._outgoing.poll(_milliseconds(timeout_s))) and self._send(frames))


def _open(kind: int, max_message_bytes: int, queue: int) -> tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]:
    context = zmq.Context()
    return context, _make(context, kind, max_message_bytes, queue)


def _make(context: zmq.Context[zmq.Socket[bytes]], kind: int, max_message_bytes: int, queue: int) -> zmq.Socket[bytes]:
    """The one place where a socket is made."""
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, LINGER_MS)
    made.setsockopt(zmq.SNDHWM, queue)
    made.setsockopt(zmq.RCVHWM, queue)
    # Every wait has its own deadline; these bound the one that somebody forgets.
    made.setsockopt(zmq.SNDTIMEO, 1000)
    made.setsockopt(zmq.RCVTIMEO, 1000)
    made.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    made.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    made.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    made.copy_threshold = ZERO_COPY_BYTES
    return made


def _shut(context: zmq.Context[zmq.Socket[bytes]], made: zmq.Socket[bytes]) -> None:
    """Close a socket and end its context; bounded by the socket's linger."""
    made.close()
    context.term()


def _milliseconds(seconds: float) -> int:
    """Rounded up, so that the last fraction of a wait is slept through, not spun through."""
    return max(0, math.ceil(seconds * 1000))


def _view(frame: zmq.Frame) -> memoryview:
    return frame.buffer if len(frame) >= ZERO_COPY_BYTES else memoryview(frame.bytes)


def _check_listen(address: str, permitted: bool) -> None:
    try:
        check_address("the address", address, permitted)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _bind_advice(error: zmq.ZMQError) -> str:
    advice: dict[int | None, str] = {
        errno.EADDRINUSE: "another process listens there; choose another port, or * for a free one",
        errno.ENODEV: "this machine has no such address",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EACCES: "this user may not listen there; choose a port above 1023",
    }
    return advice.get(error.errno, error.strerror)
