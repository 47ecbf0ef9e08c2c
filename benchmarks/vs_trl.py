"""Against TRL's GRPOTrainer with DAPO's loss: the same model, task, batch, learning rate and two cores, in turn.

Two parts, each with every side in a subprocess of its own, one after the other:

* throughput: a policy frozen after ``--policy-batches`` batches; groups trained per second after a warm-up, TRL against
  asynchronous ``dapo-async train`` with dynamic sampling and without it (TRL trains every group), tokens per second
  and the most resident memory of all processes of a side;
* accuracy: seconds of training from the warm-started model to a held-out accuracy. The clock counts training alone;
  weights are saved off it and evaluated afterwards by one evaluator (``benchmarks.accuracy``).

TRL gets the best of a few settings of threads and microbatch, found before by short runs. Rewards are computed by this
project's verifier and punishment on both sides; ``trl_run`` checks on its first batch that texts and stops agree.

    python -m benchmarks.vs_trl --out vs_trl.json [--repeats 3] [--seeds 0 1 2] [--target 0.95]
    python -m benchmarks.vs_trl --out vs_trl.json --append --repeats 0 --seeds 3        # adds a seed
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.accuracy import Evaluator, Point, curve, one_thread, time_to
from benchmarks.origin import continued, origin, read_earlier, write_result
from benchmarks.overlap import PLACEMENTS, WARM_UP, reading
from benchmarks.overlap_summary import spread
from benchmarks.runs import QUIET, Material, demo, frozen_policy, run, steps, train_measured
from benchmarks.time_to_accuracy import checkpoints
from dapo_async.config.toml import load_config

TOLD = "told.json"  # of ``trl_run``
NEEDED = ("trl", "datasets")
OURS = {"async": [], "async_unfiltered": ["schedule.filter=false"]}
SIDES = (*OURS, "trl")
ASYNC = PLACEMENTS["async_2"]
STILL = "1e-12"  # a learning rate that moves no weight
TRIED = ((2, 128), (2, 32), (2, 16), (1, 32))  # TRL: threads, completions per forward pass
TRL_WARM_UP, TRL_TRIAL = 3, 8  # steps not counted, and of a trial
EVERY = 4  # batches (steps) between saved weights, on both sides


class Setup(NamedTuple):
    """What both sides start from."""

    config: str
    given: list[str]  # settings from the command line
    material: Material

    @property
    def settings(self) -> list[str]:
        return [*self.given, *self.material.settings]

    @property
    def groups(self) -> int:
        """Groups per batch."""
        return load_config(self.config, self.settings).schedule.groups_per_batch


def run_trl(setup: Setup, out: Path, tuning: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """One run of ``trl_run`` with these threads and completions per pass: what it told, and its peak memory in MiB."""
    command = [sys.executable, "-m", "benchmarks.trl_run", "--config", setup.config, "--out", str(out)]
    for name, value in {"threads": tuning[0], "microbatch": tuning[1], **options}.items():
        command += [f"--{name}", str(value)]
    for setting in setup.settings:
        command += ["--set", setting]
    finished = run(command)
    return {**json.loads((out / TOLD).read_text(encoding="utf-8")), "peak_rss_mb": finished.peak_rss_mb}


def trl_reading(told: Mapping[str, Any], groups: int) -> dict[str, float]:
    """Rates after the warm-up. TRL trains every token it generates."""
    seconds = told["seconds"][-1] - told["seconds"][TRL_WARM_UP - 1]
    measured = len(told["seconds"]) - TRL_WARM_UP
    tokens = sum(told["tokens"][TRL_WARM_UP : len(told["seconds"])]) / seconds
    return {
        "groups_per_s": groups * measured / seconds,
        "generated_tokens_per_s": tokens,
        "trained_tokens_per_s": tokens,
        "measured_s": seconds,
        "peak_rss_mb": told["peak_rss_mb"],
    }


def best_trl(setup: Setup, folder: Path) -> tuple[tuple[int, int], dict[str, float]]:
    """Threads and microbatch with which TRL trains most groups per second, and what each pair that was tried gave."""
    groups, rates = setup.groups, {}
    for threads, microbatch in TRIED:
        told = run_trl(setup, folder / "trial", (threads, microbatch), {"steps": TRL_TRIAL, "lr": STILL})
        rates[threads, microbatch] = trl_reading(told, groups)["groups_per_s"]
        print(f"trl, {threads} threads, microbatch {microbatch}: {rates[threads, microbatch]:.1f} groups/s", flush=True)
    named = {f"{threads} threads, microbatch {microbatch}": rate for (threads, microbatch), rate in rates.items()}
    return max(rates, key=lambda tried: rates[tried]), named


def throughput_round(setup: Setup, best: Sequence[int], amount: tuple[int, int], folder: Path) -> dict[str, Any]:
    """One round of all sides on a frozen policy; ``amount``: batches measured of ours, and of TRL's."""
    found: dict[str, Any] = {}
    fixed = [*QUIET, f"optimizer.lr={STILL}", "optimizer.weight_decay=0", "checkpoint.every=0"]
    for side, own in OURS.items():
        settings = [*fixed, *setup.settings, *ASYNC, *own, f"run.batches={amount[0] + WARM_UP}"]
        run_folder, peak = train_measured(setup.config, settings, folder, side)
        found[side] = reading([step for step in steps(run_folder) if step["step"] > WARM_UP], 1) | {"peak_rss_mb": peak}
    told = run_trl(setup, folder / "trl", best, {"steps": amount[1] + TRL_WARM_UP, "lr": STILL})
    found["trl"] = trl_reading(told, setup.groups)
    print("  ".join(f"{side}: {one['groups_per_s']:.1f} groups/s" for side, one in found.items()), flush=True)
    return found


def accuracy_seed(setup: Setup, best: Sequence[int], seed: int, arguments: Any, folder: Path) -> dict[str, Any]:
    """One seed of all sides: curves of held-out accuracy over training seconds."""
    config = load_config(setup.config, setup.settings)
    written = {}
    for side, own in OURS.items():
        fixed = [f"run.seed={seed}", f"run.batches={arguments.batches}", f"checkpoint.every={EVERY}"]
        settings = [*QUIET, *fixed, "checkpoint.keep_last=1000", *setup.settings, *ASYNC, *own]
        run_folder, _ = train_measured(setup.config, settings, folder, side)
        written[side] = checkpoints(run_folder, setup.material.model)
    limits = {"steps": 100_000, "max-seconds": arguments.trl_seconds, "save-every": EVERY, "seed": seed}
    told = run_trl(setup, folder / "trl", best, limits)
    written["trl"] = [(0.0, Path(setup.material.model)), *((seconds, Path(path)) for seconds, path in told["saved"])]
    evaluate = Evaluator(config, setup.material.model, setup.material.heldout, samples=arguments.samples)
    curves = {side: curve(evaluate, saved) for side, saved in written.items()}
    for side, points in curves.items():
        seconds = time_to(points, arguments.target)
        print(f"seed {seed}: {side:<16} {'never' if seconds is None else f'{seconds:.1f} s'}", flush=True)
    return {"seed": seed, "curves": curves}


def summarise(rounds: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Medians, ratios per round and per seed; ``None`` in ``seconds`` where the target was not reached in time."""
    result: dict[str, Any] = {"target": target, "throughput": {}, "speedup": {}, "seconds": {}, "time_speedup": {}}
    for side in SIDES if rounds else ():
        numeric = [name for name, value in rounds[0][side].items() if isinstance(value, int | float)]
        result["throughput"][side] = {n: statistics.median(one[side][n] for one in rounds) for n in numeric}
    for side in OURS if rounds else ():
        rates = [one[side]["groups_per_s"] / one["trl"]["groups_per_s"] for one in rounds]
        result["speedup"][side] = spread(rates)
    for side in SIDES if seeds else ():
        result["seconds"][side] = [time_to([Point(*p) for p in one["curves"][side]], target) for one in seeds]
    for side in OURS if seeds else ():
        pairs = zip(result["seconds"]["trl"], result["seconds"][side], strict=True)
        ratios = [trl / ours for trl, ours in pairs if trl is not None and ours]
        result["time_speedup"][side] = spread(ratios) if ratios else None
    return result | {"rounds": list(rounds), "runs": list(seeds)}


def show(result: Mapping[str, Any]) -> None:
    """Two tables for people."""
    console = Console(width=120)
    if result["throughput"]:
        table = Table(title="frozen policy: medians; ratio to TRL per round (range)")
        for name in ("side", "groups/s", "over TRL", "trained tokens/s", "generated tokens/s", "peak memory MiB"):
            table.add_column(name, justify="left" if name == "side" else "right")
        for side, row in result["throughput"].items():
            ratio = result["speedup"].get(side)
            over = "{median:.2f}x ({min:.2f} - {max:.2f})".format(**ratio) if ratio else ""
            tokens = f"{row['trained_tokens_per_s']:,.0f}", f"{row['generated_tokens_per_s']:,.0f}"
            table.add_row(side, f"{row['groups_per_s']:.1f}", over, *tokens, f"{row['peak_rss_mb']:,.0f}")
        console.print(table)
    if result["seconds"]:
        table = Table(title=f"seconds of training to a held-out accuracy of {result['target']:.2f}")
        for name in ("side", "seconds, seed by seed", "faster than TRL by"):
            table.add_column(name)
        for side, seconds in result["seconds"].items():
            ratio = result["time_speedup"].get(side)
            faster = "{median:.2f}x ({min:.2f} - {max:.2f})".format(**ratio) if ratio else ""
            table.add_row(side, ", ".join("never" if s is None else f"{s:.1f}" for s in seconds), faster)
        console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--append", action="store_true", help="add rounds and seeds to those that --out holds already")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of throughput; 0: none")
    parser.add_argument("--policy-batches", type=int, default=20, help="batches the frozen policy is trained before")
    parser.add_argument(
        "--measured", type=int, nargs=2, default=(80, 15), help="batches of ours and of TRL's per round"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of time to accuracy; none: leave out")
    parser.add_argument("--batches", type=int, default=44, help="our batches per seed")
    parser.add_argument("--trl-seconds", type=float, default=90.0, help="most seconds of training TRL gets per seed")
    parser.add_argument("--trl", type=int, nargs=2, metavar=("THREADS", "MICROBATCH"), help="default: the best tried")
    parser.add_argument("--samples", type=int, default=2, help="answers per held-out prompt and saved weights")
    parser.add_argument("--target", type=float, default=0.95, help="held-out accuracy to reach")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one setting on both sides"
    )
    arguments = parser.parse_args()
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise SystemExit(
            f"this benchmark runs TRL, and {', '.join(missing)} is not installed: "
            'install it, for example with pip install "dapo-async[bench]"'
        )
    one_thread()
    earlier = read_earlier(arguments.out) if arguments.append else None
    made = continued(origin(arguments.seeds, arguments.repeats), earlier)
    before = earlier or {"rounds": [], "runs": [], "trl_best": [], "trl_tried": {}}
    rounds, seeds, tried = list(before["rounds"]), list(before["runs"]), before["trl_tried"]
    best = arguments.trl or before["trl_best"]
    start = Setup(arguments.config, arguments.set, demo(arguments.config, arguments.set))
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as name:
        folder = Path(name)
        if arguments.repeats or not best:
            policy = frozen_policy(arguments.config, arguments.policy_batches, arguments.set, folder)
            frozen = start._replace(material=policy)
            if not best:
                best, tried = best_trl(frozen, folder)
            rounds += [throughput_round(frozen, best, arguments.measured, folder) for _ in range(arguments.repeats)]
        for seed in arguments.seeds:
            seeds.append(accuracy_seed(start, best, seed, arguments, folder / f"seed{seed}"))
    result = {"trl_best": list(best), "trl_tried": tried, **summarise(rounds, seeds, arguments.target)}
    show(result)
    if arguments.out:
        write_result(arguments.out, result | {"origin": {**made, "repeats": len(rounds)}})


if __name__ == "__main__":
    main()
