"""``dapo-async plan RUN``: what limits a run, which staleness bound it needs, what more machines would bring.

Everything is a simulation with the run's own facts (``run_facts``). The first is of the run as it was: how near its
groups/s come to the measured ones says how far the others can be trusted. What limits is found by trying: each cost in
turn is made half, or nothing, and the one whose fall helps most is the limit.
"""

from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.simulate.cluster import Cluster, Outcome
from dapo_async.simulate.run_facts import Facts, read_facts
from dapo_async.simulate.simulate import simulate
from dapo_async.simulate.workload import replayed

ETAS = (0, 1, 2, 3, 4, 6, 8)
LARGE_ETA = 16
ENOUGH = 0.98  # of the throughput at a large bound
NOTICEABLE = 1.03  # a limit whose fall brings less is none
COMPLETIONS = 40_000  # simulated per question, about
SAID = {
    "generation": "generation: the workers cannot fill batches as fast as the learner trains them",
    "training": "training: the learner cannot train groups as fast as the workers generate them",
    "stragglers": "stragglers: batches wait for a few long answers that the staleness bound wants in them",
    "turns": "max_staleness = 0: workers and learner take turns, and while one works the other is idle",
    "push": "push: workers and learner wait while weights travel and are swapped",
    "verifier": "verifier: judging answers takes the workers' time from decoding",
}


class Plan(Struct, kw_only=True):
    """The answer, ready for JSON. Gains are factors on the simulated groups/s of the run as it was."""

    run: str
    batches: int
    measured_groups_per_s: float
    predicted_groups_per_s: float
    limit: str  # a key of SAID, or "balanced"
    sentence: str
    generation_groups_per_s: float  # that pass the filter, if the learner took no time
    training_groups_per_s: float  # if batches were always there
    gains: dict[str, float]  # by limit: with that cost halved (generation, training) or gone (the others)
    eta: int  # the run's
    eta_needed: int
    by_eta: dict[int, float]  # groups/s
    by_machines: list[dict[str, float]]  # workers, learners, groups_per_s, learner_busy, workers_busy
    facts: dict[str, Any]


class Planner:
    """Simulates variants of one run."""

    def __init__(self, facts: Facts, completions: int = COMPLETIONS) -> None:
        """``completions``: how many to simulate per question, about."""
        self.facts = facts
        self._workload = replayed(facts.groups)
        schedule = facts.config.schedule
        per_batch = schedule.groups_per_batch * len(facts.groups[0].lengths)
        self._batches = min(400, max(40, completions // per_batch))

    def try_out(self, cluster: Cluster | None = None, **schedule: Any) -> Outcome:
        """The run on other machines, or with another schedule."""
        config: ScheduleConfig = replace(self.facts.config.schedule, **schedule)
        return simulate(
            cluster or self.facts.cluster,
            config,
            self._workload,
            batches=self._batches,
            warm_up=config.max_staleness + 5,
        )

    def gains(self, groups_per_s: float) -> dict[str, float]:
        """What each cost costs: groups/s without it (or with half of it) over ``groups_per_s``."""
        cluster, share = self.facts.cluster, self.facts.worker_time
        verify = share["verify"] / ((share["verify"] + share["prefill"]) or 1.0)
        relieved = {
            "generation": self.try_out(replace(cluster, workers=2 * cluster.workers)),
            "training": self.try_out(replace(cluster, learners=2 * cluster.learners)),
            "push": self.try_out(replace(cluster, publish_s=0.0, push_s=0.0, swap_s=0.0)),
            "verifier": self.try_out(replace(cluster, group_s=cluster.group_s * (1.0 - verify))),
        }
        if self.facts.config.schedule.max_staleness == 0:
            relieved["turns"] = self.try_out(max_staleness=1)
        elif self.facts.config.schedule.straggler == "wait":
            relieved["stragglers"] = self.try_out(straggler="late")
        return {name: outcome.groups_per_s / groups_per_s for name, outcome in relieved.items()}

    def generation(self) -> float:
        """Groups/s that pass the filter where the learner takes no time and the bound none of the workers'."""
        instant = replace(self.facts.cluster, train_batch_s=0.0, train_token_s=1e-12, publish_s=0.0)
        return self.try_out(instant, max_staleness=LARGE_ETA).groups_per_s

    def etas(self) -> tuple[int, dict[int, float]]:
        """The smallest bound within 2 % of a large one, and groups/s by bound: those that the run's pushes allow."""
        allowed = [eta for eta in (*ETAS, LARGE_ETA) if eta + 1 >= self.facts.cluster.push_every]
        rates = {eta: self.try_out(max_staleness=eta).groups_per_s for eta in allowed}
        best = max(rates.values())
        return min(eta for eta, rate in rates.items() if rate >= ENOUGH * best), rates

    def machines(self) -> list[dict[str, float]]:
        """Groups/s with more workers and faster learners, under the run's own bound."""
        count, rows = self.facts.cluster.workers, []
        for workers in sorted({count, count + 1, 2 * count, 4 * count}):
            for learners in (1.0, 2.0, 4.0):
                done = self.try_out(replace(self.facts.cluster, workers=workers, learners=learners))
                rows.append(
                    {
                        "workers": workers,
                        "learners": learners,
                        "groups_per_s": done.groups_per_s,
                        "learner_busy": done.learner["train"],
                        "workers_busy": 1.0 - done.workers["idle"],
                    }
                )
        return rows


def make_plan(folder: Path, completions: int = COMPLETIONS) -> Plan:
    """The plan of a run folder. Raises ``ConfigError`` if it is none, or too short."""
    facts = read_facts(folder)
    planner = Planner(facts, completions)
    as_it_was = planner.try_out()
    gains = planner.gains(as_it_was.groups_per_s)
    limit = max(gains, key=lambda name: gains[name])
    if gains[limit] < NOTICEABLE:
        limit = "balanced"
    needed, rates = planner.etas()
    cluster = {name: getattr(facts.cluster, name) for name in facts.cluster.__struct_fields__}
    lengths = sorted(length for group in facts.groups for length in group.lengths)
    return Plan(
        run=str(folder),
        batches=facts.batches,
        measured_groups_per_s=facts.groups_per_s,
        predicted_groups_per_s=as_it_was.groups_per_s,
        limit=limit,
        generation_groups_per_s=planner.generation(),
        training_groups_per_s=as_it_was.groups_per_s / (as_it_was.learner["train"] + as_it_was.learner["publish"]),
        sentence=_sentence(facts, limit),
        gains=gains,
        eta=facts.config.schedule.max_staleness,
        eta_needed=needed,
        by_eta=rates,
        by_machines=planner.machines(),
        facts={
            **cluster,
            "filtered_share": facts.filtered,
            "length_median": lengths[len(lengths) // 2],
            "length_p95": lengths[int(0.95 * len(lengths))],
            "length_max": lengths[-1],
            "waits": facts.waits,
            "busy": facts.busy,
            "worker_time": facts.worker_time,
        },
    )


def _sentence(facts: Facts, limit: str) -> str:
    waits = ", ".join(f"{share:.0%} for {cause}" for cause, share in facts.waits.items() if share >= 0.005)
    measured = (
        f"the learner trained {facts.busy:.0%} of the time and waited {sum(facts.waits.values()):.0%}"
        f"{f' ({waits})' if waits else ''}; the workers were idle {facts.worker_time['idle']:.0%}"
    )
    return f"{SAID.get(limit, 'nothing in particular: no single cost is worth more than 3 %')}; {measured}"


def text(plan: Plan) -> str:
    """The plan for people."""
    ratio = plan.predicted_groups_per_s / plan.measured_groups_per_s
    lines = [
        f"{plan.run}: {plan.batches} steady batches",
        f"measured {plan.measured_groups_per_s:.3g} groups/s, simulated with this run's facts "
        f"{plan.predicted_groups_per_s:.3g} ({ratio:.2f} of it)",
        f"limit: {plan.sentence}",
        f"by themselves the workers could deliver {plan.generation_groups_per_s:.3g} groups/s that pass the filter, "
        f"and the learner train {plan.training_groups_per_s:.3g}",
        "",
        "what it would bring     groups/s",
    ]
    names = {
        "generation": "twice the workers",
        "training": "a learner twice as fast",
        "push": "free pushes and swaps",
        "verifier": "free verification",
        "stragglers": "waiting for no straggler",
        "turns": "max_staleness = 1",
    }
    lines += [f"  {names[name]:<24}{gain - 1.0:+8.0%}" for name, gain in plan.gains.items()]
    lines += ["", f"max_staleness is {plan.eta}; needed for 98 % of the best: {plan.eta_needed}"]
    lines += [f"  {eta:>3}  {rate:8.3g} groups/s" for eta, rate in plan.by_eta.items()]
    lines += ["", f"under max_staleness = {plan.eta}:", "  workers  learner   groups/s  learner busy  workers busy"]
    lines += [
        f"  {row['workers']:>7.0f}  {row['learners']:>6.0f}x  {row['groups_per_s']:>9.3g}  {row['learner_busy']:>12.0%}"
        f"  {row['workers_busy']:>12.0%}"
        for row in plan.by_machines
    ]
    return "\n".join(lines)
