"""Encryption of a socket (CURVE, ZeroMQ's RFC 26), and who may connect to it (ZAP, RFC 27).

Owned here: key pairs, what they set on a socket, the answer to each newcomer's key, and what a failed handshake means
to a worker. Not owned: the sockets themselves (``sockets``) and the files that keep the pairs (``keys``). Both ends
prove who they are: a worker connects to no learner but the one whose public key it has, and a learner admits no worker
that it has not been told of. Whoever reads the wire learns lengths and times, nothing else, and recorded traffic stays
secret even if the long-term keys are stolen later.
"""

import contextlib
import logging
import struct
from collections.abc import Callable
from typing import NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"  # within the listener's context, as RFC 27 wants it
KEY_CHARACTERS, KEY_BYTES = 40, 32
ENCRYPTION_BYTES = 256  # more than it adds to a frame
MAX_NAMED = 100  # strangers that are named in the log, so that nobody can fill it
WATCHED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

Socket = zmq.Socket[bytes]


class KeyPair(NamedTuple):
    """Long-term keys of one end, each 40 characters (Z85)."""

    public: bytes
    secret: bytes


class ListenerKeys(NamedTuple):
    """What a listener needs."""

    own: KeyPair
    admits: Callable[[bytes], bool]  # whether the owner of this public key may connect; asked at every handshake


class DialerKeys(NamedTuple):
    """What a dialer needs."""

    own: KeyPair
    listener: bytes  # public key of whom it means to talk to


def new_pair() -> KeyPair:
    """A fresh random pair."""
    return KeyPair(*zmq.curve_keypair())


def public_of(secret: bytes) -> bytes:
    """The public key that belongs to ``secret``. Raises ``ValueError`` if that is no key."""
    try:
        return bytes(zmq.curve_public(secret))
    except zmq.ZMQError as error:
        raise ValueError(f"no secret key ({error.strerror})") from None


def is_key(key: bytes) -> bool:
    """Whether this may be a key: 40 characters of Z85 that stand for 32 bytes."""
    try:
        return len(key) == KEY_CHARACTERS and len(z85.decode(key)) == KEY_BYTES
    except (KeyError, ValueError, struct.error):
        return False


def encrypt_listener(socket: Socket, keys: ListenerKeys) -> None:
    """Before ``bind``: talk to nobody who is not encrypted and admitted."""
    _make_room(socket)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)


def encrypt_dialer(socket: Socket, keys: DialerKeys) -> None:
    """Before ``connect``: talk to nobody but the owner of ``keys.listener``."""
    _make_room(socket)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.listener)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)


def _make_room(socket: Socket) -> None:
    """The limit of a frame is meant for what it says, not for how it travels."""
    limit = socket.getsockopt(zmq.MAXMSGSIZE)
    assert isinstance(limit, int)
    socket.setsockopt(zmq.MAXMSGSIZE, limit + ENCRYPTION_BYTES)


class Gate:
    """Asked by ZeroMQ about each newcomer, answered in the listener's own thread, which polls ``socket``."""

    def __init__(self, socket: Socket, admits: Callable[[bytes], bool]) -> None:
        """``socket``: a fresh REP of the listener's context. Must stand before the listener binds."""
        self.socket = socket
        self._admits = admits
        self._strangers: set[bytes] = set()
        socket.bind(ZAP_ADDRESS)

    def answer(self) -> None:
        """Let in or turn away whoever waits."""
        with contextlib.suppress(zmq.Again):
            while True:
                request = self.socket.recv_multipart(zmq.DONTWAIT)
                self.socket.send_multipart(self._reply(request), zmq.DONTWAIT)

    def _reply(self, request: list[bytes]) -> list[bytes]:
        version, number, _domain, address, _identity, mechanism, *credentials = request
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" else b""
        if key and self._admits(key):
            return [version, number, b"200", b"OK", key, b""]
        if key not in self._strangers and len(self._strangers) < MAX_NAMED:
            self._strangers.add(key)
            log.warning("refused a connection from %s: its key %s is on no list", address.decode(), key.decode())
        return [version, number, b"400", b"unknown key", b"", b""]


class Handshakes:
    """Why a dialer cannot talk to its listener, as far as ZeroMQ tells."""

    def __init__(self, socket: Socket, *, encrypted: bool) -> None:
        """``socket``: a PAIR connected to the dialer's monitor."""
        self._socket = socket
        self._encrypted = encrypted
        self.final = ""  # why ZeroMQ has given up; it does not try again after that
        self.dropped = 0  # handshakes that the other end broke off without a word

    def look(self) -> None:
        """Take in what has happened."""
        with contextlib.suppress(zmq.Again):
            while True:
                happened = parse_monitor_message(self._socket.recv_multipart(zmq.DONTWAIT))
                if happened["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    self.dropped += 1
                elif happened["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self.final = "it does not know this worker's key"
                elif self._encrypted:
                    self.final = "it does not encrypt, and this worker was given keys"
                else:
                    self.final = "it encrypts, and this worker was given no keys"

    def close(self) -> None:
        """Let go of the monitor."""
        self._socket.close()
