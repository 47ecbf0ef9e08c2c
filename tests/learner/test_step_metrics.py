"""Step metrics of a coordinator that is only told of workers: what peers send never makes a number that is none."""

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dapo_async.learner.step_metrics import StepMetrics, Totals
from dapo_async.transport.messages import Beat, DecodeSums

BEAT = Beat(
    version=3,
    running=4,
    holding=[],
    refused_weights=2,
    seconds={"decode": 8.0, "idle": 2.0},
    decode=DecodeSums(steps=10, rows=40, rows_squared=160, seconds=8.0, rows_seconds=32.0),
)


class ToldCoordinator:
    """As much of a coordinator as the workers' metrics look at; ``beats`` by worker."""

    def __init__(self, **beats: Beat) -> None:
        self.beats = beats
        self.config = SimpleNamespace(workers=SimpleNamespace(engine="torch"))

    def counts(self) -> dict[str, int]:
        return {}

    def workers(self) -> list[Any]:
        return [SimpleNamespace(name=name, beat=beat) for name, beat in self.beats.items()]


def metrics_of(coordinator: ToldCoordinator) -> StepMetrics:
    return StepMetrics(coordinator, None, Totals())  # type: ignore[arg-type]


def later(beat: Beat, **decode: float) -> Beat:
    sums = msgspec.structs.replace(beat.decode, **decode)
    return msgspec.structs.replace(beat, decode=sums, seconds={"decode": 9.0, "idle": 11.0})


def test_decode_steps_are_those_of_the_interval() -> None:
    coordinator = ToldCoordinator(w0=BEAT)
    metrics = metrics_of(coordinator)
    assert metrics._workers()["decode/steps"] == 10
    coordinator.beats["w0"] = later(BEAT, steps=12, rows=50, seconds=9.0)
    found = metrics._workers()
    assert (found["decode/steps"], found["decode/running_mean"], found["decode/step_s"]) == (2, 5.0, 0.5)
    assert found["worker_time/idle"] == pytest.approx(0.9)


def test_a_restarted_process_of_the_same_name_begins_at_nothing() -> None:
    coordinator = ToldCoordinator(w0=BEAT)
    metrics = metrics_of(coordinator)
    metrics._workers()
    fresh = Beat(version=3, running=1, holding=[], seconds={"decode": 0.5}, decode=DecodeSums(steps=1, rows=1))
    coordinator.beats["w0"] = fresh
    found = metrics._workers()
    assert found["decode/steps"] == 1
    assert all(value >= 0 for value in found.values())
    assert metrics.totals.refused_weights == 2


def test_no_beat_that_can_be_sent_makes_a_metric_that_is_not_finite() -> None:
    odd = [
        DecodeSums(),
        DecodeSums(steps=5),
        DecodeSums(steps=1, rows=0, rows_squared=9, seconds=1e9, rows_seconds=1e18),
        DecodeSums(steps=2**53 - 1, rows=2**53 - 1, rows_squared=2**53 - 1, seconds=1e9, rows_seconds=1e18),
        DecodeSums(steps=1),
        DecodeSums(steps=1, rows=5),
    ]
    for sums in odd:
        for following in odd:
            coordinator = ToldCoordinator(w0=msgspec.structs.replace(BEAT, decode=sums))
            metrics = metrics_of(coordinator)
            values = metrics._workers()
            coordinator.beats["w0"] = msgspec.structs.replace(BEAT, decode=following)
            values |= metrics._workers()
            assert all(math.isfinite(value) for value in values.values()), (sums, following)
