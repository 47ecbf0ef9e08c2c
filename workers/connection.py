"""A worker's end of the control socket: knocking until the learner answers, messages in and out.

For one thread; only ``wake`` may be called by others.
"""

import ipaddress
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

from dapo_async.errors import ConfigError, DapoError, ProtocolError, StallError
from dapo_async.transport.curve import DialerKeys
from dapo_async.transport.messages import (
    FROM_LEARNER,
    FROM_WORKER,
    NAME_TAKEN,
    PROOF,
    Codec,
    Hello,
    Message,
    Refused,
    Stop,
    Welcome,
)
from dapo_async.transport.sockets import Dialer

log = logging.getLogger("worker")
MAX_FRAME_BYTES = 1 << 30
KNOCK_S = 300.0  # how long to knock before giving up
KNOCK_EVERY_S = 1.0
LISTEN_S = 0.25  # between two looks at whether this worker was asked to end
SEND_S = 5.0
KEYS = "dapo-async keys makes keys, work --keys FOLDER uses them, and the learner's folder lists who may connect"
BROKEN_OFF = "the handshake was broken off: this may be another learner than learner.public in --keys names"


class Connection:
    """See the module. It reconnects by itself, so it outlives a learner."""

    def __init__(self, address: str, name: str, keys: DialerKeys | None = None) -> None:
        self._address = address
        self._name = name
        self._dialer = Dialer(address, max_message_bytes=MAX_FRAME_BYTES, keys=keys)
        self._incoming, self._outgoing = Codec(FROM_LEARNER), Codec(FROM_WORKER)
        self.wake = self._dialer.wake
        self.close = self._dialer.close
        self._encrypted, self._told = keys is not None, False  # told: that a handshake was broken off
        self._unreadable = ""  # why the last message that nobody could read was dropped

    def knock(self, asked_to_end: Callable[[], bool]) -> Welcome | None:
        """Say hello until the learner answers; leases are not asked for yet. None if ``asked_to_end()`` comes first.

        Raises ``DapoError`` if it says stop, ``ConfigError`` as ``messages`` does, ``StallError`` after ``KNOCK_S``
        seconds of silence.
        """
        log.info("worker %s is waiting for a learner at %s", self._name, self._address)
        started, next_knock = time.monotonic(), 0.0
        while not asked_to_end():
            now = time.monotonic()
            if now - started > KNOCK_S:
                waited = f"worker {self._name} waited {KNOCK_S:g} s for a learner at {self._address}"
                raise StallError(waited + (f"; {BROKEN_OFF}" if self._broken_off else ""))
            if now >= next_knock:
                next_knock = now + KNOCK_EVERY_S
                self.introduce(engine="", capacity=0, version=-1)
            for message in self.messages(timeout_s=LISTEN_S):
                if isinstance(message, Welcome):
                    return message
                if isinstance(message, Refused):
                    raise self._misdirected(f"{message.detail} ({message.reason})")
                if isinstance(message, Stop):
                    raise DapoError(f"the learner at {self._address} says stop: {message.reason}")
            if self._unreadable:
                raise self._misdirected(self._unreadable)
        return None

    def _misdirected(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self._address} refuses this worker: {reason}; --connect must name the learner's "
            "network.control, and both need the same release"
        )

    def introduce(self, **facts: Any) -> None:
        """Say ``Hello`` with these facts."""
        proof = os.environ.get(PROOF, "")
        self.send(Hello(worker=self._name, pid=os.getpid(), host=platform.node()[:255], proof=proof, **facts))

    def messages(self, timeout_s: float) -> Iterator[Message]:
        """What has arrived; waits up to ``timeout_s`` for the first. What nobody can read is logged and dropped.

        Raises ``ConfigError`` if the learner does not let this worker in, or knows another of this name.
        """
        frames = self._dialer.receive(timeout_s)
        if frames is None:
            self._check_handshakes()
        while frames is not None:
            try:
                message = self._incoming.decode(list(frames))
            except ProtocolError as error:
                log.error("message from the learner dropped: %s", error)
                self._unreadable = str(error)
            else:
                if isinstance(message, Refused) and message.reason == NAME_TAKEN:
                    raise ConfigError(f"the learner at {self._address} refuses worker {self._name}: {message.detail}")
                if isinstance(message, Welcome):
                    message.weights_address = seen_from_here(message.weights_address, self._address)
                yield message
            frames = self._dialer.receive(0.0)

    def _check_handshakes(self) -> None:
        handshakes = self._dialer.handshakes
        handshakes.look()
        if handshakes.final:
            raise ConfigError(f"the learner at {self._address} does not let this worker in: {handshakes.final}; {KEYS}")
        if self._broken_off and not self._told:
            self._told = True
            log.warning("%s: %s", self._address, BROKEN_OFF)

    @property
    def _broken_off(self) -> bool:
        """Whether the other end breaks off handshakes without a word, as a learner of other keys does."""
        return self._encrypted and self._dialer.handshakes.dropped > 0

    def send(self, message: Message) -> None:
        """Hand a message to the socket. What it does not take is logged; groups are sent again by ``rollout``."""
        if not self._dialer.send(self._outgoing.encode(message), timeout_s=SEND_S):
            log.warning("the learner does not take messages (%s not sent)", type(message).__name__)


def seen_from_here(address: str, connected_to: str) -> str:
    """``address``, as the learner knows it, for a worker that reached this learner at ``connected_to``.

    A wildcard or loopback host means the learner's own machine: seen from another one, that is the host of
    ``connected_to``. Both are ``tcp://host:port``; the port stays.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    learner, _, _ = connected_to.removeprefix("tcp://").rpartition(":")
    return f"tcp://{learner}:{port}" if _means_itself(host) and not _means_itself(learner) else address


def _means_itself(host: str) -> bool:
    if host in ("*", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False  # a name
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return ip.is_unspecified or ip.is_loopback or (mapped is not None and (mapped.is_unspecified or mapped.is_loopback))
