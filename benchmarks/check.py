"""Whether this checkout is still as fast as the recorded results say: ratios only, measured quickly, a minute or two.

Two ratios that hold on any machine of the kind that made the recording: asynchronous training over synchronous on
split cores (``overlap``), and the embedded engine over ``generate`` (``engine``). A ratio has fallen if its median is
below the recorded median by more than the recording's own spread. Prints a table; exit code 1 if one has fallen.

    python -m benchmarks.check [--only overlap engine] [--repeats 2]
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.engine import compare
from benchmarks.origin import load_results
from benchmarks.overlap import measure
from benchmarks.runs import frozen_policy

CONFIG, BATCHES = "configs/quickstart.toml", 10
BUSY = 0.7  # load of the last minute: another process had a core


class Recorded(NamedTuple):
    """A ratio as it was recorded."""

    name: str
    median: float
    low: float
    high: float

    @property
    def floor(self) -> float:
        """Below this it has fallen: the median less the recording's spread."""
        return self.median - (self.high - self.low)


class Verdict(NamedTuple):
    """A ratio now, against the recording."""

    recorded: Recorded
    measured: float

    @property
    def fell(self) -> bool:
        """Lower than noise explains."""
        return self.measured < self.recorded.floor


def recorded_overlap(result: Mapping[str, Any]) -> list[Recorded]:
    """Async over split."""
    return [Recorded("overlap: async over split", result["speedup_split"], *result["speedup_split_range"])]


def recorded_engine(result: Mapping[str, Any]) -> list[Recorded]:
    """The engine over ``generate`` at 8 and 64 ragged sequences."""
    rows = {n: result["ragged"][n] for n in ("8", "64")}
    return [Recorded(f"engine: over generate at {n}", row["speedup"], *row["speedup_range"]) for n, row in rows.items()]


def measure_overlap(result: Mapping[str, Any], repeats: int) -> list[float]:
    """The same ratio now, in fewer batches."""
    ratios = []
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        policy = frozen_policy(CONFIG, result["policy_batches"], [], Path(folder))
        for _ in range(repeats):
            pair = [
                measure(CONFIG, placement, BATCHES, policy.settings, Path(folder)) for placement in ("split", "async_2")
            ]
            ratios.append(pair[1]["groups_per_s"] / pair[0]["groups_per_s"])
    return [statistics.median(ratios)]


def measure_engine(result: Mapping[str, Any], repeats: int) -> list[float]:
    """The same ratios now."""
    torch.set_num_threads(1)
    return [float(compare(n, repeats, ragged=True)["speedup"]) for n in (8, 64)]


Checks = Mapping[str, tuple[Callable[[Any], list[Recorded]], Callable[[Any, int], list[float]]]]
CHECKS: Checks = {
    "engine": (recorded_engine, measure_engine),
    "overlap": (recorded_overlap, measure_overlap),
}


def judge(recorded: Sequence[Recorded], measured: Sequence[float]) -> list[Verdict]:
    """Ratio by ratio."""
    return [Verdict(*pair) for pair in zip(recorded, measured, strict=True)]


def show(verdicts: Sequence[Verdict]) -> None:
    """A table for people."""
    table = Table(title="ratios now, against docs/results")
    for name in ("ratio", "recorded (range)", "floor", "now", ""):
        table.add_column(name, justify="left" if name in ("ratio", "") else "right")
    for verdict in verdicts:
        name, median, low, high = verdict.recorded
        word = "FELL" if verdict.fell else "holds"
        floor, now = f"{verdict.recorded.floor:.2f}", f"{verdict.measured:.2f}"
        table.add_row(name, f"{median:.2f} ({low:.2f} - {high:.2f})", floor, now, word)
    Console(width=100).print(table)


def main() -> int:
    """Command line. Returns 1 if a ratio has fallen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="which to measure")
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    arguments = parser.parse_args()
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > BUSY:
        print(f"this machine is busy already (load {load:.1f}): a ratio that falls may be no more than that")
    results, verdicts = load_results(Path(__file__).resolve().parents[1] / "docs" / "results"), []
    for name in arguments.only:
        if name not in results:
            print(f"{name}: nothing recorded in docs/results/{name}.json, nothing to compare with")
            continue
        recorded, measured = CHECKS[name]
        verdicts += judge(recorded(results[name]), measured(results[name], arguments.repeats))
    show(verdicts)
    return int(any(verdict.fell for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
