"""What a stranger sees first: the quickstart, from an empty cache, for several seeds.

Start and end accuracy and length on the held-out chains, and the wall clock of the whole command, warm start included
and installation not. The curves of accuracy and length over the batches go into a file of their own, so that they can
be recorded where other programs would spoil the times.

    python benchmarks/quickstart.py --out quickstart.json [--seeds 3 4 5] [--set workers.engine=vllm]
    python benchmarks/quickstart.py --curves docs/results/quickstart_curves.json
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from benchmarks.runs import logged, train

SHOWN = {
    "start_accuracy": "{:.3f}",
    "final_accuracy": "{:.3f}",
    "start_length": "{:.1f}",
    "final_length": "{:.1f}",
    "warm_start_s": "{:.0f}",
    "command_wall_s": "{:.0f}",
}
CURVES = ("heldout/accuracy", "heldout/length_mean", "accuracy/generated", "length/generated_mean")


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Every metric of ``CURVES`` as points of batches trained and value, from the ``lines`` that a run logged.

    A held-out evaluation is told some batches after the version that it is of, and stands at that version.
    """
    points: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for line in lines:
        for name in CURVES:
            if line.get(name) is not None:
                step = line["heldout/version"] if name.startswith("heldout/") else line["step"]
                points[name].append([step, round(line[name], 4)])
    return points


def show(runs: list[dict[str, Any]]) -> None:
    """A table for people."""
    table = Table(title="quickstart")
    for name in ("seed", *SHOWN):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(str(run["seed"]), *(form.format(run[name]) for name, form in SHOWN.items()))
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument(
        "--curves", type=Path, metavar="FILE", help="write accuracy and length by batch to this JSON file"
    )
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    courses: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
            settings = [f"run.seed={seed}", f"demo.cache={folder}/cache", *arguments.set]
            started = time.monotonic()
            run = train(arguments.config, settings, Path(folder), "quickstart")
            wall = time.monotonic() - started
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            courses.append({"seed": seed, "curves": curves(logged(run))})
        runs.append({"seed": seed, "command_wall_s": wall, **summary})
        print(
            f"seed {seed}: {summary['start_accuracy']:.3f} -> {summary['final_accuracy']:.3f}, {wall:.0f} s", flush=True
        )
    show(runs)
    if arguments.out:
        write_result(arguments.out, {"runs": runs, "origin": origin(arguments.seeds, repeats=1)})
    if arguments.curves:
        write_result(arguments.curves, {"runs": courses, "origin": origin(arguments.seeds, repeats=1)})


if __name__ == "__main__":
    main()
