"""Who the hub talks to, and as whom: a connected worker, and one life of a run."""

from typing import NamedTuple

from dapo_async.protocol import Beat, Hello


class Peer:
    """A connected worker."""

    def __init__(self, identity: bytes, hello: Hello, now: float) -> None:
        self.identity = identity
        self.name = hello.worker
        self.engine = hello.engine
        self.capacity = hello.capacity
        self.version = hello.version
        self.last_seen = now
        self.leases: set[tuple[str, int]] = set()  # (kind, number) it holds
        self.refusals = 0
        self.beat = Beat(version=hello.version, running=0)


class Incarnation(NamedTuple):
    """One life of one run: a run that is resumed keeps its ``run_id``; every process of it is a life of its own."""

    run_id: str
    life: str

    @property
    def name(self) -> str:
        """How it is written on leases."""
        return f"{self.run_id}.{self.life}"
