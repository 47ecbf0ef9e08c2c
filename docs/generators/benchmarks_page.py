"""Writes docs/benchmarks.md from the recorded results: what was measured, how, and what it does not show.

Every file of docs/results has its section; one that is not recorded yet says so. Plots are drawn beside the page where
matplotlib is installed. To show a new results file, add a ``Section`` here and a function in ``tables``.

    python -m docs.generators.benchmarks_page --write docs/benchmarks.md
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.origin import load_results
from docs.generators import gpu_tables, plots, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PLOTS = ROOT / "docs" / "results", ROOT / "docs" / "plots"
RERUN = "python -m docs.generators.benchmarks_page --write docs/benchmarks.md"


class Section(NamedTuple):
    """One results file on the page."""

    name: str  # of docs/results/NAME.json
    title: str
    limits: str  # what the numbers do not show
    lines: Callable[[Mapping[str, Any]], list[str]] = tables.scalars
    plot: Callable[[Any, Mapping[str, Any]], None] | None = None
    command: str = ""  # that makes the file; default: dapo-async bench NAME
    draw: Callable[[Mapping[str, Any], Path], None] | None = None  # in the place of plot: writes NAME.svg itself


_TINY = (
    "A model of 0.6 M parameters on two CPU cores; where time goes is different on GPUs and at billions of parameters."
)
_OVERLAP = f"{_TINY} The policy is frozen, so nothing is said about learning from older groups."

SECTIONS = (
    Section("quickstart", "What a stranger sees: the quickstart from an empty cache", _TINY, tables.quickstart),
    Section(
        "quickstart_curves",
        "The quickstart's curves",
        f"{_TINY} Other runs than in the table above, and no times. Sampled answers are longer than held-out ones "
        "because training chains are (5.3 terms against 5.0, in the mean).",
        tables.quickstart_curves,
        command="dapo-async bench quickstart --curves docs/results/quickstart_curves.json",
        draw=plots.save_quickstart,
    ),
    Section(
        "quickstart_vllm",
        "The quickstart with a vLLM worker",
        "One seed, and vLLM's CPU build, which is a third party's; at this size most is vLLM's overhead per step.",
        tables.quickstart,
        command="dapo-async bench quickstart --seeds 3 --set workers.engine=vllm",
    ),
    Section("overlap", "Asynchronous against synchronous, balanced phases", _OVERLAP, tables.overlap, plots.overlap),
    Section(
        "overlap_training",
        "The same where training takes longer: the module's forward pass, and every group is trained",
        f"{_OVERLAP} Dynamic sampling is off, and so is the fused pass.",
        tables.overlap,
        plots.overlap,
        "dapo-async bench overlap --regime training",
    ),
    Section(
        "overlap_generation",
        "The same where generation takes longer: a later policy, most groups filtered",
        _OVERLAP,
        tables.overlap,
        plots.overlap,
        "dapo-async bench overlap --regime generation",
    ),
    Section(
        "time_to_accuracy",
        "Seconds to a held-out accuracy, synchronous and asynchronous",
        f"{_TINY} Seeds change prompt order and sampling; the warm-started model is one. While a checkpoint is "
        "written, off the clock, an asynchronous worker goes on generating.",
        tables.time_to_accuracy,
        plots.time_to_accuracy,
    ),
    Section(
        "vs_trl",
        "Against TRL's GRPOTrainer with DAPO's loss",
        f"{_TINY} TRL has no dynamic sampling and pads; with vLLM or on GPUs it is another program than here. Only its "
        "threads and microbatch were tuned.",
        tables.vs_trl,
        plots.vs_trl,
    ),
    Section("engine", "The embedded engine against `generate`", f"{_TINY} Random weights.", tables.engine),
    Section(
        "vllm_engine",
        "The vLLM worker's engine against vLLM itself",
        "vLLM's CPU build with a tiny model: the engine's overhead per request shows more here than on a GPU.",
        tables.vllm_engine,
    ),
    Section(
        "coordinator",
        "Groups of 16 × 4,096 tokens that one coordinator takes in",
        "Loopback only: no network between the machines, and no training beside it.",
        tables.coordinator,
    ),
    Section(
        "weights",
        "Weights on their way to the workers",
        "One host: no network is measured. Of the 1.5 and 7 B shapes only the embedding and as many layers as make 0.8 "
        "B parameters were there: their seconds are not those of whole models.",
        tables.weights,
    ),
    Section(
        "gpu",
        "One GPU",
        "One card and one model's shape with random weights; no vLLM on CUDA, no second GPU, and no sequence beyond "
        "1,088 tokens. PyTorch was 2.11, which is not accepted any more. Medians of two or four turns; log-probs and "
        "sampling are not measured in turn. The rival of the copy is PyTorch's plain one, which rounds on the CPU; the "
        "copy has been changed since, to pieces on one stream (docs/log.md).",
        gpu_tables.gpu,
    ),
    Section(
        "gpu_runs",
        "Asynchronous against synchronous on one GPU",
        "A model of 0.6 M parameters, which no GPU is for, with the torch engine.",
        gpu_tables.gpu_runs,
    ),
    Section("hot_paths", "The hot paths of training and decoding", _TINY, tables.hot_paths),
    Section(
        "simulate",
        "The simulator against measured runs",
        "Real workers on two cores, most of them asleep: no cluster was there. The simulator is given what each lease "
        "of the calibration run asked, so it is the mechanics that are tested; with groups drawn at random from that "
        "run it came to 0.87 to 1.05 of what was measured, because 27 batches differ by as much from 27 others.",
        tables.simulate,
    ),
    Section(
        "scale",
        "Clusters that nobody here has, simulated",
        "No cluster was there, and the speeds of a GPU are assumed: the table is no better than they are.",
        tables.scale,
        plots.scale,
    ),
)

INTRODUCTION = f"""# Benchmarks

Made from the files in [docs/results](results) by `{RERUN}`: do not edit.
Each number comes with the command, commit, machine and versions that made it; `dapo-async bench` lists the commands.
Rivals run in turn in one call, and a ratio is the median of the rounds' ratios with its range. `make bench-check`
compares a checkout with the recorded ratios.

"""
WHERE = {
    True: "**On a GPU** only [one section](#one-gpu) was measured; every other number is from CPUs.\n",
    False: "**On a GPU: nothing could be measured yet.** Every number below is from CPUs.\n",
}


def page(results: Mapping[str, Mapping[str, Any]], plotted: Sequence[str]) -> str:
    """The whole page; ``plotted`` names the results that have a picture in docs/plots."""
    known = {section.name for section in SECTIONS}
    others = [
        Section(name, f"{name}.json", "It has no table of its own yet.")
        for name in sorted(results)
        if name not in known
    ]
    parts = [INTRODUCTION + WHERE["gpu" in results]]
    for section in (*SECTIONS, *others):
        parts.append("\n".join(section_lines(section, results.get(section.name), section.name in plotted)))
    return "\n".join(parts)


def section_lines(section: Section, result: Mapping[str, Any] | None, plotted: bool) -> list[str]:
    """The section of one result; of one not recorded, how to record it."""
    lines = [f"## {section.title}", ""]
    if result is None:
        command = section.command or f"dapo-async bench {section.name.replace('_', '-')}"
        out = "" if section.draw else f" --out docs/results/{section.name}.json"
        return [*lines, f"Not measured yet: `{command}{out}`.", ""]
    lines += section.lines(result)
    if plotted:
        lines += ["", f"![{section.title}](plots/{section.name}.svg)"]
    lines += ["", f"*Not shown:* {section.limits}", "", f"*From* {origin_words(result, section.name)}", ""]
    return lines


def origin_words(result: Mapping[str, Any], name: str) -> str:
    """Command, commit, machine, versions, date, seeds and repeats in one line."""
    given = result.get("origin", {})
    if not given:
        return f"[{name}.json](results/{name}.json), without a record of how."
    machine, versions = given["machine"], given["versions"]
    seeds = ", ".join(map(str, given["seeds"]))
    gpus = "".join(f", {gpu}" for gpu in machine.get("gpus", []))
    listed = ", ".join(f"{package} {version}" for package, version in versions.items() if package != "dapo-async")
    return (
        f"[{name}.json](results/{name}.json): `{given['command']}`, commit {given['commit'][:10]}, "
        f"{given['date'][:10]}, {machine['cores']} cores of {machine['cpu']}{gpus}, seeds {seeds}, "
        f"repeats {given['repeats']}; {listed}."
    )


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """Draw every plot whose result is recorded. Returns their names."""
    drawn = []
    for section in SECTIONS:
        result = results.get(section.name)
        if result is None:
            continue
        folder.mkdir(exist_ok=True)
        if section.draw is not None:
            section.draw(result, folder)
            drawn.append(section.name)
        elif section.plot is not None and plots.save(
            section.plot, result, section.title, folder / f"{section.name}.svg"
        ):
            drawn.append(section.name)
    return drawn


def pictures(folder: Path) -> list[str]:
    """Names of the plots that are there."""
    return sorted(path.stem for path in folder.glob("*.svg"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, and its plots beside it")
    parser.add_argument("--no-plots", action="store_true", help="keep the plots as they are")
    arguments = parser.parse_args()
    results = load_results(RESULTS)
    if arguments.write is None:
        print(page(results, pictures(PLOTS)))
        return
    folder = arguments.write.parent / "plots"
    if not arguments.no_plots:
        if plots.available():
            draw(results, folder)
        else:
            print(plots.MISSING, file=sys.stderr)
    arguments.write.write_text(page(results, pictures(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
