"""How long a lease may take before its worker is suspected of never answering it.

Judged by what leases took lately in this very run, of all workers, from the moment at which they could begin: a lease
that waits for newer weights has not begun, until some worker serves them. Pure bookkeeping; time is an argument.
"""

import math
from collections import deque

from dapo_async.coordinator.workers import ConnectedWorker
from dapo_async.transport.messages import Key

RECENT = 256  # leases that are remembered
FEWEST = 16  # below which nobody is suspected
FACTOR = 3.0  # times the longest recent one


class Patience:
    """See the module. ``least_s``: nobody is suspected earlier, in seconds."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def limit_s(self) -> float:
        """Age at which a lease is suspect; infinite as long as too few have been answered."""
        if len(self._recent) < FEWEST:
            return math.inf
        return max(self._least_s, FACTOR * max(self._recent))

    def answered(self, worker: ConnectedWorker, key: Key, now: float) -> None:
        """``worker`` has answered this lease."""
        began = worker.began.get(key, worker.given_up.get(key))
        if began is not None:
            self._recent.append(now - began)

    def suspects(self, worker: ConnectedWorker, now: float) -> list[int]:
        """Training leases that ``worker`` should have answered long ago, the oldest first."""
        late = [key for key, began in worker.began.items() if now - began > self.limit_s]
        return sorted(lease for kind, lease in late if kind == "train")
