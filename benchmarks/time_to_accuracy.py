"""Wall clock to a fixed held-out accuracy, synchronous (split and colocated) against asynchronous, over seeds.

All runs start from the quickstart's one warm-started model; a seed decides prompt order and sampling. Runs of a seed
follow each other in one call, on the same two cores. The clock counts training alone: it starts when the workers serve
the first weights, and writing checkpoints and evaluation are off it. Afterwards every checkpoint is evaluated by
one evaluator (``benchmarks.accuracy``); time to accuracy is interpolated between checkpoints.

    python -m benchmarks.time_to_accuracy --out time_to_accuracy.json [--seeds 0 1 2] [--target 0.95] [--append]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.accuracy import Evaluator, Point, curve, one_thread, time_to
from benchmarks.origin import continued, origin, read_earlier, write_result
from benchmarks.overlap import PLACEMENTS
from benchmarks.overlap_summary import spread
from benchmarks.runs import QUIET, Material, demo, steps, train
from dapo_async.config.toml import load_config

RIVALS = ("split", "colocated", "async_2")
EVERY = 4  # batches between checkpoints


def clock(measured: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Training seconds at the end of each batch: the steps' time without checkpoints and evaluation."""
    seconds, found = 0.0, {0: 0.0}
    for step in measured:
        seconds += step["time/step"] - step.get("time/checkpoint", 0.0) - step.get("time/evaluation", 0.0)
        found[int(step["step"])] = seconds
    return found


def checkpoints(run_folder: Path, start: str) -> list[tuple[float, Path]]:
    """The model before training and every checkpoint of the run, with its training seconds, in order."""
    at = clock(steps(run_folder))
    found = {int(path.name.removeprefix("step_")): path for path in (run_folder / "checkpoints").glob("step_*")}
    return [(0.0, Path(start)), *((at[step], found[step]) for step in sorted(found))]


def run(config: str, settings: list[str], material: Material, seed: int, batches: int, folder: Path) -> Path:
    """One training run that keeps all its checkpoints. Returns its folder."""
    fixed = [f"run.seed={seed}", f"run.batches={batches}", f"checkpoint.every={EVERY}", "checkpoint.keep_last=1000"]
    return train(config, [*QUIET, *fixed, *material.settings, *settings], folder, f"seed{seed}")


def summarise(runs: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Seconds to the target per rival, and how many times faster async_2 was than each, seed by seed."""
    seconds = {rival: [time_to([Point(*p) for p in one["curves"][rival]], target) for one in runs] for rival in RIVALS}
    result: dict[str, Any] = {"target": target, "seconds": {}, "speedup": {}}
    for rival in RIVALS:
        reached = [value for value in seconds[rival] if value is not None]
        result["seconds"][rival] = {"reached": len(reached), **(spread(reached) if reached else {})}
        pairs = [(s, a) for s, a in zip(seconds[rival], seconds["async_2"], strict=True) if s is not None and a]
        if rival != "async_2" and pairs:
            result["speedup"][rival] = spread([other / ours for other, ours in pairs])
    finals = {rival: [one["curves"][rival][-1][1] for one in runs] for rival in RIVALS}
    return result | {"final_accuracy": {rival: statistics.mean(values) for rival, values in finals.items()}}


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title=f"seconds of training to a held-out accuracy of {result['target']:.2f}: median (range)")
    for name in ("placement", "seconds", "reached", "async_2 is faster by", "final accuracy"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for rival in RIVALS:
        row = result["seconds"][rival]
        seconds = "{median:.1f} ({min:.1f} - {max:.1f})".format(**row) if "median" in row else "never"
        faster = result["speedup"].get(rival)
        text = "{median:.2f}x ({min:.2f} - {max:.2f})".format(**faster) if faster else ""
        reached = f"{row['reached']} of {len(result['runs'])}"
        table.add_row(rival, seconds, reached, text, f"{result['final_accuracy'][rival]:.3f}")
    Console(width=120).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--append", action="store_true", help="add these seeds to those that --out holds already")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=44, help=f"batches per run; a checkpoint every {EVERY}")
    parser.add_argument("--samples", type=int, default=2, help="answers per held-out prompt and checkpoint")
    parser.add_argument("--target", type=float, default=0.95, help="held-out accuracy to reach")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    one_thread()
    earlier = read_earlier(arguments.out) if arguments.append else None
    runs = list(earlier["runs"]) if earlier else []
    material = demo(arguments.config, arguments.set)
    config = load_config(arguments.config, [*arguments.set, *material.settings])
    evaluate = Evaluator(config, material.model, material.heldout, samples=arguments.samples)
    for seed in arguments.seeds:
        curves = {}
        with tempfile.TemporaryDirectory(prefix="time-to-accuracy-") as folder:
            done = {}
            for rival in RIVALS:
                settings = [*arguments.set, *PLACEMENTS[rival]]
                done[rival] = run(arguments.config, settings, material, seed, arguments.batches, Path(folder, rival))
            for rival, run_folder in done.items():
                curves[rival] = curve(evaluate, checkpoints(run_folder, material.model))
                seconds = time_to(curves[rival], arguments.target)
                print(f"seed {seed}: {rival:<9} {'never' if seconds is None else f'{seconds:.1f} s'}", flush=True)
        runs.append({"seed": seed, "curves": curves})
    result = summarise(runs, arguments.target) | {"runs": runs}
    show(result)
    if arguments.out:
        made = continued(origin(arguments.seeds, repeats=1), earlier)
        write_result(arguments.out, result | {"origin": made})


if __name__ == "__main__":
    main()
