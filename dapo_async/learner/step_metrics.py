"""The metrics of each step: gauges of coordinator, workers and process, read once per batch.

Owns the differences between two batches (rates, shares) and the totals that the run's summary is made of.
"""

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from msgspec import Struct, field

from dapo_async.coordinator.coordinator import Coordinator, TrainBatch
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.learner.update import TrainResult
from dapo_async.observe.records import Lengths
from dapo_async.schedule.schedule import CAUSES, SETTLED
from dapo_async.transport.messages import WORKER_PHASES, Beat, DecodeSums

DECODE_SUMS = DecodeSums.__struct_fields__
NO_BEAT = Beat(version=-1, running=0, holding=[])
SECOND_VERIFIER = ("first_only", "second_only", "second_errors", "second_timeouts")


class Totals(Struct):
    """Sums over the whole run, through resumes: what the summary needs."""

    batches: int = 0
    groups: int = 0
    completions: int = 0
    tokens: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    straggler_waits: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # the learner's, by phase, and "step" for all
    worker_seconds: dict[str, float] = field(default_factory=dict)  # the workers', by phase
    generated_tokens: int = 0
    refused_weights: int = 0
    warm_start_s: float = 0.0
    wall_s: float = 0.0  # of earlier processes of this run
    start: dict[str, float] = field(default_factory=dict)  # first held-out evaluation
    final: dict[str, float] = field(default_factory=dict)  # latest held-out evaluation


class StepMetrics:
    """See the module."""

    def __init__(self, coordinator: Coordinator, supervisor: Supervisor | None, totals: Totals) -> None:
        self.totals = totals
        self._coordinator = coordinator
        self._supervisor = supervisor
        self._beats: dict[str, Beat] = {}
        self._arrived = coordinator.counts()
        self._last = time.monotonic()

    def restart_clock(self) -> None:
        """The next interval starts now."""
        self._last = time.monotonic()
        self._arrived = self._coordinator.counts()
        self._worker_seconds()

    def batch(self, batch: TrainBatch, result: TrainResult, phases: Mapping[str, float]) -> dict[str, float]:
        """All metrics of the step that just ended. ``phases``: the learner's seconds besides waiting and training."""
        now = time.monotonic()
        step_s, self._last = now - self._last, now
        waits = {cause: batch.waited_s.get(cause, 0.0) for cause in CAUSES}
        seconds = {**result.seconds, **phases, "wait_data": sum(waits.values())}
        seconds["other"] = max(0.0, step_s - sum(seconds.values()))
        seconds |= {f"wait_{cause}": waited for cause, waited in waits.items()}
        values = dict(result.metrics)
        values |= self._batch_totals(batch, result, {**seconds, "step": step_s})
        values |= self._staleness(batch)
        values |= {f"time/{name}": value for name, value in seconds.items()}
        values |= {f"time_share/{name}": value / step_s for name, value in seconds.items()}
        values["time/step"] = step_s
        values["time_share/busy"] = (seconds["forward_backward"] + seconds["optimizer"]) / step_s
        values["throughput/trained_tokens_per_s"] = result.metrics["batch/tokens"] / step_s
        values["throughput/trained_groups_per_s"] = len(batch.groups) / step_s
        if torch.cuda.is_available():
            values["memory/gpu_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return values | self._workers() | self._arrivals(step_s) | self.standing()

    def standing(self) -> dict[str, float]:
        """Gauges and totals as they stand; neither ends nor changes an interval."""
        return self._worker_gauges() | self._schedule_gauges() | self._drops()

    def lengths(self, step: int) -> Lengths:
        """The groups that arrived since the last call."""
        groups = self._coordinator.take_lengths()
        return Lengths(
            step=step,
            leases=[group.lease for group in groups],
            groups=[group.tokens for group in groups],
            accepted=[group.accepted for group in groups],
        )

    def _batch_totals(self, batch: TrainBatch, result: TrainResult, seconds: Mapping[str, float]) -> dict[str, float]:
        totals, counts = self.totals, self._coordinator.counts()
        totals.batches += 1
        totals.groups += len(batch.groups)
        totals.completions += sum(len(rollout.group.completions) for rollout in batch.groups)
        totals.tokens += int(result.metrics["batch/tokens"])
        totals.optimizer_steps += result.steps
        totals.skipped_steps += result.skipped
        totals.straggler_waits += batch.waited_s.get("straggler", 0.0) > 0
        for name, value in seconds.items():
            totals.seconds[name] = totals.seconds.get(name, 0.0) + value
        values: dict[str, float] = {
            "optimizer/steps": totals.optimizer_steps,
            "optimizer/skipped": totals.skipped_steps,
            "time/straggler_waits": totals.straggler_waits,
            "progress/tokens": totals.tokens,
        }
        if counts["accepted_completions"]:
            accepted = counts["accepted_tokens"] / counts["accepted_completions"]
            values["length/trained_generated_ratio"] = totals.tokens / totals.completions / accepted
        return values

    def _staleness(self, batch: TrainBatch) -> dict[str, float]:
        ages = staleness(batch)
        self.totals.staleness_sum += sum(ages)
        self.totals.staleness_max = max(self.totals.staleness_max, *ages)
        values: dict[str, float] = {
            "staleness/mean": float(np.mean(ages)),
            "staleness/min": min(ages),
            "staleness/max": max(ages),
            "staleness/late": self._coordinator.counts()["late"],
        }
        return values | {f"staleness/groups_{age}": count for age, count in Counter(ages).items()}

    # --- workers ------------------------------------------------------------------------------------------

    def _worker_gauges(self) -> dict[str, float]:
        status = self._coordinator.status()
        behind = [status.version - worker.version for worker in status.workers if worker.capacity]
        values: dict[str, float] = {
            "workers/alive": len(status.workers),
            "workers/lost": self._coordinator.counts()["workers_lost"],
            "workers/disconnects": status.disconnects,
            "workers/restarts": self._supervisor.restarts if self._supervisor else 0,
            "workers/given_up": self._supervisor.given_up if self._supervisor else 0,
            "workers/running": sum(worker.beat.running for worker in status.workers),
            "publish/refused": self.totals.refused_weights,
            "publish/lag_versions": max(behind, default=0),
        }
        if status.publish_lag_s is not None:
            values["publish/lag_s"] = status.publish_lag_s
        return values

    def _worker_seconds(self) -> tuple[dict[str, float], Counter[str]]:
        """The workers' seconds by phase, and sums over their decode steps, since the last call."""
        phases: defaultdict[str, float] = defaultdict(float)
        decode: Counter[str] = Counter()
        for worker in self._coordinator.workers():
            if not worker.beat.seconds:
                continue  # it has just (re)joined and has told nothing yet
            beat, before = worker.beat, self._beats.get(worker.name, NO_BEAT)
            self._beats[worker.name] = beat
            if _falls(before, beat):  # another process of this name
                before = NO_BEAT
            for spent, seconds in beat.seconds.items():
                phases[spent] += seconds - before.seconds.get(spent, 0.0)
            decode.update({name: getattr(beat.decode, name) - getattr(before.decode, name) for name in DECODE_SUMS})
            self.totals.refused_weights += beat.refused_weights - before.refused_weights
        return phases, decode

    def _workers(self) -> dict[str, float]:
        """Shares of the workers' time since the last call, added to the totals."""
        phases, decode = self._worker_seconds()
        values: dict[str, float] = {}
        for phase, seconds in phases.items():
            self.totals.worker_seconds[phase] = self.totals.worker_seconds.get(phase, 0.0) + seconds
        whole = sum(phases.values())
        if whole > 0:
            values |= {f"worker_time/{phase}": phases[phase] / whole for phase in WORKER_PHASES}
            values["workers/busy"] = 1.0 - phases["idle"] / whole
        return values | self._decode_steps(decode)

    def _decode_steps(self, sums: Counter[str]) -> dict[str, float]:
        if not sums["steps"] or not sums["rows"] or self._coordinator.config.workers.engine != "torch":
            return {}
        return {
            "decode/steps": sums["steps"],
            "decode/running_mean": sums["rows"] / sums["steps"],
            "decode/step_s": sums["seconds"] / sums["steps"],
            "decode/running_seen": sums["rows_squared"] / sums["rows"],
            "decode/token_s": sums["rows_seconds"] / sums["rows"],
        }

    # --- groups -------------------------------------------------------------------------------------------

    def _arrivals(self, step_s: float) -> dict[str, float]:
        """What all groups that arrived in the interval were like, filtered ones included."""
        now = self._coordinator.counts()
        new = Counter({name: count - self._arrived[name] for name, count in now.items()})
        self._arrived = now
        self.totals.generated_tokens += new["tokens"]
        rates = {
            "throughput/generated_tokens_per_s": new["tokens"] / step_s,
            "throughput/generated_groups_per_s": new["groups"] / step_s,
        }
        if new["compared"]:
            rates["verifier/disagreement"] = (new["first_only"] + new["second_only"]) / new["compared"]
        if not new["completions"]:
            return rates
        return rates | {
            "accuracy/generated": new["correct"] / new["completions"],
            "length/generated_mean": new["tokens"] / new["completions"],
            "groups/filtered_share": 1.0 - new["accepted_groups"] / new["groups"],
        }

    def _schedule_gauges(self) -> dict[str, float]:
        status, counts = self._coordinator.status(), self._coordinator.counts()
        values: dict[str, float] = {
            "buffer/groups": status.buffered,
            "buffer/capacity": status.capacity,
            "buffer/fill": status.buffered / status.capacity,
            "buffer/tokens": status.buffered_tokens,
            "groups/leased": status.leased,
            "groups/in_flight": status.in_flight,
            "groups/buffered": status.buffered,
            "groups/reissued": counts["reissued"],
            "groups/suspected": counts["suspected"],
            "progress/prompts": status.leased,
            "progress/epoch": status.leased / len(self._coordinator.prompts.prompts),
            "memory/rss_bytes": rss_bytes(),
        }
        return values | {f"groups/{name}": counts[name] for name in SETTLED}

    def _drops(self) -> dict[str, float]:
        counts, rows = self._coordinator.counts(), self._coordinator.prompts.prompts.counts
        refused = {name: count for name, count in counts.items() if name.startswith("refused_")}
        values: dict[str, float] = {
            "drops/duplicates": counts["duplicate"],
            "drops/too_old": counts["too_old"],
            "drops/refused": sum(refused.values()),
            "drops/prompts_overlong": rows.overlong_dropped + rows.overlong_truncated,
            "drops/prompts_duplicate": rows.duplicates,
            "drops/prompts_without_truth": rows.without_truth,
            "drops/prompts_conflicting": rows.conflicting,
            "verifier/errors": counts["verifier_errors"],
            "verifier/timeouts": counts["verifier_timeouts"],
        }
        if self._coordinator.config.reward.compare_with:
            values |= {f"verifier/{name}": counts[name] for name in SECOND_VERIFIER}
        return values | {f"drops/{name}": count for name, count in refused.items()}


def _falls(before: Beat, after: Beat) -> bool:
    """Whether a total is smaller than it was, which totals of one process never are."""
    sums = [(getattr(before.decode, name), getattr(after.decode, name)) for name in DECODE_SUMS]
    seconds = [(spent, after.seconds.get(phase, 0.0)) for phase, spent in before.seconds.items()]
    refused = (before.refused_weights, after.refused_weights)
    return any(new < old for old, new in [*sums, *seconds, refused])


def staleness(batch: TrainBatch) -> list[int]:
    """Learner version minus oldest version, of each group of a batch."""
    return [batch.version - rollout.versions[0] for rollout in batch.groups]


def summary(totals: Totals, coordinator: Coordinator, wall_s: float) -> dict[str, Any]:
    """``summary.json``: the run in one look. Rates and shares are over the training loop alone."""
    status, counts = coordinator.status(), coordinator.counts()
    loop_s = totals.seconds.get("step", 0.0)
    busy_s = totals.seconds.get("forward_backward", 0.0) + totals.seconds.get("optimizer", 0.0)
    worker_s = sum(totals.worker_seconds.values())
    return {
        "start_accuracy": totals.start.get("heldout/accuracy"),
        "final_accuracy": totals.final.get("heldout/accuracy"),
        "start_length": totals.start.get("heldout/length_mean"),
        "final_length": totals.final.get("heldout/length_mean"),
        "wall_s": wall_s,
        "warm_start_s": totals.warm_start_s,
        "steps": totals.batches,
        "groups": {
            "leased": status.leased,
            **{name: counts[name] for name in SETTLED},
            "in_flight": status.in_flight,
            "buffered": status.buffered,
        },
        "generated_tokens_per_s": _ratio(totals.generated_tokens, loop_s),
        "trained_tokens_per_s": _ratio(totals.tokens, loop_s),
        "learner_busy": _ratio(busy_s, loop_s),
        "worker_busy": _ratio(worker_s - totals.worker_seconds.get("idle", 0.0), worker_s),
        "staleness_mean": _ratio(totals.staleness_sum, totals.groups),
        "staleness_max": totals.staleness_max,
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def rss_bytes() -> int:
    """Resident memory of this process; its peak where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
