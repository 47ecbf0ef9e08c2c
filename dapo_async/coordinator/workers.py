"""Who the coordinator talks to, and as whom: a connected worker, how far behind workers are, one life of a run."""

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dapo_async.config.settings import Config
from dapo_async.errors import ProtocolError
from dapo_async.transport.messages import NAME_TAKEN, Beat, Hello, Key, Kind


class ConnectedWorker:
    """A connected worker."""

    def __init__(self, identity: bytes, hello: Hello, now: float) -> None:
        self.identity = identity
        self.name = hello.worker
        self.process = f"process {hello.pid} of {hello.host}"
        self.capacity = hello.capacity
        self.version = hello.version
        self.last_seen = now
        self.silent_s = 0.0  # as of the last heartbeat, once it is lost
        self.leases: dict[Key, float] = {}  # what it holds, and since when, in monotonic seconds; see ``take``
        self.num_held: dict[Kind, int] = {"train": 0, "eval": 0}
        self.began: dict[Key, float] = {}  # of those, the ones that its weights may answer, and since when
        self.given_up: dict[Key, float] = {}  # leases that others got because it took too long, and when they began
        self.min_versions: dict[Key, int] = {}
        self.refusals = 0  # in a row
        self.suspected = False  # it has left a lease unanswered for too long; it gets none until it answers one
        self.beat = Beat(version=hello.version, running=0, holding=[])

    def holds(self, kind: Kind) -> list[int]:
        """Numbers of the leases of this kind that it holds, rising."""
        return sorted(lease for own, lease in self.leases if own == kind)

    def name_taken(self) -> ProtocolError:
        """Why nobody else of its name may join while it is connected."""
        return ProtocolError(
            NAME_TAKEN,
            f"a worker named {self.name} is connected already ({self.process}): start this one under another --name, "
            "or end that one first",
        )

    def patience_s(self, config: Config) -> float:
        """How long it may be silent. While it loads its model (capacity 0) it cannot beat."""
        return config.network.silence_s if self.capacity else config.workers.start_timeout_s

    def standing(self, now: float) -> str:
        """What it does, for a report."""
        return (
            f"worker {self.name}: last heard {now - self.last_seen:.1f} s ago, weights {self.version}, "
            f"{len(self.leases)} leases, decoding {self.beat.running}"
        )

    def take(self, kind: Kind, leases: Mapping[int, int], now: float) -> None:
        """It holds these leases from now on; ``leases`` says which weights they need at least."""
        for lease, min_version in leases.items():
            key = kind, lease
            self.num_held[kind] += key not in self.leases
            self.leases[key] = now
            self.min_versions[key] = min_version
        self.look_at_clock(now)

    def forget(self, kind: Kind, leases: Iterable[int]) -> None:
        """It holds these leases no more."""
        for lease in leases:
            self.num_held[kind] -= self.leases.pop((kind, lease), None) is not None
            self.began.pop((kind, lease), None)
            self.given_up.pop((kind, lease), None)
            self.min_versions.pop((kind, lease), None)

    def give_up(self, kind: Kind, lease: int) -> None:
        """Another worker gets this lease; should this one answer it yet, that tells how long its leases take."""
        began = self.began[kind, lease]
        self.forget(kind, [lease])
        self.given_up[kind, lease] = began

    def forgive(self, seconds: float) -> None:
        """Nobody listened for so long: that was not its silence."""
        self.last_seen += seconds
        self.began = {key: began + seconds for key, began in self.began.items()}
        self.given_up = {key: began + seconds for key, began in self.given_up.items()}

    def restart_clocks(self, now: float) -> None:
        """No lease that it holds has begun before now: it had something else to do."""
        self.began = dict.fromkeys(self.began, now)
        self.given_up = dict.fromkeys(self.given_up, now)

    def look_at_clock(self, now: float, served: int = -1) -> None:
        """Note which leases its weights may answer from now on, or those ``served`` by another worker."""
        for key, min_version in self.min_versions.items():
            if min_version <= max(self.version, served):
                self.began.setdefault(key, now)

    def mislaid(self, holding: Iterable[Key], before: float) -> list[Key]:
        """Leases given to it before this time that it does not hold: a broken connection has swallowed them."""
        held = set(holding)
        return [key for key, since in self.leases.items() if since < before and key not in held]


class PublishLag:
    """Seconds from publishing a version until all workers serve it."""

    def __init__(self) -> None:
        self.seconds: float | None = None  # of the newest version that all workers have come to serve
        self._unserved: dict[int, float] = {}  # versions some worker does not serve yet, and when they were published

    def published(self, version: int) -> None:
        """Workers can fetch this version from now on."""
        self._unserved[version] = time.monotonic()

    def served(self, workers: Iterable[ConnectedWorker]) -> None:
        """Look at what the workers serve now; those that still load their model do not count."""
        oldest = min((worker.version for worker in workers if worker.capacity), default=-1)
        for version in [v for v in self._unserved if v <= oldest]:
            self.seconds = time.monotonic() - self._unserved.pop(version)


class Incarnation(NamedTuple):
    """One life of one run: a run that is resumed keeps its ``run_id``; every process of it is a life of its own."""

    run_id: str
    life: str

    @property
    def name(self) -> str:
        """How it is written on leases."""
        return f"{self.run_id}.{self.life}"
