"""Asynchronous against synchronous training, on the same cores and the same groups, and against the ceiling.

Placements of the quickstart on two cores, run in turn, several times, in one call:

* split: η = 0, one core samples, one core trains, taking turns;
* colocated: η = 0, both cores for whichever phase runs (the fair rival). Two workers of one thread sample, because
  decoding a small model with two threads is slower than with one; the learner trains with two threads
  (``colocated``) or with one (``colocated_1``), and the better of the two is the rival;
* async_N: η = N, one core samples, one core trains, at the same time; async_1 is one-step-off;
* drain_N: the same, but running completions end before new weights are taken (``workers.in_flight = false``);
* async_2_two_workers: η = 2 with two workers, which share a core with the learner.

The policy is that of the quickstart after some batches, then frozen (a learning rate that moves no weight), so that
all placements sample and train the same kind of groups: terse and worked answers of chains of 3 to 7 terms.

    --regime balanced     policy after 5 batches, dynamic sampling: both phases take about as long
    --regime training     the same policy, no dynamic sampling, the module's slower forward pass: training takes longer
    --regime generation   policy after 20 batches, dynamic sampling: most groups are all right and are filtered

Rates are taken after a warm-up. Tg and Tt are the generation and the training part of a split batch; the ceiling of
overlap alone over split is (Tg + Tt) / max(Tg, Tt). More than that can be reached: at η = 0 every batch ends with a
tail of few running sequences, which asynchronous generation does not have. How much of the gain that is, says
``overlap_summary.straggler``.

    python -m benchmarks.overlap --out overlap.json [--regime balanced] [--repeats 3] [--batches 60]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.accuracy import engine_of
from benchmarks.origin import origin, write_result
from benchmarks.overlap_summary import summarise
from benchmarks.runs import QUIET, frozen_policy, steps, train
from dapo_async.config.settings import Config
from dapo_async.config.toml import load_config
from dapo_async.data.prompts import load_prompts
from workers.engine import Request

WARM_UP = 8  # batches not counted
STEADY_S = 3.0  # of decoding with full slots, measured
SYNC, ASYNC = ["schedule.max_staleness=0"], ["workers.threads=1", "learner.threads=1"]
PLACEMENTS: dict[str, list[str]] = {
    "split": [*SYNC, "workers.threads=1", "learner.threads=1"],
    "colocated": [*SYNC, "workers.count=2", "workers.threads=1", "learner.threads=2"],
    "colocated_1": [*SYNC, "workers.count=2", "workers.threads=1", "learner.threads=1"],
    **{f"async_{eta}": [f"schedule.max_staleness={eta}", *ASYNC] for eta in (1, 2, 4, 8)},
    **{f"drain_{eta}": [f"schedule.max_staleness={eta}", *ASYNC, "workers.in_flight=false"] for eta in (1, 2, 4, 8)},
    "async_2_two_workers": ["schedule.max_staleness=2", *ASYNC, "workers.count=2"],
}
REGIMES: dict[str, tuple[int, list[str], list[str]]] = {  # batches of the policy, settings, placements
    "balanced": (5, [], ["split", "colocated", "colocated_1", "async_1", "async_2", "async_4", "async_8", "drain_2"]),
    "training": (
        5,
        ["schedule.filter=false", "model.forward=module"],
        ["split", "colocated", "colocated_1", "async_2"],
    ),
    "generation": (20, [], ["split", "colocated", "colocated_1", "async_2", "async_2_two_workers"]),
}
FROZEN = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "checkpoint.every=0", "network.heartbeat_s=0.2"]
LEARNER = ("busy", "wait_generation", "wait_straggler", "wait_publish", "wait_workers", "publish", "other")
WORKER = ("decode", "prefill", "verify", "swap", "idle", "other")


def measure(config: str, placement: str, batches: int, settings: list[str], folder: Path) -> dict[str, Any]:
    """One training run of ``placement``, measured after the warm-up: see ``reading``."""
    fixed = [*QUIET, *FROZEN, f"run.batches={batches + WARM_UP}"]
    run_folder = train(config, [*fixed, *settings, *PLACEMENTS[placement]], folder, placement)
    num_workers = 2 if "workers.count=2" in PLACEMENTS[placement] else 1
    return reading([step for step in steps(run_folder) if step["step"] > WARM_UP], num_workers)


def reading(measured: list[dict[str, Any]], num_workers: int) -> dict[str, Any]:
    """Rates, seconds per batch and shares of ``measured`` batches (lines of ``metrics.jsonl``).

    ``worker_tokens_per_s``: tokens generated per second that a worker spent decoding or reading prompts.
    """
    seconds = sum(step["time/step"] for step in measured)

    def share(name: str) -> float:
        told = [step for step in measured if name in step]  # an interval without a heartbeat has no worker's times
        return sum(step[name] * step["time/step"] for step in told) / max(1e-9, sum(s["time/step"] for s in told))

    def mean(name: str) -> float:
        return statistics.mean(step[name] for step in measured if name in step)

    waiting = sum(step["time/wait_data"] for step in measured)
    generated = share("throughput/generated_tokens_per_s")
    decoding = share("worker_time/decode") + share("worker_time/prefill")
    return {
        "groups_per_s": share("throughput/trained_groups_per_s"),
        "trained_tokens_per_s": share("throughput/trained_tokens_per_s"),
        "generated_tokens_per_s": generated,
        "worker_tokens_per_s": generated / num_workers / decoding,
        "measured_s": seconds,
        "wait_s": waiting / len(measured),
        "train_s": (seconds - waiting) / len(measured),
        "learner": {name: share(f"time_share/{name}") for name in LEARNER},
        "worker": {name: share(f"worker_time/{name}") for name in WORKER},
        "staleness": max(step["staleness/max"] for step in measured),
        "staleness_mean": mean("staleness/mean"),
        "mixed_version_share": mean("staleness/mixed_version_share"),
        "length_ratio": measured[-1]["length/trained_generated_ratio"],
        "accuracy": mean("accuracy/generated"),
    }


def steady_rate(config: Config, seconds: float) -> float:
    """Tokens per second of the policy's engine in this process, with one thread and all slots filled all the time."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = load_prompts(config.data.train, tokenizer, config.data, limit=2000).prompts
    slots, size = config.workers.slots, config.sampling.group_size
    engine = engine_of(config.model.path, [tokenizer.eos_token_id], slots, config.longest_sequence_tokens)
    asked = tokens = 0
    started = now = time.perf_counter()
    while now - started < 2 * seconds:  # the first half fills the slots with sequences of all ages
        while engine.waiting < slots:
            prompt = prompts[asked % len(prompts)]
            engine.add(Request(asked, prompt.ids, size, asked, config.sampling.max_tokens))
            asked += 1
        finished = engine.step()
        before, now = now, time.perf_counter()
        if before - started >= seconds:
            tokens += engine.running + len(finished)
    engine.close()
    return tokens / (now - started - seconds)


def show(result: dict[str, Any], console: Console) -> None:
    """A table for people."""
    table = Table(title=f"overlap, {result['regime']} regime: medians, and ratios per round (range)")
    shares = ("learner waits", "worker idle", "η seen")
    for name in ("placement", "groups/s", "tokens/s", "over split", "over colocated", *shares):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for placement, row in result["placements"].items():
        ratios = [
            "{median:.2f}x ({min:.2f} - {max:.2f})".format(**row[rival]) if rival in row else ""
            for rival in ("over_split", "over_colocated")
        ]
        rates = f"{row['groups_per_s']:.1f}", f"{row['trained_tokens_per_s']:,.0f}"
        waits, idle = f"{row['learner_waits']:.0%}", f"{row['worker']['idle']:.0%}"
        table.add_row(placement, *rates, *ratios, waits, idle, f"{row['staleness_mean']:.2f}")
    console.print(table)
    console.print(
        f"split batch: Tg {result['Tg_s']:.3f} s, Tt {result['Tt_s']:.3f} s; ceiling of overlap alone "
        f"{result['ceiling']:.2f}x, reached by async_2: {result['ceiling_share']:.0%}"
    )
    tail = result["straggler"]
    console.print(
        f"tail of a synchronous batch: {tail['tail_share']:.0%} of Tg; of the gain over split, "
        f"{tail['share_of_gain']:.0%} is the missing tail, the rest is overlap"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--regime", choices=REGIMES, default="balanced")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all placements")
    parser.add_argument("--batches", type=int, default=60, help="batches measured per run")
    parser.add_argument("--policy-batches", type=int, help="batches that make the policy; default: the regime's")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, help="default: the regime's")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    policy_batches, regime, placements = REGIMES[arguments.regime]
    policy_batches = policy_batches if arguments.policy_batches is None else arguments.policy_batches
    placements = arguments.placements or placements
    if not {"split", "async_2"} <= set(placements) or not {"colocated", "colocated_1"} & set(placements):
        parser.error("--placements must name split, colocated or colocated_1, and async_2")
    runs: dict[str, list[dict[str, Any]]] = {placement: [] for placement in placements}
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        policy = frozen_policy(arguments.config, policy_batches, arguments.set, Path(folder))
        settings = [*arguments.set, *policy.settings, *regime]
        steady = steady_rate(load_config(arguments.config, settings), STEADY_S)
        for repeat in range(arguments.repeats):
            for placement in placements:
                one = measure(arguments.config, placement, arguments.batches, settings, Path(folder))
                runs[placement].append(one)
                print(f"round {repeat + 1}: {placement:<11} {one['groups_per_s']:6.1f} groups/s", flush=True)
    result = {"regime": arguments.regime, "policy_batches": policy_batches, **summarise(runs, steady)}
    show(result, Console(width=140))
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=arguments.repeats)})


if __name__ == "__main__":
    main()
