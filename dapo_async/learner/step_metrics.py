"""Reads the gauges of hub, workers and process once per batch and turns them into declared metrics.

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

from dapo_async.coordinator.coordinator import Drawn, Hub
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.learner.update import Trained
from dapo_async.observe.records import Lengths
from dapo_async.schedule.schedule import SETTLED
from dapo_async.simulate.cluster import CAUSES
from dapo_async.transport.messages import WORKER_PHASES, Beat, DecodeSums

DECODE_SUMS = DecodeSums.__struct_fields__


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


class Readings:
    """See the module."""

    def __init__(self, hub: Hub, supervisor: Supervisor | None, totals: Totals) -> None:
        self.totals = totals
        self._hub = hub
        self._supervisor = supervisor
        self._beats: dict[str, Beat] = {}
        self._arrived: Counter[str] = Counter(hub.reception.tally.totals)
        self._last = time.monotonic()

    def restart_clock(self) -> None:
        """The next interval starts now."""
        self._last = time.monotonic()
        self._arrived = Counter(self._hub.reception.tally.totals)
        self._worker_seconds()

    def batch(self, drawn: Drawn, trained: Trained, phases: Mapping[str, float]) -> dict[str, float]:
        """All metrics of the step that just ended. ``phases``: the learner's seconds besides waiting and training."""
        now = time.monotonic()
        step_s, self._last = now - self._last, now
        seconds = {**trained.seconds, **phases}
        seconds |= {f"wait_{cause}": drawn.waited_s.get(cause, 0.0) for cause in CAUSES}
        seconds["wait_data"] = sum(drawn.waited_s.values())
        accounted = sum(value for name, value in seconds.items() if name[5:] not in CAUSES)
        seconds["other"] = max(0.0, step_s - accounted)
        values = dict(trained.metrics)
        values |= self._batch_totals(drawn, trained, {**seconds, "step": step_s})
        values |= self._staleness(drawn)
        values |= {f"time/{name}": value for name, value in seconds.items()}
        values |= {f"time_share/{name}": value / step_s for name, value in seconds.items()}
        values["time/step"] = step_s
        values["time_share/busy"] = (seconds["forward_backward"] + seconds["optimizer"]) / step_s
        values["throughput/trained_tokens_per_s"] = trained.metrics["batch/tokens"] / step_s
        values["throughput/trained_groups_per_s"] = len(drawn.answers) / step_s
        if torch.cuda.is_available():
            values["memory/gpu_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return values | self._workers() | self._arrivals(step_s) | self.standing()

    def standing(self) -> dict[str, float]:
        """Gauges and totals as they stand; neither ends nor changes an interval."""
        return self._worker_gauges() | self._gauges()

    def lengths(self, step: int) -> Lengths:
        """The groups that arrived since the last call."""
        waiting = self._hub.reception.tally.lengths  # the hub's thread appends meanwhile
        groups = [waiting.popleft() for _ in range(len(waiting))]
        return Lengths(
            step=step,
            leases=[lease for lease, _, _ in groups],
            groups=[tokens for _, tokens, _ in groups],
            accepted=[kept for _, _, kept in groups],
        )

    def _batch_totals(self, drawn: Drawn, trained: Trained, seconds: Mapping[str, float]) -> dict[str, float]:
        totals, tally = self.totals, self._hub.reception.tally.totals
        totals.batches += 1
        totals.groups += len(drawn.answers)
        totals.completions += sum(len(a.group.completions) for a in drawn.answers)
        totals.tokens += int(trained.metrics["batch/tokens"])
        totals.optimizer_steps += trained.steps
        totals.skipped_steps += trained.skipped
        totals.straggler_waits += drawn.waited_s.get("straggler", 0.0) > 0
        for name, value in seconds.items():
            totals.seconds[name] = totals.seconds.get(name, 0.0) + value
        values: dict[str, float] = {
            "optimizer/steps": totals.optimizer_steps,
            "optimizer/skipped": totals.skipped_steps,
            "time/straggler_waits": totals.straggler_waits,
            "progress/tokens": totals.tokens,
        }
        if tally["accepted_completions"]:
            accepted = tally["accepted_tokens"] / tally["accepted_completions"]
            values["length/trained_generated_ratio"] = totals.tokens / totals.completions / accepted
        return values

    def _staleness(self, drawn: Drawn) -> dict[str, float]:
        ages = staleness(drawn)
        self.totals.staleness_sum += sum(ages)
        self.totals.staleness_max = max(self.totals.staleness_max, *ages)
        values: dict[str, float] = {
            "staleness/mean": float(np.mean(ages)),
            "staleness/min": min(ages),
            "staleness/max": max(ages),
            "staleness/late": self._hub.schedule.events["late"],
        }
        return values | {f"staleness/groups_{age}": count for age, count in Counter(ages).items()}

    def _worker_gauges(self) -> dict[str, float]:
        peers = self._hub.peers()
        return {
            "workers/alive": len(peers),
            "workers/lost": self._hub.reception.workers_lost,
            "workers/disconnects": self._hub.disconnects,
            "workers/restarts": self._supervisor.restarts if self._supervisor else 0,
            "workers/given_up": self._supervisor.given_up if self._supervisor else 0,
            "workers/running": sum(peer.beat.running for peer in peers),
            "publish/refused": self.totals.refused_weights,
        }

    def _worker_seconds(self) -> tuple[dict[str, float], Counter[str]]:
        """The workers' seconds by phase, and sums over their decode steps, since the last call."""
        phases: defaultdict[str, float] = defaultdict(float)
        decode: Counter[str] = Counter()
        for peer in self._hub.peers():
            if not peer.beat.seconds:
                continue  # it has just (re)joined and has told nothing yet
            beat, before = peer.beat, self._beats.get(peer.name, Beat(version=-1, running=0, holding=[]))
            self._beats[peer.name] = beat
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
        if not sums["rows"] or self._hub.config.workers.engine != "torch":
            return {}
        return {
            "decode/steps": sums["steps"],
            "decode/running_mean": sums["rows"] / sums["steps"],
            "decode/step_s": sums["seconds"] / sums["steps"],
            "decode/running_seen": sums["rows_squared"] / sums["rows"],
            "decode/token_s": sums["rows_seconds"] / sums["rows"],
        }

    def _arrivals(self, step_s: float) -> dict[str, float]:
        """What all groups that arrived in the interval were like, filtered ones included."""
        now = Counter(self._hub.reception.tally.totals)
        new = Counter({name: now[name] - self._arrived[name] for name in now})
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

    def _gauges(self) -> dict[str, float]:
        hub, schedule = self._hub, self._hub.schedule
        counts = hub.prompts.prompts.counts
        in_buffer, drops, tally = schedule.buffered, dict(hub.reception.drops), hub.reception.tally.totals
        values: dict[str, float] = {
            "buffer/groups": in_buffer,
            "buffer/capacity": schedule.capacity,
            "buffer/fill": in_buffer / schedule.capacity,
            "buffer/tokens": schedule.buffered_tokens,
            "groups/leased": schedule.leased,
            "groups/in_flight": schedule.in_flight,
            "groups/buffered": schedule.buffered,
            "groups/reissued": schedule.events["reissued"],
            "drops/duplicates": schedule.events["duplicate"],
            "drops/late": schedule.events["too_old"],
            "drops/refused": sum(count for name, count in drops.items() if name.startswith("refused_")),
            "verifier/errors": tally["verifier_errors"],
            "verifier/timeouts": tally["verifier_timeouts"],
            "drops/prompts_overlong": counts.overlong_dropped + counts.overlong_truncated,
            "drops/prompts_duplicate": counts.duplicates,
            "drops/prompts_conflicting": counts.conflicting,
            "progress/prompts": schedule.leased,
            "progress/epoch": schedule.leased / len(hub.prompts.prompts),
            "publish/lag_versions": max([schedule.version - p.version for p in hub.peers() if p.capacity], default=0),
            "memory/rss_bytes": rss_bytes(),
        }
        if hub.config.reward.compare_with:
            second = ("first_only", "second_only", "second_errors", "second_timeouts")
            values |= {f"verifier/{name}": tally[name] for name in second}
        values |= {f"groups/{name}": count for name, count in schedule.settled.items()}
        values |= {f"drops/{name}": count for name, count in drops.items() if name.startswith("refused_")}
        if hub.reception.lag.seconds is not None:
            values["publish/lag_s"] = hub.reception.lag.seconds
        return values


def staleness(drawn: Drawn) -> list[int]:
    """Learner version minus oldest version, of each group of a batch."""
    return [drawn.version - answer.versions[0] for answer in drawn.answers]


def summary(totals: Totals, hub: Hub, wall_s: float) -> dict[str, Any]:
    """``summary.json``: the run in one look. Rates and shares are over the training loop alone."""
    schedule = hub.schedule
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
            "leased": schedule.leased,
            **{name: schedule.settled[name] for name in SETTLED},
            "in_flight": schedule.in_flight,
            "buffered": schedule.buffered,
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
