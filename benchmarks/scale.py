"""Plans for clusters that nobody here can run: 8 to 4,096 GPUs, answers of up to 32k tokens, staleness bounds 0 to 8.

For every number of GPUs and every bound the split between generation and training that trains most groups per second
is searched among six shares. ``ASSUMED`` says how fast a GPU is taken to be; none of it is measured, and the answer is
no better than it. Simulated with the schedule that trains for real, by fixed seeds: the table is always the same.

Bound 0 is there twice: with as many leases as a batch has groups, so that what the filter drops is asked for again in
rounds; and, the fair rival, with DAPO's generation batch of three times as many, whose youngest groups are given up.

    python -m benchmarks.scale --out docs/results/scale.json
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.errors import ConfigError
from dapo_async.simulate.cluster import Cluster, Outcome
from dapo_async.simulate.workload import lognormal

try:
    from dapo_async.simulate.simulate import simulate
except ConfigError as error:  # simpy is not installed
    print(f"dapo-async: {error}", file=sys.stderr)
    sys.exit(error.exit_code)

# A dense model of about 7 B parameters, one worker per GPU. Assumed, in seconds and tokens.
ASSUMED: dict[str, float] = {
    "slots": 128,
    "step_s": 0.015,
    "step_row_s": 0.0001,
    "group_s": 0.02,
    "train_tokens_per_gpu_s": 8000,
    "train_batch_s": 1.0,
    "publish_s": 0.5,
    "push_s": 3.0,
    "swap_s": 0.5,
    "length_median": 3000,
    "length_sigma": 1.2,
    "length_limit": 32768,
    "length_shared": 0.5,
    "group_size": 16,
    "passes_filter": 0.5,
}
BOUNDS = ((0, 1.0), (0, 3.0), (1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0))  # eta, oversample
SHARES = (0.375, 0.5, 0.625, 0.75, 0.8125, 0.875)  # of the GPUs that generate
SIZES = {8: (32, 30), 64: (128, 20), 512: (512, 8), 4096: (2048, 8)}  # GPUs: groups per batch, batches simulated
SEED = 0


def cluster(generating: int, training: int) -> Cluster:
    """So many GPUs for each of the two."""
    paces = {name: ASSUMED[name] for name in ("step_s", "step_row_s", "group_s", "publish_s", "push_s", "swap_s")}
    return Cluster(
        workers=generating,
        slots=int(ASSUMED["slots"]),
        train_batch_s=ASSUMED["train_batch_s"] * training,  # what more learners do not shorten
        train_token_s=1.0 / ASSUMED["train_tokens_per_gpu_s"],
        learners=training,
        **paces,
    )


def try_out(gpus: int, eta: int, oversample: float, generating: int) -> Outcome:
    """Simulate one split."""
    batch, batches = SIZES[gpus]
    workload = lognormal(
        ASSUMED["length_median"],
        ASSUMED["length_sigma"],
        int(ASSUMED["length_limit"]),
        int(ASSUMED["group_size"]),
        ASSUMED["passes_filter"],
        ASSUMED["length_shared"],
    )
    schedule = ScheduleConfig(groups_per_batch=batch, max_staleness=eta, oversample=oversample)
    machines = cluster(generating, gpus - generating)
    return simulate(machines, schedule, workload, batches=batches, warm_up=2 * eta + 2, seed=SEED)


def best(gpus: int, eta: int, oversample: float) -> dict[str, Any]:
    """The best split for this bound."""
    started, events, found = time.process_time(), 0, None
    for generating in sorted({min(gpus - 1, max(1, round(share * gpus))) for share in SHARES}):
        outcome = try_out(gpus, eta, oversample, generating)
        events += outcome.events
        if found is None or outcome.groups_per_s > found[1].groups_per_s:
            found = generating, outcome
    assert found is not None
    generating, outcome = found
    return {
        "gpus": gpus,
        "eta": eta,
        "oversample": oversample,
        "groups_per_batch": SIZES[gpus][0],
        "generating": generating,
        "groups_per_s": outcome.groups_per_s,
        "tokens_per_s_per_gpu": outcome.tokens_per_s / gpus,
        "learner": outcome.learner,
        "workers": outcome.workers,
        "trained_generated_ratio": outcome.trained_generated_ratio,
        "running_mean": outcome.running_mean,
        "events": events,
        "simulation_cpu_s": time.process_time() - started,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--gpus", type=int, nargs="+", choices=list(SIZES), default=list(SIZES))
    arguments = parser.parse_args()
    rows = []
    print(" GPUs eta over generate  groups/s tok/s/GPU  learner    events CPU s")
    for gpus in arguments.gpus:
        for eta, oversample in BOUNDS:
            row = best(gpus, eta, oversample)
            rows.append(row)
            print(
                f"{gpus:>5} {eta:>3} {oversample:>4.0f} {row['generating']:>8} {row['groups_per_s']:>9.2f} "
                f"{row['tokens_per_s_per_gpu']:>9.0f} {row['learner']['train']:>8.0%} {row['events']:>9} "
                f"{row['simulation_cpu_s']:>5.1f}",
                flush=True,
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"assumed": ASSUMED, "rows": rows, "origin": origin(seeds=[SEED], repeats=1)}
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
