"""The writers of a run's numbers: ``metrics.jsonl`` and TensorBoard events, for declared names only.

Owns TensorBoard (no other module imports it) and generates ``docs/metrics.md`` from ``metric_list``. Decides no
value: the learner measures and logs. Not thread-safe: one thread writes.

Events are written here record by record instead of through a summary writer: that needs neither TensorFlow nor
torch, starts no thread, and leaves nothing behind that a killed process would lose.
"""

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from dapo_async.observe.declared import METRICS, SECTIONS, Metric
from dapo_async.observe.files import writing
from dapo_async.observe.records import NO_STEP, JsonLines

HISTOGRAM_BINS = 64

# Where to look first: question, curves, worry when.
FIRST_LOOK = (
    (
        "Does it learn?",
        "heldout/accuracy accuracy/generated",
        "neither rises. (Not `accuracy/trained`: the filter keeps it in the middle. `evaluation.every` gives a curve)",
    ),
    (
        "Is there something to learn from?",
        "groups/filtered_share",
        "it nears 1: prompts too easy (`groups/filtered_all_right`) or too hard (`groups/filtered_all_wrong`)",
    ),
    (
        "Is it stable?",
        "policy/entropy optimizer/grad_norm optimizer/skipped length/truncated_share",
        "entropy falls to 0 or climbs; the norm jumps; steps are skipped; more and more answers are cut off",
    ),
    (
        "Is the data too old?",
        "policy/ess_share policy/kl_behaviour_k3 staleness/max",
        "the first falls or the second climbs: lower `schedule.max_staleness`, or set an `objective.correction`",
    ),
    (
        "Do sampler and learner agree?",
        "mismatch/mean",
        "it grows, or exceeds the band that `dapo-async check CONFIG --parity` tells",
    ),
    (
        "Who waits for whom?",
        "time_share/wait_* worker_time/idle",
        "the learner waits for generation: more workers; the workers idle: a faster learner (`dapo-async plan RUN`)",
    ),
    (
        "Are machines lost?",
        "workers/alive workers/given_up",
        "fewer are alive than were started; a worker was given up",
    ),
    (
        "Does the verifier work?",
        "verifier/errors verifier/timeouts",
        "they rise: such answers count as wrong, and the workers' logs say why",
    ),
)


class UndeclaredMetricError(KeyError):
    """A name was logged that ``metric_list`` does not declare: a bug of ours, not of the user."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f'metric "{self.name}" is not declared: add it to dapo_async/observe/declared.py'


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
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode("utf-8", "replace")], tensor_shape=shape)
        self._events.write(step, [Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def close(self) -> None:
        """Close both files; closing twice is harmless."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventFile:
    """One TensorBoard event file; viewers forget what older files of the folder say about ``purge_step`` and later."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # Viewers read the files of a folder in the order of their names; nanoseconds keep it within one second.
        self.path = folder / f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}"
        with writing(self.path):
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: list[Summary.Value]) -> None:
        """Append one event. Raises ``DapoError`` if the file cannot be written."""
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file. Raises ``DapoError`` if what it still holds cannot be written."""
        with writing(self.path):
            self._file.close()

    def _write(self, event: Event) -> None:
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


def metrics_page() -> str:
    """The text of ``docs/metrics.md``: one table per section, from the declarations."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m dapo_async.observe.metrics --write docs/metrics.md`; do not edit.",
        "",
        "A run logs these numbers to TensorBoard and, the same, to `metrics.jsonl` in its folder: one JSON object per",
        "line with `step` (batches trained), `wall_s` (seconds this run has been running, pauses between resumes left",
        "out) and the numbers by name. What a step does not have is absent; what is not finite is `null`. Lines of the",
        "same step belong together. A name that is not declared here cannot be logged. `*` stands for words known only",
        "at run time.",
        "",
        '"The batch" is the batch trained in that step; "the interval" is the time since the step logged before it;',
        '"in total" means since the start of the run, through resumes.',
        "",
        "## Look at these first",
        "",
        "| question | curves | worry when |",
        "|---|---|---|",
        *(f"| {question} | {_code(names)} | {worry} |" for question, names, worry in FIRST_LOOK),
    ]
    for section, sentence in SECTIONS.items():
        lines += ["", f"## {section}", "", sentence, "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS.values() if m.section == section]
    return "\n".join(lines) + "\n"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m dapo_async.observe.metrics", description="The page of all metrics."
    )
    parser.add_argument("--write", metavar="FILE", help="write the page there instead of printing it")
    options = parser.parse_args(arguments)
    if options.write:
        Path(options.write).write_text(metrics_page(), encoding="utf-8")
    else:
        print(metrics_page(), end="")


if __name__ == "__main__":
    main()
