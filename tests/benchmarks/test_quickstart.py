"""The quickstart's curves: which numbers of a run they keep, and the picture that is made of them."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quickstart import CURVES, curves
from docs.generators import benchmarks_page as report
from docs.generators import plots, tables


def a_run(*accuracies: float) -> dict[str, Any]:
    """One seed: generated accuracies from the first batch on, held out before it and at its end."""
    generated = [[step, accuracy] for step, accuracy in enumerate(accuracies, start=1)]
    ends = [[0, 0.25], [len(accuracies), accuracies[-1]]]
    values = {"accuracy/generated": generated, "heldout/accuracy": ends}
    lengths = {"length/generated_mean": generated, "heldout/length_mean": ends}
    return {"seed": 3, "curves": {**values, **lengths}}


def test_curves_keep_what_was_logged_at_the_version_it_is_of() -> None:
    lines = [
        {"step": 0, "heldout/version": 0, "heldout/accuracy": 0.25, "heldout/length_mean": 13.0},
        {"step": 1, "accuracy/generated": 0.123456, "length/generated_mean": 14.0, "policy/loss": 1.0},
        {"step": 2, "accuracy/generated": None},  # not finite
        {"step": 3, "accuracy/generated": 0.5, "heldout/version": 1, "heldout/accuracy": 0.5},
    ]
    assert curves(lines) == {
        "heldout/accuracy": [[0, 0.25], [1, 0.5]],
        "heldout/length_mean": [[0, 13.0]],
        "accuracy/generated": [[1, 0.1235], [3, 0.5]],
        "length/generated_mean": [[1, 14.0]],
    }
    assert list(curves([])) == list(CURVES)


def test_both_pictures_are_drawn_and_the_same_result_draws_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = {"runs": [a_run(*(0.4 + step / 90 for step in range(length))) for length in (45, 44)]}
    assert report.draw({"quickstart_curves": result}, tmp_path) == ["quickstart_curves"]
    light, dark = tmp_path / "quickstart_curves.svg", tmp_path / "quickstart_curves_dark.svg"
    first = light.read_bytes(), dark.read_bytes()
    assert plots.THEMES[""].paper.encode() in first[0]
    assert plots.THEMES["_dark"].paper.encode() in first[1]
    plots.save_quickstart(result, tmp_path)
    assert first == (light.read_bytes(), dark.read_bytes())


def test_a_median_is_of_the_batches_that_every_seed_has() -> None:
    pytest.importorskip("matplotlib")
    assert plots._median([[[1, 4.0], [2, 8.0], [3, 9.0]], [[1, 2.0], [2, 4.0]]]) == [(1, 3.0), (2, 6.0)]


def test_a_row_says_what_each_seed_had() -> None:
    lines = tables.quickstart_curves({"runs": [a_run(0.3, 0.5), {**a_run(0.2, 0.75), "seed": 4}]})
    assert lines[0] == "| batches trained | held-out accuracy of seeds 3, 4 | answer length, tokens |"
    assert lines[-1] == "| 2 | 0.5000, 0.7500 | 0.5, 0.8 |"
