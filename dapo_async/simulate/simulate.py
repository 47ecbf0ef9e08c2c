"""The same asynchronous logic in virtual time: what a cluster that nobody has at hand would do.

Drives the very ``Schedule`` that the coordinator drives, with ``simpy``'s clock, ``VirtualWorker`` in place of
processes and a learner that takes a given time per batch. Modelled: slots and the decode step's dependence on them,
pauses, pushes and swaps of weights, verdicts, failures, every policy of the schedule. Not modelled: the network's
bandwidth, memory, learning itself (lengths and the filter's share stay as they are), held-out evaluations.

Importing this module raises ``ConfigError`` where ``simpy``, of the extra ``plan``, is not installed.
"""

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.config.settings import Workers
from dapo_async.errors import ConfigError, StallError
from dapo_async.schedule.buffer import Entry
from dapo_async.schedule.schedule import CAUSES, SETTLED, Batch, Schedule, Wait
from dapo_async.simulate.cluster import Cluster, Outcome
from dapo_async.simulate.virtual_worker import Job, Pace, VirtualWorker
from dapo_async.simulate.workload import GroupSpec, Workload

try:
    import simpy
except ModuleNotFoundError:
    raise ConfigError(
        'simulating a run needs the simpy package: install it, for example with pip install "dapo-async[plan]"'
    ) from None


class Simulation:
    """One run."""

    def __init__(self, cluster: Cluster, config: ScheduleConfig, workload: Workload, seed: int = 0) -> None:
        self.cluster = cluster
        self.schedule = Schedule(config)
        self.env = simpy.Environment()
        pace = Pace(cluster.slots, cluster.step_s, cluster.step_row_s, cluster.group_s, cluster.swap_s)
        self.workers = [VirtualWorker(index, pace) for index in range(cluster.workers)]
        self.events = 0
        self._by_name = {worker.name: worker for worker in self.workers}
        self._workload = workload
        self._rng, self._fate = random.Random(seed), random.Random(seed + 1)
        self._specs: dict[int, GroupSpec] = {}  # of the unanswered leases: one issued again is the same
        self._free: list[tuple[int, int]] = []  # (leases held, worker), stale entries included: the emptiest first
        self._changed = self.env.event()  # a group has come
        self._pushed = self.env.event()  # a version waits to be carried to the workers
        self._named: list[int] = []  # leases that the next batch cannot do without
        self._counts: Counter[str] = Counter()
        self._staleness: Counter[int] = Counter()
        self._learner: defaultdict[str, float] = defaultdict(float)  # seconds by phase

    def run(self, batches: int, warm_up: int = 0) -> Outcome:
        """Train ``warm_up`` batches that do not count and ``batches`` that do."""
        group_size = len(self._workload(random.Random(0), 0).lengths)
        workers = Workers(slots=self.cluster.slots, prefetch_groups=self.cluster.prefetch_groups)
        self._capacity = workers.capacity(group_size)
        self.env.process(self._carry())
        for worker in self.workers:
            worker.start(0, 0.0)
            self._offer(worker)
            if self.cluster.mtbf_s:
                self.env.process(self._fail(worker))
        self._issue()
        self._advance(warm_up)
        before = self._snapshot()
        self._staleness.clear()
        self._advance(batches)
        return self._outcome(before, self._snapshot(), batches)

    def _advance(self, batches: int) -> None:
        """Until so many more batches are trained. Raises ``StallError`` if nothing can happen before."""
        try:
            self.env.run(self.env.process(self._learn(batches)))
        except RuntimeError:
            if self.env.peek() < math.inf:
                raise
            raise StallError(
                f"the simulated run comes to a standstill at version {self.schedule.version}: admission is "
                f"{self.schedule.admission()}, {self.schedule.in_flight} leases are in flight"
            ) from None

    # --- the learner --------------------------------------------------------------------------------------

    def _learn(self, batches: int) -> Generator[simpy.Event, Any, None]:
        cluster, schedule = self.cluster, self.schedule
        for _ in range(batches):
            while not isinstance(drawn := self._draw(), Batch):
                began = self.env.now
                cause = schedule.cause_of(drawn, any(worker.alive for worker in self.workers))
                yield self._changed
                self._learner[f"wait_{cause}"] += self.env.now - began
            self._cancel(drawn)
            self._issue()
            tokens = sum(entry.size for entry in drawn.entries)
            yield from self._spend("train", cluster.train_batch_s + cluster.train_token_s * tokens)
            self._note(drawn.entries, tokens)
            version = schedule.batch_trained()
            if version % cluster.push_every == 0:
                yield from self._spend("publish", cluster.publish_s)
                schedule.published = version
                if not self._pushed.triggered:
                    self._pushed.succeed()
            self._issue()

    def _draw(self) -> Batch | Wait:
        """``draw`` at little cost: it sorts, and there is nothing to sort for while a straggler is waited for."""
        schedule = self.schedule
        while self._named and schedule.record(self._named[-1]) is None:
            self._named.pop()
        if self._named or (schedule.buffered >= schedule.batch_size and schedule.held_back()):
            return Wait("straggler", [])
        drawn = schedule.draw()
        # At bound 0 all that is outstanding is due now, so a batch needs every lease that is named, not just as many.
        if isinstance(drawn, Wait) and not schedule.bound:
            self._named = drawn.leases
        return drawn

    def _spend(self, phase: str, seconds: float) -> Generator[simpy.Event, Any, None]:
        seconds /= self.cluster.learners if phase == "train" else 1.0
        self._learner[phase] += seconds
        yield self.env.timeout(seconds)

    def _cancel(self, drawn: Batch) -> None:
        for record in drawn.cancelled:
            del self._specs[record.lease]
            if record.worker is not None:
                worker = self._by_name[record.worker]
                worker.cancel(record.lease, self.env.now)
                self._arm(worker)
                self._offer(worker)

    def _note(self, entries: list[Entry], tokens: int) -> None:
        self._counts["groups"] += len(entries)
        self._counts["tokens"] += tokens
        self._staleness.update(self.schedule.version - entry.version for entry in entries)

    # --- weights ------------------------------------------------------------------------------------------

    def _carry(self) -> Generator[simpy.Event, Any, None]:
        """Weights on their way: the newest there are, one set at a time."""
        while True:
            yield self._pushed
            self._pushed = self.env.event()
            version = self.schedule.published
            yield self.env.timeout(self.cluster.push_s)
            for worker in self.workers:
                if worker.alive and worker.version < version:
                    worker.swap(version, self.env.now)
                    self._arm(worker)

    # --- workers ------------------------------------------------------------------------------------------

    def _issue(self) -> None:
        """Lease to the emptiest workers, as ``handlers`` does."""
        touched = {}
        while self._free:
            held, index = self._free[0]
            worker = self.workers[index]
            if not worker.alive or held != len(worker.jobs) or held >= self._capacity:
                heapq.heappop(self._free)
                continue
            record = self.schedule.issue(worker.name, worker.version, self.env.now)
            if record is None:
                break
            if record.lease not in self._specs:
                self._specs[record.lease] = self._workload(self._rng, record.lease)
            worker.hold(Job(record.lease, record.min_version, self._specs[record.lease]), self.env.now)
            heapq.heapreplace(self._free, (held + 1, index))
            touched[index] = worker
        for worker in touched.values():
            self._arm(worker)

    def _offer(self, worker: VirtualWorker) -> None:
        """It has room for leases."""
        heapq.heappush(self._free, (len(worker.jobs), worker.index))

    def _arm(self, worker: VirtualWorker) -> None:
        """Wake when its next completion ends; what was armed before is void."""
        worker.armed += 1
        when, armed = worker.next_end(), worker.armed
        if when == float("inf"):
            return

        def ring(_event: simpy.Event) -> None:
            self.events += 1
            if worker.armed == armed:
                self._ended(worker)

        self.env.timeout(max(0.0, when - self.env.now)).callbacks.append(ring)

    def _ended(self, worker: VirtualWorker) -> None:
        complete: list[Job] = []
        worker.finish(self.env.now, complete.append)
        self._arm(worker)
        if not complete:
            return
        if self.cluster.verdict_s:
            judged = self.env.timeout(self.cluster.verdict_s)
            judged.callbacks.append(lambda _event: self._complete(worker, complete))
        else:
            self._complete(worker, complete)
        self._offer(worker)
        self._issue()

    def _complete(self, worker: VirtualWorker, jobs: list[Job]) -> None:
        for job in jobs:
            lease = self.schedule.record(job.lease)
            if lease is None or lease.worker != worker.name:
                continue  # expired, or lost with its worker before the verdicts came
            size = sum(job.spec.lengths)
            outcome = self.schedule.complete(job.lease, job.oldest, size, job.spec.verdicts, None)
            del self._specs[job.lease]
            self._counts["generated"] += size
            if outcome == "accepted":
                self._counts["accepted"] += 1
                self._counts["accepted_tokens"] += size
        self._issue()
        if self.schedule.buffered >= self.schedule.batch_size:
            self._wake_learner()

    def _wake_learner(self) -> None:
        self._changed.succeed()
        self._changed = self.env.event()

    def _fail(self, worker: VirtualWorker) -> Generator[simpy.Event, Any, None]:
        while True:
            yield self.env.timeout(self._fate.expovariate(1.0 / self.cluster.mtbf_s))
            worker.crash(self.env.now)
            worker.armed += 1
            self.schedule.lose_worker(worker.name)
            self._issue()
            self._wake_learner()  # what it waits for may have another name now
            yield self.env.timeout(self.cluster.restart_s)
            worker.start(self.schedule.published, self.env.now)
            self._offer(worker)
            self._issue()
            self._wake_learner()

    # --- the result ---------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, float]:
        """All sums as of now."""
        sums: dict[str, float] = defaultdict(float, self._counts)
        sums |= {f"learner_{phase}": seconds for phase, seconds in self._learner.items()}
        for worker in self.workers:
            worker.settle(self.env.now)
            for phase, seconds in worker.seconds.items():
                sums[f"worker_{phase}"] += seconds
            sums["steps"] += worker.steps
            sums["rows"] += worker.rows
        sums |= {name: self.schedule.counts[name] for name in ("late", "reissued")}
        sums["now"] = self.env.now
        return sums

    def _outcome(self, before: dict[str, float], after: dict[str, float], batches: int) -> Outcome:
        new = defaultdict(float, {name: after[name] - before.get(name, 0.0) for name in after})
        seconds, schedule = new["now"] or float("inf"), self.schedule
        phases = ("train", "publish", *(f"wait_{cause}" for cause in CAUSES))
        worker_s = sum(new[f"worker_{phase}"] for phase in self.workers[0].seconds) or 1.0
        accepted = after["accepted_tokens"] / max(1, after["accepted"])
        return Outcome(
            seconds=new["now"],
            batches=batches,
            groups_per_s=new["groups"] / seconds,
            tokens_per_s=new["tokens"] / seconds,
            generated_tokens_per_s=new["generated"] / seconds,
            learner={phase: new[f"learner_{phase}"] / seconds for phase in phases},
            workers={phase: new[f"worker_{phase}"] / worker_s for phase in self.workers[0].seconds},
            running_mean=new["rows"] / max(1, new["steps"]),
            staleness=dict(sorted(self._staleness.items())),
            trained_generated_ratio=after["tokens"] / after["groups"] / accepted,
            late=int(new["late"]),
            reissued=int(new["reissued"]),
            account={
                "leased": schedule.leased,
                "in_flight": schedule.in_flight,
                "buffered": schedule.buffered,
                **{name: schedule.counts[name] for name in SETTLED},
            },
            events=self.events,
        )


def simulate(
    cluster: Cluster, config: ScheduleConfig, workload: Workload, *, batches: int, warm_up: int = 0, seed: int = 0
) -> Outcome:
    """Simulate a run of this schedule on this cluster."""
    return Simulation(cluster, config, workload, seed).run(batches, warm_up)
