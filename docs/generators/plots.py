"""Pictures of results, with matplotlib where it is installed.

Files are the same, byte for byte, for the same result and the same matplotlib: no date, no random names.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Theme(NamedTuple):
    """Colours of a picture that is shown on a page of one brightness."""

    paper: str
    ink: str
    quiet: str  # axes, grid
    line: str
    mark: str

    @property
    def settings(self) -> dict[str, Any]:
        """Of matplotlib."""
        inks = ("axes.labelcolor", "text.color", "xtick.color", "ytick.color")
        papers = ("figure.facecolor", "axes.facecolor")
        sizes = {"font.size": 11, "axes.titlesize": 12, "axes.titlepad": 10}
        return {
            **dict.fromkeys(inks, self.ink),
            **dict.fromkeys(papers, self.paper),
            **sizes,
            "axes.edgecolor": self.quiet,
        }


# GitHub's own papers, so that a picture has no edge on its page.
THEMES = {
    "": Theme(paper="#ffffff", ink="#1f2328", quiet="#d1d9e0", line="#0969da", mark="#bc4c00"),
    "_dark": Theme(paper="#0d1117", ink="#f0f6fc", quiet="#3d444d", line="#58a6ff", mark="#f0883e"),
}


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


def save_quickstart(result: Result, folder: Path) -> None:
    """The quickstart's curves, ``quickstart_curves.svg`` and ``quickstart_curves_dark.svg``: accuracy and length."""
    for suffix, theme in THEMES.items():
        with matplotlib.rc_context(theme.settings):
            figure, (accuracy, length) = pyplot.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
            try:
                _course(accuracy, result, ("accuracy/generated", "heldout/accuracy"), theme)
                accuracy.set_title("right answers", loc="left")
                accuracy.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
                # Where these curves leave room.
                accuracy.text(12, 0.66, "sampled while training", color=theme.line)
                accuracy.text(45.5, 0.86, "held out", color=theme.mark, ha="right")
                _course(length, result, ("length/generated_mean", "heldout/length_mean"), theme)
                length.set_title("tokens in an answer, mean", loc="left")
                length.set_yticks([0, 10, 20, 30, 40])
                figure.savefig(folder / f"quickstart_curves{suffix}.svg", metadata={"Date": None})
            finally:
                pyplot.close(figure)


def _course(axes: Any, result: Result, names: tuple[str, str], theme: Theme) -> None:
    """Sampled answers as a thin line per seed and their median, held-out ones as points."""
    generated, heldout = ([run["curves"][name] for run in result["runs"]] for name in names)
    for points in generated:
        axes.plot(*zip(*points, strict=True), color=theme.line, linewidth=0.8, alpha=0.5)
    axes.plot(*zip(*_median(generated), strict=True), color=theme.line, linewidth=2.2)
    for points in heldout:
        axes.plot(*zip(*points, strict=True), "o", color=theme.mark, markersize=5, zorder=3)
    axes.set_xlabel("batches trained")
    axes.set_xticks(sorted({int(step) for points in heldout for step, _ in points}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=theme.quiet, linewidth=0.6)
    axes.spines[["left", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _median(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """The median over the curves at every place that all of them have."""
    tables = [dict(points) for points in curves]
    return [(x, statistics.median(table[x] for table in tables)) for x in tables[0] if all(x in t for t in tables)]


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
