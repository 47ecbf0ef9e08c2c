"""A rollout worker in virtual time: slots, decode steps, weight swaps, without an event per step.

All running completions advance by one token per step, and a step of n of them takes ``step_s + n * step_row_s``.
Between two changes of its running set a worker's steps are therefore equally long: it keeps the step at which each
completion ends in a heap and needs one event per change. What arrives while a step is running joins at its end, as
in ``workers/rollout.py``. Owns one worker's state, and no clock.
"""

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from dapo_async.simulate.workload import GroupSpec


class Pace(NamedTuple):
    """How fast a worker is. Seconds."""

    slots: int
    step_s: float  # a of a decode step of n completions: a + b * n
    step_row_s: float  # b
    group_s: float  # pause per group: reading its prompt, judging its answers in the worker's thread
    swap_s: float  # pause per weight swap


class Job(Struct):
    """One lease on a worker."""

    lease: int
    min_version: int
    spec: GroupSpec
    started: int = 0
    left: int = 0  # completions that have not ended, those not yet started included
    oldest: int = -1  # version that sampled its first token
    cancelled: bool = False


class VirtualWorker:
    """See the module. Every method takes the time ``now``, which never falls."""

    def __init__(self, index: int, pace: Pace) -> None:
        self.index = index
        self.name = f"worker-{index}"
        self.pace = pace
        self.alive = True
        self.version = -1
        self.jobs: dict[int, Job] = {}  # what it holds, by lease number, in order of arrival
        self.running = 0
        self.seconds = {"decode": 0.0, "group": 0.0, "swap": 0.0, "idle": 0.0, "down": 0.0}
        self.steps = self.rows = 0  # decode steps, and tokens they made
        self.armed = 0  # counts changes: an event made before the newest one is void
        self._queue: list[Job] = []  # not yet wholly started
        self._ends: list[tuple[int, int, Job]] = []  # (step at which a completion ends, tie-breaker, job)
        self._ready = 0.0  # end of the step or pause in progress; in the past only while steps are being skipped
        self._order = 0

    def next_end(self) -> float:
        """When the next completion ends; infinite if nothing runs."""
        while self._ends and self._ends[0][2].cancelled:
            heapq.heappop(self._ends)
        if not self._ends:
            return math.inf
        return self._ready + (self._ends[0][0] - self.steps) * self._step()

    def hold(self, job: Job, now: float) -> None:
        """A lease has come."""
        self._advance(now)
        job.left = len(job.spec.lengths)
        self.jobs[job.lease] = job
        self._queue.append(job)
        self._fill()

    def finish(self, now: float, done: Callable[[Job], None]) -> None:
        """It is the time that ``next_end`` told: take out what has ended; ``done`` gets each complete group."""
        self._take_steps(self._ends[0][0] - self.steps, now)
        complete = []
        while self._ends and self._ends[0][0] <= self.steps:
            job = heapq.heappop(self._ends)[2]
            if job.cancelled:
                continue
            self.running -= 1
            job.left -= 1
            if not job.left:
                complete.append(job)
        for job in complete:
            del self.jobs[job.lease]
            done(job)
        self._fill()

    def swap(self, version: int, now: float) -> None:
        """Newer weights are here; they serve from the end of the running step."""
        self._advance(now)
        self.version = version
        self._pause("swap", self.pace.swap_s)
        self._fill()

    def cancel(self, lease: int, now: float) -> None:
        """Nobody waits for this lease any more."""
        self._advance(now)
        job = self.jobs.pop(lease, None)
        if job is not None:
            self._drop(job)
        self._fill()

    def crash(self, now: float) -> None:
        """It loses everything."""
        self._advance(now)
        for job in self.jobs.values():
            self._drop(job)
        self.jobs.clear()
        self._ends.clear()
        self.alive, self.version, self._ready = False, -1, now

    def start(self, version: int, now: float) -> None:
        """It is back, with these weights."""
        self.seconds["down"] += now - self._ready
        self.alive, self.version, self._ready = True, version, now

    def settle(self, now: float) -> None:
        """Bring the account of its time up to ``now``, to the end of the running step."""
        if self.alive:
            self._advance(now)

    def _drop(self, job: Job) -> None:
        job.cancelled = True
        self.running -= job.left - (len(job.spec.lengths) - job.started)
        if job in self._queue:
            self._queue.remove(job)

    def _step(self) -> float:
        return self.pace.step_s + self.pace.step_row_s * self.running

    def _advance(self, now: float) -> None:
        """Take the steps that began before ``now``."""
        if now <= self._ready:
            return
        if self.running:
            step = self._step()
            steps = math.ceil((now - self._ready) / step - 1e-9)
            self._take_steps(steps, self._ready + steps * step)
        else:
            self.seconds["idle"] += now - self._ready
            self._ready = now

    def _take_steps(self, steps: int, until: float) -> None:
        self.seconds["decode"] += until - self._ready
        self.steps += steps
        self.rows += steps * self.running
        self._ready = until

    def _pause(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        self._ready += seconds

    def _fill(self) -> None:
        """Start completions in free slots, of the leases that these weights may answer."""
        place = 0
        while self.running < self.pace.slots and place < len(self._queue):
            job = self._queue[place]
            if not job.started:
                if job.min_version > self.version:
                    place += 1
                    continue
                job.oldest = self.version
                self._pause("group", self.pace.group_s)
            lengths = job.spec.lengths
            count = min(self.pace.slots - self.running, len(lengths) - job.started)
            for length in lengths[job.started : job.started + count]:
                self._order += 1
                heapq.heappush(self._ends, (self.steps + length, self._order, job))
            job.started += count
            self.running += count
            if job.started == len(lengths):
                del self._queue[place]
