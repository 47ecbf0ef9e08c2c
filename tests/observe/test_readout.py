"""What a person reads of a run's numbers."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dapo_async.observe.console import SHOWN, Readout, duration, number, share, summary_lines
from dapo_async.observe.metrics import METRICS

VALUES = {
    "accuracy/trained": 0.625,
    "accuracy/generated": 0.58,
    "heldout/accuracy": 0.47,
    "reward/mean": -0.125,
    "length/mean": 32.06,
    "length/max": 64,
    "staleness/mean": 1.25,
    "staleness/max": 2,
    "throughput/generated_tokens_per_s": 5123.4,
    "throughput/trained_tokens_per_s": np.float32(4800),
    "time/wait_generation": 0.25,
    "time/wait_straggler": 0.5,
    "time/step": 2.0,
    "buffer/groups": 10,
    "buffer/capacity": 48,
    "workers/alive": 1,
    "policy/entropy": 1.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_everything_shown_is_a_declared_metric() -> None:
    assert [name for name in SHOWN if name not in METRICS] == []


def test_the_line_of_a_step() -> None:
    clock = Clock()
    readout = Readout(200, clock=clock)
    readout.update({}, step=11)
    clock.now += 2.0
    readout.update(VALUES, step=12)
    assert readout.line() == (
        "step 12/200 | accuracy 0.625 generated 0.580 heldout 0.470 | reward -0.125 | length 32.1 | "
        "staleness 1.25 max 2 | tokens/s 5,123 generated 4,800 trained | waits straggler 0.50 s (25%) | "
        "buffer 10/48 | workers 1 | left 6:16"  # 188 batches of 2 s
    )


def test_the_line_has_the_same_parts_when_every_number_is_missing() -> None:
    readout = Readout(200, clock=Clock())
    empty = readout.line()
    readout.update(dict.fromkeys(SHOWN), step=1)
    assert readout.line() == empty.replace("step -/200", "step 1/200")
    assert empty == (
        "step -/200 | accuracy - generated - heldout - | reward - | length - | staleness - max - | "
        "tokens/s - generated - trained | waits - | buffer -/- | workers - | left -"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_shown_as_such(value: float) -> None:
    readout = Readout(200, clock=Clock())
    readout.update(dict.fromkeys(SHOWN, value), step=1)
    assert f"reward {value:.3f} |" in readout.line()
    assert dict(readout.rows())["reward"] == f"{value:.3f}"


def test_rows_say_what_the_issue_asks_for() -> None:
    readout = Readout(200, clock=Clock())
    readout.update(VALUES, step=12)
    rows = dict(readout.rows())
    assert list(rows) == [
        "step",
        "accuracy",
        "reward",
        "length",
        "staleness",
        "tokens/s",
        "waits for",
        "buffer",
        "workers",
    ]
    assert rows["length"] == "mean 32.1, max 64 tokens"
    assert rows["buffer"] == "10/48 groups"


def test_a_number_stays_until_a_newer_one_comes() -> None:
    readout = Readout(10, clock=Clock())
    readout.update({"heldout/accuracy": 0.5}, step=1)
    readout.update({"reward/mean": 1.0}, step=2)
    assert "heldout 0.500 | reward 1.000" in readout.line()


def test_what_is_waited_for_now_goes_before_the_longest_wait_of_the_last_step() -> None:
    readout = Readout(10, clock=Clock())
    readout.update({"time/wait_generation": 0.0}, step=1)
    assert dict(readout.rows())["waits for"] == "nothing"
    readout.update({}, waiting="straggler: lease 7")
    readout.update({"buffer/groups": 3})
    assert dict(readout.rows())["waits for"] == "straggler: lease 7"
    readout.update({}, waiting="")
    assert dict(readout.rows())["waits for"] == "nothing"
    readout.update({}, waiting="generation")
    readout.update({}, step=2)
    assert dict(readout.rows())["waits for"] == "nothing"


def test_the_time_left_follows_the_recent_pace_and_the_limit_in_minutes() -> None:
    clock = Clock()
    readout = Readout(1000, max_minutes=2.0, clock=clock)
    for step in range(50):
        clock.now += 0.5 if step < 25 else 0.1
        readout.update({}, step=step)
    # 951 batches of 0.1 s; the slow ones are more than 20 steps ago. The limit would leave 120 - 15 s.
    assert readout.line().endswith("left 1:35")
    clock.now += 100.0
    assert readout.line().endswith("left 0:05")
    clock.now += 100.0
    assert readout.line().endswith("left 0:00")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (None, "-"), (math.inf, "-")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_share_and_number() -> None:
    assert (share(1, 4), share(5, 4), share(-1, 4), share(1, 0)) == (0.25, 1.0, 0.0, 0.0)
    assert (number(None, ".1f"), number("x", ".1f"), number(np.float32(2), ".1f")) == ("-", "-", "2.0")


SUMMARY = {
    "start_accuracy": 0.47,
    "final_accuracy": 0.9561,
    "start_length": 16.04,
    "final_length": 32.98,
    "wall_s": 190.2,
    "warm_start_s": 61.0,
    "steps": 120,
    "groups": {
        "leased": 2000,
        "trained": 1400,
        "filtered_all_right": 350,
        "filtered_all_wrong": 200,
        "expired": 1,
        "in_flight": 30,
        "buffered": 19,
    },
    "generated_tokens_per_s": 5123.0,
    "trained_tokens_per_s": 4800.0,
    "learner_busy": 0.851,
    "worker_busy": 0.93,
    "staleness_mean": 1.25,
    "staleness_max": 2,
}


def test_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: f"/usr/bin/{command}")
    assert summary_lines(SUMMARY, "runs/my run") == [
        "run folder   runs/my run",
        "accuracy     0.470 -> 0.956 (held out)",
        "length       16.0 -> 33.0 tokens (held out)",
        "batches      120 in 3:10, of that warm start 1:01",
        "tokens/s     5,123 generated, 4,800 trained",
        "busy         learner 85%, workers 93%",
        "staleness    mean 1.25, max 2 versions",
        "groups       2,000 leased, 1,400 trained, 350 filtered (all right), 200 filtered (all wrong), 1 expired, "
        "30 in flight, 19 buffered",
        "TensorBoard  tensorboard --logdir 'runs/my run'",
    ]


def test_tensorboard_is_named_with_its_folder_where_the_path_does_not_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert summary_lines(SUMMARY, "runs/x")[-1] == "TensorBoard  tensorboard --logdir runs/x"
    (tmp_path / "tensorboard").touch()
    assert summary_lines(SUMMARY, "runs/x")[-1] == f"TensorBoard  {tmp_path / 'tensorboard'} --logdir runs/x"


@pytest.mark.parametrize("summary", [{}, {"groups": None}, dict.fromkeys(SUMMARY)])
def test_summary_of_a_run_that_ended_early_shows_dashes(summary: dict) -> None:
    lines = summary_lines(summary, "runs/x")
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in summary_lines(SUMMARY, "runs/x")]
    assert "accuracy     - -> - (held out)" in lines
    assert any(line.startswith("groups       - leased, - trained") for line in lines)
