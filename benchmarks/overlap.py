"""Asynchronous against synchronous training, on the same cores and the same groups, and against the ceiling.

Placements of the quickstart on two cores, run in turn, several times, in one call:

* split: η = 0, one core samples, one core trains, taking turns;
* colocated: η = 0, both cores for whichever phase runs (the fair rival). Two workers of one thread sample, because
  decoding a small model with two threads is slower than with one; the learner trains with two threads, or with one,
  and the better of the two is the rival;
* async: one core samples, one core trains, at the same time.

The policy is that of the quickstart after ``--policy-batches`` batches, then frozen (a learning rate that moves no
weight), so that all three sample and train the same kind of groups: terse and worked answers of chains of 3 to 7 terms,
with dynamic sampling. Groups per second are taken after a warm-up. Tg and Tt are the generation and the training part
of a split batch; the ceiling of overlap alone over split is (Tg + Tt) / max(Tg, Tt). More than that can be reached:
at η = 0 every batch ends with a tail of few running sequences, which asynchronous generation does not have.

    python -m benchmarks.overlap --out overlap.json [--repeats 3] [--batches 60]
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from benchmarks.runs import train

WARM_UP = 10  # batches not counted
PLACEMENTS: dict[str, list[str]] = {
    "split": ["schedule.max_staleness=0", "workers.threads=1", "learner.threads=1"],
    "colocated": ["schedule.max_staleness=0", "workers.count=2", "workers.threads=1", "learner.threads=2"],
    "colocated_1": ["schedule.max_staleness=0", "workers.count=2", "workers.threads=1", "learner.threads=1"],
    "async": ["schedule.max_staleness=2", "workers.threads=1", "learner.threads=1"],
}


def frozen_policy(config: str, batches: int, seed: int, folder: Path) -> list[str]:
    """Train the quickstart for a while. Returns the settings that start from its result, without its demo."""
    settings = [f"run.seed={seed}", f"run.batches={batches}", "evaluation.max_prompts=8", "evaluation.every=0"]
    trained = train(config, settings, folder, "policy")
    data = json.loads((trained / "config.json").read_text(encoding="utf-8"))["data"]
    model = trained / "checkpoints" / f"step_{batches}"
    return ["demo.task=", f"model.path={model}", f"data.train={data['train']}", f"data.heldout={data['heldout']}"]


def run(config: str, placement: str, batches: int, settings: list[str], folder: Path) -> dict[str, float]:
    """One training run; groups/s and seconds per batch, generating and training, after the warm-up."""
    fixed = [
        f"run.batches={batches + WARM_UP}",
        "run.target_accuracy=0",
        "optimizer.lr=1e-12",
        "optimizer.weight_decay=0",
        "evaluation.max_prompts=8",
        "evaluation.every=0",
        "checkpoint.every=0",
    ]
    newest = train(config, [*fixed, *PLACEMENTS[placement], *settings], folder, placement)
    steps = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "time/step" in step and step["step"] > WARM_UP]
    seconds = sum(step["time/step"] for step in steps)
    groups = sum(step["throughput/trained_groups_per_s"] * step["time/step"] for step in steps)
    waiting = sum(step["time/wait_data"] for step in steps)
    return {
        "groups_per_s": groups / seconds,
        "wait_s": waiting / len(steps),
        "train_s": (seconds - waiting) / len(steps),
        "staleness": max(step["staleness/max"] for step in steps),
    }


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, spreads, speed-ups per round, and the ceiling."""

    def median(placement: str, key: str) -> float:
        return statistics.median(one[key] for one in runs[placement])

    tg, tt = median("split", "wait_s"), median("split", "train_s")
    ceiling = (tg + tt) / max(tg, tt)
    result: dict[str, Any] = {"Tg_s": tg, "Tt_s": tt, "ceiling": ceiling}
    colocated = max(("colocated", "colocated_1"), key=lambda placement: median(placement, "groups_per_s"))
    result["colocated_learner_threads"] = 2 if colocated == "colocated" else 1
    for rival, placement in (("split", "split"), ("colocated", colocated)):
        ratios = [a["groups_per_s"] / b["groups_per_s"] for a, b in zip(runs["async"], runs[placement], strict=True)]
        result[f"sync_{rival}_groups_per_s"] = median(placement, "groups_per_s")
        result[f"speedup_{rival}"] = statistics.median(ratios)
        result[f"speedup_{rival}_range"] = [min(ratios), max(ratios)]
    result["async_groups_per_s"] = median("async", "groups_per_s")
    result["async_staleness_max"] = max(one["staleness"] for one in runs["async"])
    result["ceiling_share"] = result["speedup_split"] / ceiling
    return result | {"runs": runs}


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title="overlap: groups trained per second")
    for name in ("placement", "groups/s", "async is faster by", "range"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for rival in ("split", "colocated"):
        low, high = result[f"speedup_{rival}_range"]
        speedup = f"{result[f'speedup_{rival}']:.2f}x"
        table.add_row(
            f"sync, {rival}", f"{result[f'sync_{rival}_groups_per_s']:.1f}", speedup, f"{low:.2f} - {high:.2f}"
        )
    table.add_row("async", f"{result['async_groups_per_s']:.1f}", "", "")
    console = Console()
    console.print(table)
    console.print(
        f"split batch: Tg {result['Tg_s']:.3f} s, Tt {result['Tt_s']:.3f} s; ceiling over split "
        f"{result['ceiling']:.2f}x, reached {result['ceiling_share']:.0%}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of split, colocated, async")
    parser.add_argument("--batches", type=int, default=60, help="batches measured per run")
    parser.add_argument("--policy-batches", type=int, default=20, help="batches the policy is trained before")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {placement: [] for placement in PLACEMENTS}
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        settings = frozen_policy(arguments.config, arguments.policy_batches, 0, Path(folder)) + arguments.set
        for repeat in range(arguments.repeats):
            for placement in PLACEMENTS:
                one = run(arguments.config, placement, arguments.batches, settings, Path(folder))
                runs[placement].append(one)
                print(f"round {repeat + 1}: {placement:<11} {one['groups_per_s']:6.1f} groups/s", flush=True)
    result = summarise(runs) | {"policy_batches": arguments.policy_batches}
    show(result)
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=arguments.repeats)})


if __name__ == "__main__":
    main()
