"""Writes a run's numbers to ``metrics.jsonl`` and TensorBoard, for the names that ``metrics`` declares and no others.

Owns TensorBoard: no other module imports it. Not thread-safe: one thread writes.

Events are written here record by record instead of through a ``SummaryWriter``. That starts no thread, so a disk that
refuses is an error where the number is logged, with the file's name; and nothing waits that a kill would lose.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from dapo_async.observe.files import writing
from dapo_async.observe.metrics import METRICS, Metric
from dapo_async.observe.records import NO_STEP, JsonLines

HISTOGRAM_BINS = 64


class UndeclaredMetricError(KeyError):
    """A name was logged that ``metrics`` does not declare: a bug of ours, not of the user."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f'metric "{self.name}" is not declared: add it to dapo_async/observe/metrics.py'


def find_metric(name: str) -> Metric:
    """The declaration of ``name``, or of the family it belongs to. Raises ``UndeclaredMetricError``."""
    if name in METRICS and not name.endswith("*"):
        return METRICS[name]
    for family in (metric for metric in METRICS.values() if metric.name.endswith("*")):
        stem = family.name.removesuffix("*")
        if name.startswith(stem) and re.fullmatch(r"\w+", name.removeprefix(stem)):
            return family
    raise UndeclaredMetricError(name)


class MetricWriter:
    """Writes each step's numbers to ``metrics.jsonl`` and to TensorBoard events in the same folder."""

    def __init__(
        self,
        folder: str | Path,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start anew, or go on after ``resume_step`` and drop what was logged beyond it. ``clock`` is in seconds.

        Raises what ``JsonLines`` raises.
        """
        self._lines = JsonLines(Path(folder) / "metrics.jsonl", resume_step)
        self._clock = clock
        # Time that earlier processes of this run were running; pauses between them do not count.
        self._start = clock() - float(self._lines.last.get("wall_s") or 0.0)
        self._events = EventFile(Path(folder), purge_step=NO_STEP + 1 if resume_step is None else resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line ``{"step", "wall_s", name: value, ...}``; what is not finite becomes ``null`` there.

        ``values`` may be any subset of the declared numbers, as floats, ints or anything ``float`` takes.
        Raises ``UndeclaredMetricError`` before anything is written.
        """
        for name in values:
            find_metric(name)
        numbers = {name: value if type(value) is int else float(value) for name, value in values.items()}
        self._lines.write({"step": step, "wall_s": round(self._clock() - self._start, 3), **numbers})
        self._events.write(step, [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])

    def histogram(self, name: str, values: Sequence[float] | np.ndarray, step: int) -> None:
        """Write the distribution of ``values`` to TensorBoard; values that are not finite are left out.

        Raises ``UndeclaredMetricError``.
        """
        find_metric(name)
        finite = np.asarray(values, dtype=np.float64).ravel()
        finite = finite[np.isfinite(finite)]
        if finite.size:
            self._events.write(step, [Summary.Value(tag=name, histo=_histogram(finite))])

    def text(self, name: str, text: str, step: int) -> None:
        """Write ``text`` (markdown) to TensorBoard, under any name: texts are no numbers and are not declared."""
        self._events.write(step, text_pb(name, [text.encode("utf-8", "replace")]).value)

    def close(self) -> None:
        """Close both files; closing twice is harmless."""
        self._lines.close()
        self._events.close()


class EventFile:
    """One TensorBoard event file; viewers forget what older files of the folder say about ``purge_step`` and later."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # Viewers read the files of a folder in the order of their names; nanoseconds keep it within one second.
        self.path = folder / f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}"
        with writing(self.path):
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._append(file_version="brain.Event:2")
        self._append(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Iterable[Summary.Value]) -> None:
        """Append one event. Raises ``DapoError`` if the file cannot be written."""
        self._append(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file. Raises ``DapoError`` if what it still holds cannot be written."""
        with writing(self.path):
            self._file.close()

    def _append(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        with writing(self.path):
            self._records.write(event.SerializeToString())
            self._file.flush()


def _histogram(values: np.ndarray) -> HistogramProto:
    """Counts of finite float64 ``values`` [n >= 1], in one bucket per distinct value if there are few."""
    distinct, counts = np.unique(values, return_counts=True)
    limits = distinct
    if len(distinct) > HISTOGRAM_BINS:
        counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
        limits = edges[1:]
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=limits.tolist(),
        bucket=counts.astype(np.float64).tolist(),
    )
