"""A worker's end of the control socket: knocking until the learner answers, messages in and out.

Owned and used by ``rollout``, in its one thread; only ``wake`` may be called by others.
"""

import logging
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

from dapo_async.channels import Dialer
from dapo_async.errors import DapoError, ProtocolError, StallError
from dapo_async.protocol import FROM_LEARNER, FROM_WORKER, Codec, Hello, Message, Stop, Welcome

log = logging.getLogger("worker")
MAX_FRAME_BYTES = 1 << 30
KNOCK_S = 300.0  # how long to knock before giving up
SEND_S = 5.0


class Connection:
    """See the module. It reconnects by itself, so it outlives a learner."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._name = name
        self._dialer = Dialer(address, max_message_bytes=MAX_FRAME_BYTES)
        self._incoming, self._outgoing = Codec(FROM_LEARNER), Codec(FROM_WORKER)
        self.wake = self._dialer.wake
        self.close = self._dialer.close

    def knock(self) -> Welcome:
        """Say hello until the learner answers; leases are not asked for yet.

        Raises ``DapoError`` if it says stop, ``StallError`` after ``KNOCK_S`` seconds of silence.
        """
        deadline = time.monotonic() + KNOCK_S
        while time.monotonic() < deadline:
            self.introduce(engine="", capacity=0, version=-1)
            for message in self.messages(timeout_s=1.0):
                if isinstance(message, Welcome):
                    return message
                if isinstance(message, Stop):
                    raise DapoError(f"the learner at {self._address} says stop: {message.reason}")
        raise StallError(f"worker {self._name} waited {KNOCK_S:.0f} s for a learner at {self._address}")

    def introduce(self, **facts: Any) -> None:
        """Say ``Hello`` with these facts."""
        self.send(Hello(worker=self._name, pid=os.getpid(), host=platform.node(), **facts))

    def messages(self, timeout_s: float) -> Iterator[Message]:
        """What has arrived; waits up to ``timeout_s`` for the first. What nobody can read is logged and dropped."""
        frames = self._dialer.receive(timeout_s)
        while frames is not None:
            try:
                yield self._incoming.decode(list(frames))
            except ProtocolError as error:
                log.error("message from the learner dropped: %s", error)
            frames = self._dialer.receive(0.0)

    def send(self, message: Message) -> None:
        """Hand a message to the socket. What it does not take is logged; groups are sent again by ``rollout``."""
        if not self._dialer.send(self._outgoing.encode(message), timeout_s=SEND_S):
            log.warning("the learner does not take messages (%s not sent)", type(message).__name__)
