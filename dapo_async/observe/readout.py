"""A run's numbers as words a person reads: the rows of the live view, the line of a step, the final summary.

Owns what is shown, in which words and units, and the estimate of the time left. Knows no terminal: ``console``
shows these texts. Never fails on a number that is missing or not finite; it shows a dash, or nan.
"""

import math
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

WAITS = {
    "time/wait_generation": "generation",
    "time/wait_straggler": "straggler",
    "time/wait_publish": "publish",
    "time/wait_workers": "workers",
}
# Every metric that is shown.
SHOWN = (
    *WAITS,
    "time/step",
    "accuracy/trained",
    "accuracy/generated",
    "heldout/accuracy",
    "reward/mean",
    "length/mean",
    "length/max",
    "staleness/mean",
    "staleness/max",
    "throughput/generated_tokens_per_s",
    "throughput/trained_tokens_per_s",
    "buffer/groups",
    "buffer/capacity",
    "workers/alive",
)
PACE_STEPS = 20  # the time left is judged by the last so many steps
MISSING = "-"


class Readout:
    """The newest value of each shown number, and how fast the run goes."""

    def __init__(
        self, total_batches: int, max_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``total_batches`` and ``max_minutes`` (0: no limit) say when the run ends; ``clock`` is in seconds."""
        self.total_batches = total_batches
        self.step: int | None = None
        self._max_s = max_minutes * 60.0
        self._clock = clock
        self._values: dict[str, float | None] = {}
        self._waiting = ""
        self._start = clock()
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)

    def update(self, values: Mapping[str, float | None], step: int | None = None, waiting: str | None = None) -> None:
        """Take over what is shown of ``values``. ``step``: a batch was trained; ``waiting``: what is waited for now."""
        for name in SHOWN:
            if name in values:
                value = values[name]
                self._values[name] = None if value is None else float(value)
        if step is not None:
            self.step = step
            self._pace.append((step, self._clock()))
        if step is not None or waiting is not None:
            self._waiting = waiting or ""

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each row of the live view."""
        get = self._get
        return [
            ("step", f"{self._step()}, time left {self._left()}"),
            (
                "accuracy",
                f"trained {get('accuracy/trained', '.3f')}, generated {get('accuracy/generated', '.3f')}, "
                f"held out {get('heldout/accuracy', '.3f')}",
            ),
            ("reward", get("reward/mean", ".3f")),
            ("length", f"mean {get('length/mean', '.1f')}, max {get('length/max', '.0f')} tokens"),
            ("staleness", f"mean {get('staleness/mean', '.2f')}, max {get('staleness/max', '.0f')} versions"),
            ("tokens/s", f"generated {get(*_GENERATED)}, trained {get(*_TRAINED)}"),
            ("waits for", self._waiting or self._longest_wait()),
            ("buffer", f"{self._buffer()} groups"),
            ("workers", f"{get('workers/alive', '.0f')} alive"),
        ]

    def line(self) -> str:
        """One step on one line; its parts and their order never change."""
        get = self._get
        return " | ".join(
            [
                f"step {self._step()}",
                f"accuracy {get('accuracy/trained', '.3f')} generated {get('accuracy/generated', '.3f')} "
                f"heldout {get('heldout/accuracy', '.3f')}",
                f"reward {get('reward/mean', '.3f')}",
                f"length {get('length/mean', '.1f')}",
                f"staleness {get('staleness/mean', '.2f')} max {get('staleness/max', '.0f')}",
                f"tokens/s {get(*_GENERATED)} generated {get(*_TRAINED)} trained",
                f"waits {self._longest_wait()}",
                f"buffer {self._buffer()}",
                f"workers {get('workers/alive', '.0f')}",
                f"left {self._left()}",
            ]
        )

    def share_done(self) -> float:
        """Batches trained over all batches, 0 to 1."""
        return share(self.step or 0, self.total_batches)

    def _get(self, name: str, spec: str) -> str:
        return number(self._values.get(name), spec)

    def _step(self) -> str:
        return f"{MISSING if self.step is None else self.step}/{self.total_batches}"

    def _buffer(self) -> str:
        return f"{self._get('buffer/groups', '.0f')}/{self._get('buffer/capacity', '.0f')}"

    def _longest_wait(self) -> str:
        waits = [(value, cause) for name, cause in WAITS.items() if (value := self._values.get(name)) is not None]
        if not waits:
            return MISSING
        seconds, cause = max(waits)
        if not seconds > 0:
            return "nothing"
        whole = self._values.get("time/step")
        part = f" ({seconds / whole:.0%})" if whole and whole > 0 else ""
        return f"{cause} {number(seconds, '.2f')} s{part}"

    def _left(self) -> str:
        limits = []
        if len(self._pace) > 1 and self.step is not None:
            (first, begin), (last, end) = self._pace[0], self._pace[-1]
            if last > first:
                limits.append((end - begin) / (last - first) * max(0, self.total_batches - self.step))
        if self._max_s:
            limits.append(max(0.0, self._start + self._max_s - self._clock()))
        return duration(min(limits)) if limits else MISSING


_GENERATED = ("throughput/generated_tokens_per_s", ",.0f")
_TRAINED = ("throughput/trained_tokens_per_s", ",.0f")


def summary_lines(summary: Mapping[str, Any], run_folder: str | Path) -> list[str]:
    """The end of a run in a few lines. ``summary`` has the keys of ``summary.json``; what is missing shows a dash."""

    def get(name: str, spec: str) -> str:
        return number(summary.get(name), spec)

    groups = summary.get("groups") or {}
    account = {name: number(groups.get(name), ",.0f") for name in _ACCOUNT}
    rows = [
        ("run folder", str(run_folder)),
        ("accuracy", f"{get('start_accuracy', '.3f')} -> {get('final_accuracy', '.3f')} (held out)"),
        ("length", f"{get('start_length', '.1f')} -> {get('final_length', '.1f')} tokens (held out)"),
        (
            "batches",
            f"{get('steps', ',.0f')} in {duration(summary.get('wall_s'))}, "
            f"of that warm start {duration(summary.get('warm_start_s'))}",
        ),
        (
            "tokens/s",
            f"{get('generated_tokens_per_s', ',.0f')} generated, {get('trained_tokens_per_s', ',.0f')} trained",
        ),
        ("busy", f"learner {get('learner_busy', '.0%')}, workers {get('worker_busy', '.0%')}"),
        ("staleness", f"mean {get('staleness_mean', '.2f')}, max {get('staleness_max', '.0f')} versions"),
        ("groups", ", ".join(f"{account[name]} {words}" for name, words in _ACCOUNT.items())),
        ("TensorBoard", f"{_tensorboard()} --logdir {shlex.quote(str(run_folder))}"),
    ]
    return [f"{label:<12} {text}" for label, text in rows]


_ACCOUNT = {
    "leased": "leased",
    "trained": "trained",
    "filtered_all_right": "filtered (all right)",
    "filtered_all_wrong": "filtered (all wrong)",
    "expired": "expired",
    "in_flight": "in flight",
    "buffered": "buffered",
}


def _tensorboard() -> str:
    """The command as it can be typed: with its folder if that is not on the path (a virtual environment not active)."""
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else shlex.quote(str(beside))


def number(value: Any, spec: str) -> str:
    """``value`` in that format; a dash if there is none."""
    return format(float(value), spec) if isinstance(value, Real) else MISSING


def share(done: float, total: float) -> float:
    """``done`` over ``total``, kept within 0 and 1; 0 if there is no total."""
    return min(1.0, max(0.0, done / total)) if total > 0 else 0.0


def duration(seconds: Any) -> str:
    """Seconds as m:ss or h:mm:ss; a dash if there are none."""
    if not isinstance(seconds, Real) or not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
