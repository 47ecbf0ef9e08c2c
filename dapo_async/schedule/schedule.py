"""The asynchronous logic as one pure, single-threaded state machine: no socket, thread, file or clock.

It owns leases, staleness admission, deduplication, the dynamic-sampling filter, the buffer, batch formation and
the accounting. ``coordinator`` drives it with ZeroMQ, the property tests with chaos. Promises, after every call:

* ``leased = in_flight + buffered + trained + filtered + expired`` (a drawn batch counts as buffered until trained);
* ``in_flight + buffered < (η + 1) · B`` whenever a lease is issued (``oversample`` multiplies what is not drawn);
* every lease is settled once: a second answer is a ``duplicate``;
* under ``straggler = "wait"`` no group is drawn whose oldest token is more than η versions old.

How the bound is kept. With m groups outstanding at version v, a new lease is trained by version v + ⌊m / B⌋ at the
latest, so it may start with weights ``v + ⌊m / B⌋ - η`` or newer: that is its ``min_version``. Its deadline is its
oldest version + η, so every lease's deadline lies at or behind its place in the queue: earliest-deadline-first
always has a feasible order, and a batch is drawn only if what is left can still be trained in time.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.schedule.buffer import Census, Entry, PriorityBuffer
from dapo_async.schedule.deadlines import (
    Due,
    LeaseRecord,
    capacity_of,
    choose,
    is_short,
    missing_of,
    needs_of,
    surplus_of,
)
from dapo_async.schedule.dynamic_sampling import filter_reason

Cause = Literal["generation", "straggler", "publish", "workers"]  # why a learner waits
CAUSES: tuple[Cause, ...] = get_args(Cause)
Outcome = Literal["accepted", "filtered_all_right", "filtered_all_wrong", "duplicate", "unknown_lease", "too_old"]
SETTLED = ("trained", "filtered_all_right", "filtered_all_wrong", "expired")


class Batch(NamedTuple):
    """B groups drawn together, in lease order."""

    entries: list[Entry]
    version: int  # the learner's, when drawn
    late: int  # how many of them miss the staleness bound
    cancelled: list[LeaseRecord]  # leases expired to keep the bound; their workers should stop


class Wait(NamedTuple):
    """Why no batch can be drawn."""

    cause: Literal["generation", "straggler", "exhausted"]
    leases: list[int]  # those that are waited for by name


class Schedule:
    """See the module. Versions count trained batches; ``now`` is any clock in seconds."""

    def __init__(self, config: ScheduleConfig, num_prompts: int | None = None) -> None:
        """``num_prompts`` is the length of the prompt stream, None if endless."""
        self.config = config
        self.batch_size = config.groups_per_batch
        self.bound = config.max_staleness
        self.capacity = capacity_of(config)
        self.num_prompts = num_prompts
        self.version = self.published = self.leased = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(SETTLED, 0))  # how leases were settled, and what else came
        self._cursor = 0
        self._returned: deque[int] = deque()
        self._in_flight: dict[int, LeaseRecord] = {}
        self._running = Census()  # the same, by min_version
        self._orphans: deque[int] = deque()
        self._buffer = PriorityBuffer(self.capacity, config.priority)
        self._positions: dict[int, int] = {}  # of the complete groups' prompts
        self._drawn: list[Entry] = []

    @property
    def in_flight(self) -> int:
        """Unanswered leases."""
        return len(self._in_flight)

    @property
    def buffered(self) -> int:
        """Complete groups not yet trained, the drawn batch included."""
        return len(self._buffer) + len(self._drawn)

    @property
    def filtered(self) -> int:
        """Groups dropped because all their completions are right, or all wrong."""
        return self.counts["filtered_all_right"] + self.counts["filtered_all_wrong"]

    @property
    def buffered_tokens(self) -> int:
        """Completion tokens in the buffer, the drawn batch included."""
        return self._buffer.size + sum(entry.size for entry in self._drawn)

    def record(self, lease: int) -> LeaseRecord | None:
        """The record of an unanswered lease."""
        return self._in_flight.get(lease)

    def running(self) -> list[LeaseRecord]:
        """All unanswered leases, oldest first."""
        return sorted(self._in_flight.values())

    # --- leases -------------------------------------------------------------------------------------------

    @property
    def next_min_version(self) -> int:
        """Oldest version that the lease issued next may be sampled with."""
        return self._in_flight[self._orphans[0]].min_version if self._orphans else self._min_version()

    @property
    def next_again(self) -> int | None:
        """The lease that is issued next, if it has been issued before and lost its worker."""
        return self._orphans[0] if self._orphans else None

    def admission(self) -> Literal["open", "full", "publish", "exhausted"]:
        """Whether a lease can be issued now, or why not: no place, newer weights not yet published, no prompts left."""
        if self._orphans:
            return "open"
        if self._outstanding() >= self._places():
            return "full"
        if not self._returned and self.num_prompts is not None and self._cursor >= self.num_prompts:
            return "exhausted"
        return "open" if self._min_version() <= self.published else "publish"

    def issue(self, worker: str, worker_version: int, now: float) -> LeaseRecord | None:
        """Lease the next prompt to ``worker``, which serves ``worker_version`` (-1: none yet); None if closed.

        A lease that lost its worker goes first, as the same lease.
        """
        if self.admission() != "open":
            return None
        worker_version = min(worker_version, self.published)  # of a former life it may serve a future that is gone
        if self._orphans:
            record = self._answered(self._orphans[0])  # taken out, to be put in again
            # Newer weights give it more time, but what a former holder samples must count as well.
            min_version = record.min_version if record.contested else max(record.min_version, worker_version)
            record = record._replace(worker=worker, min_version=min_version, issued_at=now)
            self.counts["reissued"] += 1
        else:
            min_version = max(self._min_version(), worker_version)
            record = LeaseRecord(self.leased, self._next_position(), min_version, worker, now)
            self.leased += 1
        self._in_flight[record.lease] = record
        self._running.add(record.min_version)
        return record

    def lose_worker(self, worker: str) -> list[int]:
        """The worker is gone: its leases wait to be issued again. Returns them."""
        return self.release(worker, [r.lease for r in self._in_flight.values() if r.worker == worker])

    def release(self, worker: str, leases: Iterable[int]) -> list[int]:
        """The worker gives these leases back; those that are not its own are ignored. Returns the others."""
        released = [n for n in leases if n in self._in_flight and self._in_flight[n].worker == worker]
        for lease in released:
            self._orphan(lease)
        return released

    def suspect(self, worker: str, lease: int) -> bool:
        """``worker`` may never answer this lease: it goes to another one too, and the first answer counts.

        False if it is not that worker's.
        """
        record = self._in_flight.get(lease)
        if record is None or record.worker != worker:
            return False
        self._in_flight[lease] = record._replace(contested=True)
        self._orphan(lease)
        self.counts["suspected"] += 1
        return True

    def reclaim(self, worker: str, leases: Iterable[int]) -> list[int]:
        """The worker says it still works on these leases: give it those that wait for a worker. Returns them."""
        reclaimed = [n for n in dict.fromkeys(leases) if n in self._orphans]
        for lease in reclaimed:
            self._orphans.remove(lease)
            self._in_flight[lease] = self._in_flight[lease]._replace(worker=worker)
        return reclaimed

    # --- groups -------------------------------------------------------------------------------------------

    def complete(self, lease: int, oldest: int, size: int, correct: Sequence[bool], value: Any) -> Outcome:
        """A group (``value``) has arrived, with its oldest version, its size in tokens and its verdicts."""
        record = self._in_flight.get(lease)
        if record is None:
            outcome: Outcome = "duplicate" if 0 <= lease < self.leased else "unknown_lease"
            self.counts[outcome] += 1
            return outcome
        if oldest < record.min_version and self.config.straggler != "late":
            self._orphan(lease)
            self.counts["too_old"] += 1
            return "too_old"
        self._answered(lease)
        if self.config.filter and (reason := filter_reason(correct)):
            self.counts[reason] += 1
            return reason
        signal = abs(sum(correct) / len(correct) - 0.5)
        self._buffer.put(Entry(lease, oldest, size, signal, value))
        self._positions[lease] = record.position
        return "accepted"

    # --- batches ------------------------------------------------------------------------------------------

    def draw(self) -> Batch | Wait:
        """A full batch, if one can be drawn without breaking the bound; otherwise what is waited for.

        A drawn batch must be settled by ``batch_trained`` before the next ``draw``.
        """
        assert not self._drawn, "draw() while a batch is being trained"
        if len(self._buffer) < self.batch_size:
            if not self._in_flight and self.admission() == "exhausted":
                return Wait("exhausted", [])
            return Wait("generation", [])
        dues = self._dues()
        surplus: set[int] = set()
        if self.config.oversample > 1.0:
            surplus = surplus_of(dues, self.version, self.bound, self.batch_size)
        needs = needs_of([due for due in dues if due.lease not in surplus], self.version, self.bound, self.batch_size)
        missing = missing_of(needs)
        if missing and self.config.straggler == "wait":
            return Wait("straggler", missing)
        chosen = choose(needs, [e.key for e in self._buffer if e.key not in surplus], self.batch_size)
        if len(chosen) < self.batch_size:
            return Wait("generation", [])
        if self.config.straggler == "late":  # they stay, and will be trained late
            missing = []
        cancelled = self._expire(surplus, missing)
        self._drawn = sorted(self._buffer.remove(chosen), key=lambda entry: entry.key)
        late = sum(self.version - entry.version > self.bound for entry in self._drawn)
        self.counts["late"] += late
        return Batch(self._drawn, self.version, late, cancelled)

    def cause_of(self, wait: Wait, any_worker: bool) -> Cause:
        """What is in the way of a batch. ``any_worker``: whether one is connected. Not for an exhausted stream."""
        assert wait.cause != "exhausted", "nothing to wait for"
        if not any_worker:
            return "workers"
        if wait.cause == "generation" and not self._in_flight and self.admission() == "publish":
            return "publish"
        return wait.cause

    def held_back(self) -> bool:
        """Whether ``draw`` would now wait for a straggler; far cheaper than ``draw``, whatever is outstanding."""
        if self.config.straggler != "wait" or self.config.oversample > 1.0:
            return False
        return is_short(self._running, self._buffer.versions, self.version - self.bound, self.batch_size)

    def batch_trained(self) -> int:
        """The drawn batch has been trained. Returns the new version."""
        assert self._drawn, "batch_trained() without a drawn batch"
        self.counts["trained"] += len(self._drawn)
        for entry in self._drawn:
            del self._positions[entry.key]
        self._drawn = []
        self.version += 1
        return self.version

    def state(self, encode: Callable[[Any], Any]) -> dict[str, Any]:
        """Everything needed to go on, as plain values; ``encode`` turns a group into one."""
        return {
            "version": self.version,
            "leased": self.leased,
            "counts": dict(self.counts),
            "cursor": self._cursor,
            "returned": list(self._returned),
            "in_flight": [[r.lease, r.position, r.min_version] for r in self.running()],
            "buffered": [[*e[:4], self._positions[e.key], encode(e.value)] for e in [*self._drawn, *self._buffer]],
        }

    def restore(self, state: dict[str, Any], decode: Callable[[Any], Any]) -> None:
        """Continue from ``state``: unanswered leases wait to be issued again."""
        self.version = self.published = state["version"]
        self.leased = state["leased"]
        for counts in (state.get(name, {}) for name in ("counts", "settled", "events")):  # the latter two: until 0.1
            self.counts.update(counts)
        self._cursor = state["cursor"]
        self._returned.extend(state["returned"])
        for lease, position, min_version in state["in_flight"]:
            self._in_flight[lease] = LeaseRecord(lease, position, min_version, None, 0.0)
            self._running.add(min_version)
            self._orphans.append(lease)
        for key, version, size, signal, position, value in state["buffered"]:
            self._buffer.put(Entry(key, version, size, signal, decode(value)))
            self._positions[key] = position

    def _outstanding(self) -> int:
        """Groups that later draws must find a place for."""
        return self.in_flight + len(self._buffer)

    def _places(self) -> int:
        """Groups that may be outstanding: those of the batches that today's weights can still be trained in."""
        batches = self.bound + (0 if self._drawn else 1)
        return int(self.config.oversample * batches * self.batch_size)

    def _min_version(self) -> int:
        """Oldest weights a lease issued now may start with and still be trained in time, queue and all."""
        place = self.version + bool(self._drawn) + self._outstanding() // self.batch_size
        return max(0, min(place - self.bound, self.version))

    def _dues(self) -> list[Due]:
        """Everything outstanding, the earliest deadline first."""
        waiting = [Due(r.min_version + self.bound, r.lease, False) for r in self._in_flight.values()]
        complete = [Due(e.version + self.bound, e.key, True) for e in self._buffer]
        return sorted(waiting + complete)

    def _expire(self, surplus: set[int], missing: list[int]) -> list[LeaseRecord]:
        """Give up these leases; their prompts go back to the stream. Returns those that were still running."""
        cancelled = []
        for lease in sorted({*surplus, *missing}):
            if lease in self._in_flight:
                record = self._answered(lease)
                cancelled.append(record)
                self._returned.append(record.position)
            else:
                self._buffer.remove([lease])
                self._returned.append(self._positions.pop(lease))
            self.counts["expired"] += 1
        return cancelled

    def _next_position(self) -> int:
        if self._returned:
            return self._returned.popleft()
        self._cursor += 1
        return self._cursor - 1

    def _orphan(self, lease: int) -> None:
        self._in_flight[lease] = self._in_flight[lease]._replace(worker=None)
        if lease not in self._orphans:
            self._orphans.append(lease)

    def _answered(self, lease: int) -> LeaseRecord:
        if lease in self._orphans:
            self._orphans.remove(lease)
        self._running.remove(self._in_flight[lease].min_version)
        return self._in_flight.pop(lease)
