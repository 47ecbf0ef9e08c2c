"""The measuring sticks: what they compute from readings, what they print, how they are started. Nothing is timed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import overlap, vs_trl
from benchmarks.__main__ import benchmarks
from benchmarks.accuracy import Point, rewards, time_to
from benchmarks.check import Recorded, judge
from benchmarks.origin import FIELDS, continued, load_results, origin, read_earlier
from benchmarks.overlap_summary import straggler, summarise
from benchmarks.runs import run
from benchmarks.scale import ASSUMED
from benchmarks.time_to_accuracy import clock
from benchmarks.time_to_accuracy import summarise as summarise_times
from dapo_async.config.toml import build_config
from docs.generators import benchmarks_page as report
from docs.generators import plots, tables
from docs.generators.gpu_tables import gpu, gpu_runs
from tests import ROOT

ORIGIN: dict[str, Any] = {
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cores": 2, "cpu": "a CPU"},
    "versions": {"python": "3.11", "torch": "2.13"},
    "command": "python -m benchmarks.x",
    "seeds": [0],
    "repeats": 3,
}


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dapo_async.cli", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


# --- the command -----------------------------------------------------------------------------------------


def test_bench_lists_what_there_is_in_one_line_each() -> None:
    done = bench()
    assert done.returncode == 0
    for name, question in benchmarks().items():
        assert any(line.split(maxsplit=1) == [name, question] for line in done.stdout.splitlines()), name
    assert {"overlap", "time_to_accuracy", "vs_trl", "engine", "coordinator"} <= set(benchmarks())
    assert "trl_run" not in benchmarks()


def test_an_unknown_benchmark_is_one_sentence_with_the_list() -> None:
    done = bench("overlab", "--repeats", "1")
    assert done.returncode == 2
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("dapo-async: there is no benchmark 'overlab'; there are check, coordinator, ")


def test_arguments_reach_the_benchmark_and_hyphens_are_underscores() -> None:
    done = bench("time-to-accuracy", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: time_to_accuracy.py")
    done = bench("overlap", "--regime", "sideways")
    assert done.returncode == 2
    assert "invalid choice: 'sideways'" in done.stderr


def test_a_missing_trl_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "argv", ["vs_trl"])
    with pytest.raises(SystemExit, match=r'trl, datasets is not installed: .* pip install "dapo-async\[bench\]"'):
        vs_trl.main()


def test_a_command_is_watched_and_its_failure_told() -> None:
    finished = run([sys.executable, "-c", "import time; print('made it'); time.sleep(0.8)"])
    assert finished.output == "made it\n"
    assert finished.peak_rss_mb > 1.0
    with pytest.raises(SystemExit, match=r"ended with 3:\nits last words"):
        run([sys.executable, "-c", "print('its last words'); raise SystemExit(3)"])


# --- overlap ---------------------------------------------------------------------------------------------


# A benchmark, and what it runs: the latter says that it is there, and sleeps.
BENCHMARK = """
import signal, sys
from benchmarks.runs import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
run([sys.executable, "-c", "import os, time; print(os.getpid(), file=open('child', 'w'), flush=True); time.sleep(60)"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_benchmark_that_is_ended_ends_what_it_started(tmp_path: Path, number: signal.Signals, code: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", BENCHMARK], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=100)
    assert process.returncode == code
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def a_run(groups_per_s: float, wait_s: float = 0.4, train_s: float = 0.4, rate: float = 5000.0) -> dict[str, Any]:
    return {
        "groups_per_s": groups_per_s,
        "trained_tokens_per_s": 1000.0,
        "wait_s": wait_s,
        "train_s": train_s,
        "worker_tokens_per_s": rate,
        "staleness": 2,
        "staleness_mean": 1.5,
        "length_ratio": 1.0,
        "accuracy": 0.56,
        "learner": {"busy": 0.5, "wait_generation": 0.25, "wait_publish": 0.125},
        "worker": {"decode": 0.4, "prefill": 0.1, "idle": 0.5},
    }


def test_speed_ups_are_medians_of_ratios_within_a_round() -> None:
    runs = {
        "split": [a_run(10.0), a_run(20.0), a_run(30.0)],
        "colocated": [a_run(12.0), a_run(22.0), a_run(32.0)],
        "colocated_1": [a_run(16.0), a_run(25.0), a_run(30.0)],
        "async_2": [a_run(20.0), a_run(30.0), a_run(60.0)],
    }
    result = summarise(runs, steady_rate=10_000.0)
    assert result["speedup_split"] == 2.0  # 2, 1.5, 2
    assert result["speedup_split_range"] == [1.5, 2.0]
    assert result["sync_colocated_groups_per_s"] == 25.0  # the better of the two rivals
    assert result["colocated_learner_threads"] == 1
    assert result["speedup_colocated"] == 1.25  # 1.25, 1.2, 2
    assert result["ceiling"] == 2.0
    assert result["placements"]["async_2"]["learner_waits"] == 0.375
    assert "over_split" not in result["placements"]["colocated"]


def test_the_tail_and_its_share_of_the_gain() -> None:
    # 0.4 s of decoding at half the steady rate: 0.2 s are tail. Without it 0.8 s would be 0.6 s.
    found = straggler(0.4, 0.4, 0.4, 5000.0, 10_000.0, speedup=16 / 9)
    assert found["tail_s"] == pytest.approx(0.2)
    assert found["tail_share"] == pytest.approx(0.5)
    assert found["gain"] == pytest.approx(4 / 3)
    assert found["share_of_gain"] == pytest.approx(0.5)  # (4/3)^2 = 16/9


def test_no_tail_and_no_gain_have_no_share() -> None:
    assert straggler(0.4, 0.4, 0.4, 10_000.0, 9_000.0, speedup=1.5)["share_of_gain"] == 0.0
    assert straggler(0.4, 0.4, 0.4, 5000.0, 10_000.0, speedup=0.9)["share_of_gain"] == 0.0


def test_a_reading_weighs_batches_by_their_seconds() -> None:
    def step(seconds: float, rate: float, **more: float) -> dict[str, float]:
        shares = {f"time_share/{name}": 0.1 for name in overlap.LEARNER}
        return {
            **shares,
            "time/step": seconds,
            "time/wait_data": 0.25 * seconds,
            "throughput/trained_groups_per_s": rate,
            "throughput/trained_tokens_per_s": 10 * rate,
            "throughput/generated_tokens_per_s": 20 * rate,
            "staleness/max": 2,
            "staleness/mean": 1.0,
            "staleness/mixed_version_share": 0.5,
            "length/trained_generated_ratio": rate,
            "accuracy/generated": 0.5,
            **more,
        }

    working = {f"worker_time/{name}": 0.0 for name in overlap.WORKER} | {"worker_time/decode": 0.5}
    found = overlap.reading([step(1.0, 40.0, **working), step(3.0, 20.0)], num_workers=2)
    assert found["groups_per_s"] == 25.0  # 100 groups in 4 s
    assert found["worker_tokens_per_s"] == 500.0  # 20 x 25 tokens/s, from half the time of two workers
    assert (found["wait_s"], found["train_s"]) == (0.5, 1.5)
    assert found["length_ratio"] == 20.0  # of the last batch: it is a running total
    assert found["worker"]["decode"] == 0.5  # the second interval told nothing


def test_every_regime_has_what_the_summary_needs() -> None:
    for _, _, placements in overlap.REGIMES.values():
        assert {"split", "colocated", "colocated_1", "async_2"} <= set(placements) <= set(overlap.PLACEMENTS)


# --- time to accuracy ------------------------------------------------------------------------------------


def test_time_to_accuracy_is_interpolated_at_the_first_crossing() -> None:
    points = [Point(0.0, 0.4, 10.0), Point(10.0, 0.6, 20.0), Point(20.0, 0.5, 20.0), Point(30.0, 0.9, 20.0)]
    assert time_to(points, 0.5) == pytest.approx(5.0)
    assert time_to(points, 0.6) == 10.0
    assert time_to(points, 0.7) == pytest.approx(25.0)
    assert time_to(points, 0.4) == 0.0
    assert time_to(points, 0.2) == 0.0
    assert time_to(points, 0.95) is None


def test_the_clock_stands_still_for_checkpoints_and_evaluation() -> None:
    steps = [
        {"step": 1, "time/step": 2.0, "time/evaluation": 0.5},
        {"step": 2, "time/step": 3.0, "time/checkpoint": 1.0},
    ]
    assert clock(steps) == {0: 0.0, 1: 1.5, 2: 3.5}


def a_curve(seconds: float) -> list[Point]:
    return [Point(0.0, 0.0, 1.0), Point(seconds, 1.0, 1.0)]


def test_times_of_seeds_are_compared_seed_by_seed() -> None:
    never = [Point(0.0, 0.0, 1.0), Point(9.0, 0.1, 1.0)]
    runs = [
        {"seed": 0, "curves": {"split": a_curve(40.0), "colocated": a_curve(30.0), "async_2": a_curve(20.0)}},
        {"seed": 1, "curves": {"split": a_curve(90.0), "colocated": never, "async_2": a_curve(30.0)}},
    ]
    result = summarise_times(runs, 0.5)
    assert result["speedup"]["split"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert result["seconds"]["colocated"] == {"reached": 1, "median": 15.0, "min": 15.0, "max": 15.0}
    assert result["final_accuracy"]["async_2"] == 1.0


def test_rewards_are_the_learners() -> None:
    table = {
        "model": {"path": "unused"},
        "data": {"train": "unused"},
        "sampling": {"max_tokens": 10},
        "reward": {"verifier": "sums", "overlong_cache_tokens": 4},
    }
    config = build_config(table, "test")
    assert rewards(["#7", "#8", "#7", "3+4=7;"], ["7"] * 4, [2, 2, 8, 10], config) == [1.0, -1.0, 0.5, -2.0]


# --- against TRL -----------------------------------------------------------------------------------------


def test_the_rival_is_read_after_its_warm_up() -> None:
    told = {"seconds": [9.0, 10.0, 11.0, 13.0, 15.0], "tokens": [1, 1, 1, 40, 60], "peak_rss_mb": 5.0}
    found = vs_trl.trl_reading(told, groups=16)
    assert found["groups_per_s"] == 8.0
    assert found["trained_tokens_per_s"] == 25.0


def test_a_side_that_never_arrives_has_no_ratio() -> None:
    never = [Point(0.0, 0.0, 1.0), Point(99.0, 0.1, 1.0)]
    seeds = [{"seed": 0, "curves": {"async": a_curve(10.0), "async_unfiltered": never, "trl": a_curve(40.0)}}]
    result = vs_trl.summarise([], seeds, 0.5)
    assert result["time_speedup"] == {"async": {"median": 4.0, "min": 4.0, "max": 4.0}, "async_unfiltered": None}
    assert result["throughput"] == {}
    lines = tables.vs_trl({**result, "trl_best": [2, 32]})
    assert "| async_unfiltered | not within 99 |  |" in lines
    assert lines[-1] == "TRL ran with 2 threads and 32 completions per forward pass."


def test_the_rivals_clock_stands_still_while_weights_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from benchmarks import trl_run

    now = iter([100.0, 103.0, 104.0, 106.0, 106.0])
    monkeypatch.setattr(trl_run.time, "monotonic", lambda: next(now))

    class Model:
        def save_pretrained(self, path: Path) -> None:
            path.mkdir()

    class State:
        global_step = 0

    timer, state = trl_run.Clock(tmp_path, every=1, max_seconds=0.0), State()
    timer.on_train_begin(None, state, None)
    for state.global_step in (1, 2):
        timer.on_step_end(None, state, None, model=Model())
    assert timer.seconds == [3.0, 5.0]  # saving took the second from 103 to 104
    assert timer.saved == [(3.0, str(tmp_path / "step_1")), (5.0, str(tmp_path / "step_2"))]


# --- origins, the check, the page -------------------------------------------------------------------------


def test_a_result_made_in_two_calls_names_both() -> None:
    later = {**ORIGIN, "command": "python -m benchmarks.y", "seeds": [1]}
    joined = continued(later, {"origin": ORIGIN})
    assert joined["command"] == "python -m benchmarks.x && python -m benchmarks.y"
    assert joined["seeds"] == [0, 1]
    assert set(joined) == set(FIELDS)
    with pytest.raises(SystemExit, match="commit of the earlier result differs"):
        continued({**later, "commit": "other"}, {"origin": ORIGIN})
    with pytest.raises(SystemExit, match="has some of these seeds already"):
        continued(ORIGIN, {"origin": ORIGIN})
    with pytest.raises(SystemExit, match="there is none at --out None"):
        read_earlier(None)


def test_a_ratio_has_fallen_only_below_the_recordings_spread() -> None:
    recorded = Recorded("overlap", 2.0, 1.9, 2.2)
    assert recorded.floor == pytest.approx(1.7)
    verdicts = judge([recorded, recorded], [1.75, 1.65])
    assert [verdict.fell for verdict in verdicts] == [False, True]


def test_the_page_is_the_recorded_results() -> None:
    recorded = load_results(report.RESULTS)
    page = report.page(recorded, report.pictures(report.PLOTS))
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == page, f"run: {report.RERUN}"
    for name in recorded:
        assert f"[{name}.json](results/{name}.json)" in page
    assert "only [one section](#one-gpu)" in page
    assert "## One GPU" in page


def test_what_is_not_recorded_says_how_to_record_it() -> None:
    page = report.page({}, [])
    assert page.count("Not measured yet") == len(report.SECTIONS)
    assert "On a GPU: nothing could be measured yet" in page
    assert "`dapo-async bench time-to-accuracy --out docs/results/time_to_accuracy.json`" in page


def test_the_gpu_section_shows_what_was_measured_and_how_to_measure_the_rest() -> None:
    one = {"groups_per_s": 50.0, "trained_tokens_per_s": 9000, "generated_tokens_per_s": 9500, "learner": {"busy": 0.4}}
    both = {"rounds": {"synchronous": [one | {"gpu_busy": 0.25}], "asynchronous": [one]}, "workers": 4, "batches": 60}
    lines = "\n".join(gpu_runs(both | {"speedup": {"median": 1.5}}))
    assert "asynchronous over synchronous 1.50×" in lines
    assert "| synchronous, round 1 | 50 | 9,000 | 9,500 | 40% | 25% |" in lines
    chunks = {"all at once": {"peak_gib": 24.1, "seconds": {"median": 0.069}}}
    lines = "\n".join(gpu({"logprobs": chunks}))
    assert "| all at once | 24.1 | 69 |" in lines
    assert lines.count("not measured yet") == 3


def test_a_commit_can_be_told_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPO_ASYNC_COMMIT", "0123abc")
    assert origin(seeds=[0], repeats=1)["commit"] == "0123abc"


def test_a_result_without_a_table_of_its_own_shows_its_numbers() -> None:
    result = {"rate": 1234.5, "nested": {"share": 0.25}, "range": [1, 2], "runs": [{"secret": 1}], "origin": ORIGIN}
    page = report.page({"novel": result}, [])
    assert "## novel.json" in page
    for row in ("| rate | 1,234 |", "| nested, share | 0.25 |", "| range | 1–2 |"):
        assert row in page
    assert "secret" not in page
    assert "`python -m benchmarks.x`, commit 0123456789, 2026-01-02, 2 cores of a CPU, seeds 0, repeats 3" in page


def test_every_placement_has_its_row_and_its_bar(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = {name: [a_run(10.0), a_run(12.0)] for name in ("split", "colocated", "async_2", "drain_2")}
    result = {"regime": "balanced", "policy_batches": 20, **summarise(runs, 10_000.0), "origin": ORIGIN}
    result = json.loads(json.dumps(result))  # as it is read from its file
    lines = tables.overlap(result)
    waits = "generation 25%, publish 12%"
    ratio = "1.00× (1.00–1.00)"
    assert f"| drain_2 | 11.0 | 1,000 | {ratio} | {ratio} | {waits} | 50% | 1.50 | 0.56 |" in lines
    assert report.draw({"overlap": result}, tmp_path) == ["overlap"]
    first = (tmp_path / "overlap.svg").read_bytes()
    report.draw({"overlap": result}, tmp_path)
    assert first == (tmp_path / "overlap.svg").read_bytes(), "the same result draws the same picture"
    early = {name: value for name, value in result.items() if name not in ("placements", "straggler")}
    assert any(line.startswith("| async_2 | 11.0 |  | 1.00×") for line in tables.overlap(early))
    assert not plots.save(plots.overlap, early, "no placements", tmp_path / "none.svg")


def test_a_simulated_cluster_is_compared_with_its_own_synchronous_rival(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {
            "gpus": gpus,
            "eta": eta,
            "oversample": oversample,
            "generating": gpus // 2,
            "groups_per_s": rate * gpus,
            "learner": {"train": 0.25},
            "workers": {"idle": 0.5},
            "events": 6000,
            "simulation_cpu_s": 0.5,
        }
        for gpus in (8, 64)
        for eta, oversample, rate in ((0, 1.0, 0.5), (0, 3.0, 1.0), (4, 1.0, 2.5))
    ]
    result = {"assumed": ASSUMED, "rows": rows, "origin": ORIGIN}
    lines = tables.scale(result)
    assert "| 8 | 0, 1× the leases | 4 + 4 | 4 | 0.50× | 25% | 50% | 12 |" in lines
    assert "| 64 | 4 | 32 + 32 | 160 | 2.50× | 25% | 50% | 12 |" in lines
    assert "36,000 events in 3 s" in lines[-1]
    assert report.draw({"scale": result}, tmp_path) == ["scale"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2142.7, "2,143"), (0.04812, "0.0481"), (123.4, "123"), (7, "7"), (None, ""), ("torch", "torch"), (True, "True")],
)
def test_numbers_are_short(value: Any, text: str) -> None:
    assert tables.number(value) == text
