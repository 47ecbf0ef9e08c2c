"""The registry, the writers, and their files as the readers see them."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from dapo_async.errors import ConfigError, DapoError
from dapo_async.observe.metric_writer import EventFile, MetricWriter, UndeclaredMetricError, find_metric
from dapo_async.observe.metrics import METRICS, SECTIONS
from tests import ROOT


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return reader.Reload()


def scalars(folder: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in events(folder).Scalars(name)}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- registry --------------------------------------------------------------------------------------------


def test_every_declaration_is_complete_and_in_a_described_section() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert name.count("/") == 1
        assert name.split("/")[0] == metric.section
        assert name.replace("/", "").replace("_", "").removesuffix("*").isalnum(), name
        assert metric.unit
        assert metric.meaning[0].isupper()
        assert metric.meaning.endswith(".")
        assert "|" not in metric.meaning
    assert {metric.section for metric in METRICS.values()} == set(SECTIONS)


def test_phases_of_the_learner_have_a_time_and_a_share() -> None:
    def words(section: str) -> set[str]:
        return {m.name.partition("/")[2] for m in METRICS.values() if m.section == section}

    assert words("time") - {"step", "straggler_waits"} == words("time_share") - {"busy"}


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward/mean", "reward/mean"),
        ("drops/refused", "drops/refused"),
        ("drops/refused_spans", "drops/refused_*"),
        ("drops/refused_unknown_lease", "drops/refused_*"),
        ("staleness/groups_0", "staleness/groups_*"),
    ],
)
def test_find_metric(name: str, declared: str) -> None:
    assert find_metric(name).name == declared


@pytest.mark.parametrize("name", ["reward/avg", "mean", "", "drops/refused_", "drops/refused_*", "drops/refused_a/b"])
def test_an_undeclared_name_is_refused_by_name_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    with (
        closing(MetricWriter(tmp_path)) as writer,
        pytest.raises(UndeclaredMetricError, match="is not declared") as caught,
    ):
        writer.log(1, {"reward/mean": 1.0, name: 2.0})
    assert isinstance(caught.value, KeyError)
    assert f'"{name}"' in str(caught.value)
    assert lines(tmp_path) == []
    assert events(tmp_path).Tags()["scalars"] == []


# --- what is written -------------------------------------------------------------------------------------


def test_a_step_is_one_line_and_one_point_per_name(tmp_path: Path) -> None:
    clock = Clock()
    with closing(MetricWriter(tmp_path, clock=clock)) as writer:
        clock.now += 2.5
        writer.log(1, {"reward/mean": -0.25, "groups/trained": 16})
        clock.now += 1.0
        writer.log(2, {"reward/mean": np.float32(0.5)})
    assert lines(tmp_path) == [
        {"step": 1, "wall_s": 2.5, "reward/mean": -0.25, "groups/trained": 16},
        {"step": 2, "wall_s": 3.5, "reward/mean": 0.5},
    ]
    assert scalars(tmp_path, "reward/mean") == {1: -0.25, 2: 0.5}
    assert scalars(tmp_path, "groups/trained") == {1: 16.0}


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.log(1, {"reward/mean": 1.0})
        assert [line["step"] for line in lines(tmp_path)] == [1]
        assert scalars(tmp_path, "reward/mean") == {1: 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float32("nan")])
def test_what_is_not_finite_becomes_null(value: float, tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.log(1, {"policy/loss": value, "reward/mean": 1.0})
    assert lines(tmp_path)[0]["policy/loss"] is None
    np.testing.assert_equal(scalars(tmp_path, "policy/loss")[1], float(value))


def test_histogram_counts_each_value(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.histogram("staleness/histogram", [0, 1, 1, 2, 2, 2, float("nan")], step=4)
        writer.histogram("staleness/histogram", [], step=5)
    (event,) = events(tmp_path).Histograms("staleness/histogram")
    value = event.histogram_value
    assert event.step == 4
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (0, 2, 6, 8, 14)
    assert (value.bucket_limit, value.bucket) == ([0, 1, 2], [1, 2, 3])


def test_histogram_of_many_values_keeps_the_total(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 20))
    with closing(MetricWriter(tmp_path)) as writer:
        writer.histogram("staleness/histogram", values, step=1)
    (event,) = events(tmp_path).Histograms("staleness/histogram")
    counts, edges = np.histogram(values, bins=64)
    assert event.histogram_value.bucket == counts.tolist()
    assert event.histogram_value.bucket_limit == pytest.approx(edges[1:].tolist())


def test_an_undeclared_histogram_is_refused(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer, pytest.raises(UndeclaredMetricError):
        writer.histogram("staleness/histo", [1.0], step=1)


def test_text_comes_back_as_written(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.text("samples/0", "3+5=8; \N{GREEK SMALL LETTER ETA} \ud800", step=7)
    (event,) = events(tmp_path).Tensors("samples/0")
    assert event.step == 7
    # A lone surrogate can come out of a tokenizer; it must not end the run.
    assert tensor_util.make_ndarray(event.tensor_proto).tolist() == ["3+5=8; \N{GREEK SMALL LETTER ETA} ?".encode()]
    metadata = events(tmp_path).SummaryMetadata("samples/0")
    assert metadata.plugin_data.plugin_name == "text"


# --- resume ----------------------------------------------------------------------------------------------


def test_resume_drops_what_was_logged_beyond_the_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    with closing(MetricWriter(tmp_path, clock=clock)) as writer:
        for step in range(6):
            clock.now += 10.0
            writer.log(step, {"reward/mean": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # torn by a kill
    clock.now += 5000.0  # the pause does not count
    with closing(MetricWriter(tmp_path, resume_step=3, clock=clock)) as writer:
        clock.now += 1.0
        writer.log(4, {"reward/mean": 40.0})
    assert [(line["step"], line["wall_s"], line["reward/mean"]) for line in lines(tmp_path)] == [
        (0, 10.0, 0),
        (1, 20.0, 1),
        (2, 30.0, 2),
        (3, 40.0, 3),
        (4, 41.0, 40.0),
    ]
    points = [(event.step, event.value) for event in events(tmp_path).Scalars("reward/mean")]
    assert points == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40.0)]


def test_resume_after_a_kill_in_the_middle_of_an_event(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.log(1, {"reward/mean": 1.0})
        writer.log(2, {"reward/mean": 2.0})
    (old,) = tmp_path.glob("events.*")
    old.write_bytes(old.read_bytes()[:-5])
    with closing(MetricWriter(tmp_path, resume_step=1)) as writer:
        writer.log(2, {"reward/mean": 20.0})
    assert scalars(tmp_path, "reward/mean") == {1: 1.0, 2: 20.0}


def test_resume_without_an_old_file_starts_one(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path / "new", resume_step=5)) as writer:
        writer.log(6, {"reward/mean": 1.0})
    assert [line["step"] for line in lines(tmp_path / "new")] == [6]


def test_a_new_run_does_not_write_into_another_one(tmp_path: Path) -> None:
    with closing(MetricWriter(tmp_path)) as writer:
        writer.log(1, {"reward/mean": 1.0})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"metrics\.jsonl holds another run: continue it with --resume"):
        MetricWriter(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DapoError, match=r"metrics\.jsonl: cannot be written: "):
        MetricWriter(tmp_path / "file")


def test_events_that_cannot_be_written_at_the_end_are_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    events = EventFile(tmp_path, purge_step=0)
    events.close()
    events._file = open("/dev/full", "wb")  # noqa: SIM115  # closed by what is tested
    events._file.write(b"kept until it is closed")
    with pytest.raises(DapoError, match=r"tfevents.*: cannot be written: No space left on device"):
        events.close()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.log(1, {"reward/mean": 0.5})
    writer.close()
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_writing_metrics_needs_neither_torch_nor_tensorflow() -> None:
    code = "import sys, dapo_async.observe.metric_writer; print({'torch', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "set()"
