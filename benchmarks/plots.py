"""Pictures of results, with matplotlib where it is installed.

Files are the same, byte for byte, for the same result and the same matplotlib: no date, no random names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dapo-async", "font.size": 9, "axes.spines.top": False})
    from matplotlib import pyplot
except ImportError:
    pyplot = None  # type: ignore[assignment]

MISSING = 'plots need matplotlib, which is not installed: for example pip install "dapo-async[bench]"'
Result = Mapping[str, Any]
COLOURS = {"split": "#888888", "colocated": "#555555", "colocated_1": "#555555", "trl": "#c44e52", "async": "#4c72b0"}


def available() -> bool:
    """Whether plots can be drawn."""
    return pyplot is not None


def save(plot: Callable[[Any, Result], None], result: Result, title: str, path: Path) -> bool:
    """Draw one picture. False if this result has nothing to draw."""
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    try:
        plot(axes, result)
        if not axes.has_data():
            return False
        axes.set_title(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})
    finally:
        pyplot.close(figure)
    return True


def colour(name: str) -> str:
    """One colour per side, on all pictures."""
    return COLOURS.get(name, COLOURS["async"])


def overlap(axes: Any, result: Result) -> None:
    """Groups per second of every placement, all rounds as points, and what overlap alone could reach."""
    placements = result.get("placements", {})
    for place, name in enumerate(placements):
        rates = [one["groups_per_s"] for one in result["runs"][name]]
        axes.bar(place, placements[name]["groups_per_s"], color=colour(name), width=0.7)
        axes.plot([place] * len(rates), rates, "k.", markersize=4)
    if placements:
        ceiling = result["sync_split_groups_per_s"] * result["ceiling"]
        axes.axhline(ceiling, linestyle="--", color="#dd8452", linewidth=1, label="split with perfect overlap")
        axes.set_xticks(range(len(placements)), placements, rotation=30, ha="right")
        axes.set_ylabel("groups trained per second")
        axes.legend(frameon=False)


def _curves(axes: Any, result: Result) -> None:
    for run in result["runs"]:
        for name, points in run["curves"].items():
            label = name if run is result["runs"][0] else None
            style = ":" if name.endswith("unfiltered") else "-"
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], style, color=colour(name), label=label, linewidth=1
            )
    if result["runs"]:
        axes.axhline(result["target"], linestyle="--", color="#dd8452", linewidth=1)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("held-out accuracy")
        axes.legend(frameon=False)


def time_to_accuracy(axes: Any, result: Result) -> None:
    """Accuracy over training seconds, one line per placement and seed."""
    _curves(axes, result)


def vs_trl(axes: Any, result: Result) -> None:
    """The same for both trainers."""
    _curves(axes, result)


def scale(axes: Any, result: Result) -> None:
    """Groups per second over synchronous DAPO by staleness bound, a line per number of GPUs."""
    rows = [row for row in result["rows"] if row["eta"] or row["oversample"] > 1]
    for gpus in sorted({row["gpus"] for row in rows}):
        own = [row for row in rows if row["gpus"] == gpus]
        base = own[0]["groups_per_s"]
        axes.plot(
            [row["eta"] for row in own], [row["groups_per_s"] / base for row in own], "o-", label=f"{gpus:,} GPUs"
        )
    axes.set_xlabel("max_staleness, batches")
    axes.set_ylabel("groups/s over synchronous")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
