"""The simulator against real runs: groups per second predicted and measured, over workers x eta x lengths x delays.

A quickstart policy is trained for a few batches and frozen, as in ``benchmarks.overlap``. A delay per decode step
(``workers.step_delay_s``) makes workers mostly sleep, so that several of them and the learner fit on two cores.

Protocol. The facts of task and machine come from calibration runs alone: one per kind of length and delay, at one
worker and eta = 1 (decode step, time to train a token, pauses, pushes, what each lease asked). Every other
configuration is predicted from the calibration run of its kind, with only what the user sets changed: workers, eta.
The calibration runs' own predictions are marked, and do not count towards the error reported. Beside it stands the
prediction from each run's own facts: if only that one is right, the machine was not the same all the time.

All runs of a kind ask for the same groups: a lease's prompt and seed depend on its number alone, the policy is frozen,
and the embedded engine is batch-invariant. So the simulator replays the calibration run's leases one by one, for as
many batches as were measured. Drawing groups at random instead would compare two samples: at eta = 0 a batch waits
for several groups in turn until enough pass the filter, and 27 such batches differ by 12 % from 27 others.

    python -m benchmarks.simulate --out simulate.json [--batches 40]
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import asdict, replace
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from benchmarks.runs import frozen_policy, train
from dapo_async.errors import ConfigError
from dapo_async.simulate.run_facts import Facts, read_facts, read_groups
from dapo_async.simulate.workload import GroupSpec, replayed

try:
    from dapo_async.simulate.simulate import simulate
except ConfigError as error:  # simpy is not installed
    print(f"dapo-async: {error}", file=sys.stderr)
    sys.exit(error.exit_code)

FROZEN = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "run.target_accuracy=0", "schedule.groups_per_batch=8"]
QUIET = ["evaluation.max_prompts=8", "evaluation.every=0", "checkpoint.every=0"]
# Delay per step and length of the answers decide what a step and a token cost; each kind is calibrated once.
KINDS: dict[str, list[str]] = {
    "fast": ["workers.step_delay_s=0.01"],
    "slow": ["workers.step_delay_s=0.03", "workers.slots=64"],
    "short": ["workers.step_delay_s=0.03", "sampling.max_tokens=24", "reward.overlong_cache_tokens=0"],
}
CALIBRATION = (1, 1)  # workers, eta
MOST_OPEN = 64  # answered leases behind one that is not: those that were in flight when the run ended


class Configuration(NamedTuple):
    """One run."""

    kind: str
    workers: int
    eta: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.workers} workers, eta {self.eta}"


class Measured(NamedTuple):
    """A run: its facts, and what its leases 0, 1, 2, ... asked, as far as all were answered."""

    facts: Facts
    leases: list[GroupSpec]


CONFIGURATIONS = [
    Configuration(kind, workers, eta)
    for kind, places in {
        "fast": [CALIBRATION, (1, 0), (1, 3), (2, 1)],
        "slow": [CALIBRATION, (1, 0), (2, 0), (2, 2), (3, 2)],
        "short": [CALIBRATION, (2, 1), (2, 2), (1, 3)],
    }.items()
    for workers, eta in places
]


def measure(one: Configuration, config: str, batches: int, settings: list[str], folder: Path) -> Measured:
    """Run it for real."""
    own = [f"workers.count={one.workers}", f"schedule.max_staleness={one.eta}", f"run.batches={batches}"]
    name = f"{one.kind}-{one.workers}-{one.eta}"
    run = train(config, [*settings, *FROZEN, *QUIET, *KINDS[one.kind], *own], folder, name)
    asked = read_groups(run)
    answered = list(itertools.takewhile(lambda number: number in asked, itertools.count()))
    if len(asked) - len(answered) > MOST_OPEN:
        raise SystemExit(f"{run}: lease {len(answered)} was never answered, {len(asked)} were: nothing to replay")
    return Measured(read_facts(run), [asked[number] for number in answered])


def predict(one: Configuration, by: Measured, batches: int) -> float:
    """Groups per second of the last ``batches`` batches of ``one``, by what another run told."""
    schedule = replace(by.facts.config.schedule, max_staleness=one.eta)
    cluster = replace(by.facts.cluster, workers=one.workers)
    warm_up = by.facts.config.run.batches - batches
    return simulate(cluster, schedule, replayed(by.leases), batches=batches, warm_up=warm_up).groups_per_s


def compare(config: str, batches: int, settings: list[str], folder: Path, wanted: int) -> list[dict[str, Any]]:
    """Measure and predict the first ``wanted`` configurations of each kind."""
    rows: list[dict[str, Any]] = []
    calibrated: dict[str, Measured] = {}
    seen: dict[str, int] = {}
    for one in CONFIGURATIONS:
        seen[one.kind] = seen.get(one.kind, 0) + 1
        if seen[one.kind] > wanted:
            continue
        measured = measure(one, config, batches, settings, folder)
        source = calibrated.setdefault(one.kind, measured)
        facts = measured.facts
        predicted = predict(one, source, facts.batches)
        own = predict(one, measured, facts.batches)
        rows.append(
            {
                **one._asdict(),
                "calibration": source is measured,
                "batches": facts.batches,
                "measured_groups_per_s": facts.groups_per_s,
                "predicted_groups_per_s": predicted,
                "ratio": predicted / facts.groups_per_s,
                "ratio_own_facts": own / facts.groups_per_s,
                "leases_replayed": len(source.leases),
                "learner_waited": sum(facts.waits.values()),
                "workers_idle": facts.worker_time["idle"],
                "cluster": asdict(facts.cluster),
            }
        )
        told = f"measured {facts.groups_per_s:.2f}, predicted {predicted:.2f}, by its own facts {own:.2f} groups/s"
        print(f"{one.name}: {told}", flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over the configurations that were not calibrated on."""
    errors = [abs(row["ratio"] - 1.0) for row in rows if not row["calibration"]]
    return {
        "configurations": rows,
        "predicted_only": len(errors),
        "error_median": statistics.median(errors) if errors else None,
        "error_max": max(errors, default=None),
        "within_10_percent": sum(error <= 0.1 for error in errors),
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title="groups trained per second: simulated and real")
    for name in ("kind", "workers", "eta", "measured", "predicted", "ratio", "own facts", ""):
        table.add_column(name, justify="left" if name in ("kind", "") else "right")
    for row in result["configurations"]:
        measured, predicted = row["measured_groups_per_s"], row["predicted_groups_per_s"]
        mark = "calibrated on it" if row["calibration"] else ""
        cells = (row["kind"], str(row["workers"]), str(row["eta"]), f"{measured:.2f}", f"{predicted:.2f}")
        table.add_row(*cells, f"{row['ratio']:.2f}", f"{row['ratio_own_facts']:.2f}", mark)
    Console().print(table)
    print(f"within 10 %: {result['within_10_percent']} of {result['predicted_only']} that were predicted only")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--batches", type=int, default=40, help="batches per run, the warm-up included")
    parser.add_argument("--policy-batches", type=int, default=20, help="batches the policy is trained before")
    parser.add_argument("--per-kind", type=int, default=99, help="at most so many configurations of each kind")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        policy = frozen_policy(arguments.config, arguments.policy_batches, arguments.set, Path(folder))
        settings = [*policy.settings, *arguments.set]
        rows = compare(arguments.config, arguments.batches, settings, Path(folder), arguments.per_kind)
    result = summarise(rows) | {"batches": arguments.batches, "wall_s": time.monotonic() - started}
    show(result)
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=1)})


if __name__ == "__main__":
    main()
