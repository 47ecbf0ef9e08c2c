"""The terminal of a run: one live view on a tty, plain lines elsewhere, log records above, a summary at the end.

Owns the terminal and what is shown there: which numbers, in which words and units, and how much time is left. No thread
of its own: the view is redrawn by the calls, at most four times a second. A terminal that is odd, closed or gone never
ends or changes the run, and neither does a number that is missing (shown as a dash) or not finite.
"""

import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REDRAW_S = 0.25
PLAIN_PROGRESS_S = 5.0
PACE_STEPS = 20  # the time left is judged by the last so many steps
MAX_WIDTH = 100
MISSING = "-"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

WAITS = {
    "time/wait_generation": "generation",
    "time/wait_straggler": "straggler",
    "time/wait_publish": "publish",
    "time/wait_workers": "workers",
}
# Every metric that is shown, and its format.
SHOWN = {
    **dict.fromkeys(WAITS, ".2f"),
    "time/step": ".2f",
    "accuracy/trained": ".3f",
    "accuracy/generated": ".3f",
    "heldout/accuracy": ".3f",
    "reward/mean": ".3f",
    "length/mean": ".1f",
    "length/max": ".0f",
    "staleness/mean": ".2f",
    "staleness/max": ".0f",
    "throughput/generated_tokens_per_s": ",.0f",
    "throughput/trained_tokens_per_s": ",.0f",
    "buffer/groups": ".0f",
    "buffer/capacity": ".0f",
    "workers/alive": ".0f",
}
# The rows of the live view.
ROWS = {
    "step": "{step}, time left {left}",
    "accuracy": "trained {accuracy/trained}, generated {accuracy/generated}, held out {heldout/accuracy}",
    "reward": "{reward/mean}",
    "length": "mean {length/mean}, max {length/max} tokens",
    "staleness": "mean {staleness/mean}, max {staleness/max} versions",
    "tokens/s": "generated {throughput/generated_tokens_per_s}, trained {throughput/trained_tokens_per_s}",
    "waits for": "{waits_for}",
    "buffer": "{buffer/groups}/{buffer/capacity} groups",
    "workers": "{workers/alive} alive",
}
# One step on one line; its parts and their order never change.
LINE = (
    "step {step} | accuracy {accuracy/trained} generated {accuracy/generated} heldout {heldout/accuracy} | "
    "reward {reward/mean} | length {length/mean} | staleness {staleness/mean} max {staleness/max} | "
    "tokens/s {throughput/generated_tokens_per_s} generated {throughput/trained_tokens_per_s} trained | "
    "waits {longest_wait} | buffer {buffer/groups}/{buffer/capacity} | workers {workers/alive} | left {left}"
)
# The parts of ``summary.json``'s groups that are shown, in words.
ACCOUNT = {
    "leased": "leased",
    "trained": "trained",
    "filtered_all_right": "filtered (all right)",
    "filtered_all_wrong": "filtered (all wrong)",
    "expired": "expired",
    "in_flight": "in flight",
    "buffered": "buffered",
}


class Terminal(Console):
    """rich's console, except that the run outlives it and that no text commands it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if 0 in self.size:  # COLUMNS=0 or LINES=0, which rich takes at its word
            self.size = ConsoleDimensions(self.width or 80, self.height or 25)

    @property
    def can_redraw(self) -> bool:
        """Whether it is a tty that obeys escape sequences."""
        try:
            return self.file.isatty() and not self.is_dumb_terminal
        except (OSError, ValueError):
            return False

    def printable(self, text: str, **options: Any) -> Text:
        """``text`` with a question mark for what the terminal would obey (escape sequences) or could not show."""
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
        try:
            text = text.encode(self.encoding, "replace").decode(self.encoding)
        except LookupError:
            text = text.encode("ascii", "replace").decode("ascii")
        return Text(text, **options)

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        """Around whatever writes to it: a stream that refuses is left alone from then on."""
        try:
            yield
        except BlockingIOError:
            pass  # full for now: the next text may get through
        except OSError:
            self.give_up()
        except ValueError:  # closed
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """For a ``BrokenPipeError``. rich's own version ends the process."""
        self.give_up()

    def give_up(self) -> None:
        """Show nothing any more. What the stream still holds goes nowhere instead of failing at exit."""
        self.quiet = True
        try:
            descriptor = self.file.fileno()
            with open(os.devnull, "wb") as devnull:
                os.dup2(devnull.fileno(), descriptor)
        except (OSError, ValueError):
            pass  # not a file, or closed: nothing left to fail


class LiveView:
    """A context manager; leaving it, by an exception or Ctrl-C too, leaves terminal and logging as they were found."""

    def __init__(
        self,
        total_batches: int,
        run_folder: str | Path,
        max_minutes: float = 0.0,
        console: Terminal | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``live``: redraw one view instead of printing lines; by default only on a tty that can."""
        self.run_folder = Path(run_folder)
        self._console = console or Terminal(highlight=False, markup=False, emoji=False)
        self._readout = Readout(total_batches, max_minutes, clock)
        self._clock = clock
        self._progress: _Progress | None = None
        self._live: Live | None = None
        if self._console.can_redraw if live is None else live:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._drawn = -REDRAW_S
        self._handler = _LogLines(self)
        self._silenced: list[logging.Handler] = []

    def __enter__(self) -> Self:
        self._take_logging()
        with self._console.may_fail():
            if self._live:
                self._live.start()
                # A process that is killed cannot bring a hidden cursor back, so it stays visible.
                self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        finally:
            self._give_logging_back()

    def update(self, values: Mapping[str, float | None], step: int | None = None, waiting: str | None = None) -> None:
        """Show the newest ``values`` (by metric name, any subset, others ignored).

        ``step``: this many batches are trained now; off a tty this prints the step's line. ``waiting``: what the
        learner waits for at this moment; until the next step, or until it is "".
        """
        self._readout.update(values, step, waiting)
        if step is not None and not self._live:
            self.message(self._readout.line())
        self._redraw()

    def progress(self, done: float, total: float, text: str) -> None:
        """Show that ``done`` of ``total`` parts of ``text`` (such as "warm start") are done; all done ends it."""
        now = self._clock()
        if self._progress is None or self._progress.text != text:
            self._progress = _Progress(text, now)
        self._progress.done, self._progress.total = done, total
        if total > 0 and done >= total:
            self.message(f"{text}: done in {duration(now - self._progress.start)}")
            self._progress = None
        elif not self._live and self._progress.line_is_due(now):
            self.message(self._progress.words(now))
        self._redraw()

    def message(self, text: str) -> None:
        """Print ``text`` above the view. May be called from any thread."""
        with self._console.may_fail():
            self._console.print(self._console.printable(text), soft_wrap=True)

    def summary(self, summary: Mapping[str, Any], run_folder: str | Path | None = None) -> None:
        """End the view and print how the run went. ``summary`` has the keys of ``summary.json``, any may be missing."""
        self._stop()
        for line in summary_lines(summary, run_folder or self.run_folder):
            self.message(line)

    def _stop(self) -> None:
        if self._live and self._live.is_started:
            self._redraw(at_once=True)
            with self._console.may_fail():
                self._live.stop()
        self._live = None

    def _redraw(self, at_once: bool = False) -> None:
        now = self._clock()
        if not self._live or not self._live.is_started or (now - self._drawn < REDRAW_S and not at_once):
            return
        self._drawn = now
        view = self._view(now)
        with self._console.may_fail():
            self._live.update(view, refresh=True)

    def _view(self, now: float) -> RenderableType:
        printable = self._console.printable
        rows = Table.grid(expand=True)
        if self._readout.step is not None or self._progress is None:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, overflow="crop", style="bold")
            grid.add_column(no_wrap=True, overflow="crop")
            for label, text in [("run", str(self.run_folder)), *self._readout.rows()]:
                grid.add_row(label, printable(text))
            rows.add_row(grid)
            rows.add_row(ProgressBar(completed=100 * self._readout.share_done()))
        if self._progress:
            rows.add_row(printable(self._progress.words(now), no_wrap=True, overflow="crop"))
            rows.add_row(ProgressBar(completed=100 * self._progress.share))
        return Panel(rows, width=min(MAX_WIDTH, self._console.width))

    def _take_logging(self) -> None:
        """Records go through the view; whatever else writes them to the terminal is silent meanwhile."""
        terminals = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        root = logging.getLogger()
        self._silenced = [h for h in root.handlers if isinstance(h, logging.StreamHandler) and h.stream in terminals]
        for handler in self._silenced:
            root.removeHandler(handler)
        root.addHandler(self._handler)

    def _give_logging_back(self) -> None:
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._silenced:
            root.addHandler(handler)


class _LogLines(logging.Handler):
    """Prints records above the view."""

    def __init__(self, view: LiveView) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(LOG_FORMAT, datefmt="%H:%M:%S"))
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, KeyError):
            self.handleError(record)  # arguments that do not fit the record's message
        else:
            self._view.message(line)


@dataclass
class _Progress:
    """How far one named piece of work is."""

    text: str
    start: float
    done: float = 0.0
    total: float = 0.0
    line_at: float = -PLAIN_PROGRESS_S
    line_tenth: int = 0

    @property
    def share(self) -> float:
        return share(self.done, self.total)

    def line_is_due(self, now: float) -> bool:
        """Whether a plain line is due: every few seconds or every tenth of the work. Asking counts as printing."""
        tenth = int(10 * self.share)
        due = now - self.line_at >= PLAIN_PROGRESS_S or tenth > self.line_tenth
        if due:
            self.line_at, self.line_tenth = now, tenth
        return due

    def words(self, now: float) -> str:
        if not self.total > 0:
            return f"{self.text}: {self.done:,.0f}"
        left = duration((now - self.start) * (1 - self.share) / self.share) if self.share else MISSING
        return f"{self.text}: {self.done:,.0f}/{self.total:,.0f} ({self.share:.0%}), time left {left}"


class Readout:
    """The newest value of each shown number, and how fast the run goes."""

    def __init__(
        self, total_batches: int, max_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``total_batches`` and ``max_minutes`` (0: no limit) say when the run ends; ``clock`` is in seconds."""
        self._total_batches = total_batches
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
        texts = self._texts()
        return [(label, row.format_map(texts)) for label, row in ROWS.items()]

    def line(self) -> str:
        """The line of the newest step."""
        return LINE.format_map(self._texts())

    def share_done(self) -> float:
        """Batches trained over all batches, 0 to 1."""
        return share(self.step or 0, self._total_batches)

    def _texts(self) -> dict[str, str]:
        """The word for each field of ``ROWS`` and ``LINE``."""
        longest_wait = self._longest_wait()
        return {
            **{name: number(self._values.get(name), spec) for name, spec in SHOWN.items()},
            "step": f"{MISSING if self.step is None else self.step}/{self._total_batches}",
            "left": self._left(),
            "waits_for": self._waiting or longest_wait,
            "longest_wait": longest_wait,
        }

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
                limits.append((end - begin) / (last - first) * max(0, self._total_batches - self.step))
        if self._max_s:
            limits.append(max(0.0, self._start + self._max_s - self._clock()))
        return duration(min(limits)) if limits else MISSING


def summary_lines(summary: Mapping[str, Any], run_folder: str | Path) -> list[str]:
    """The end of a run in a few lines. ``summary`` has the keys of ``summary.json``; what is missing shows a dash."""

    def get(name: str, spec: str) -> str:
        return number(summary.get(name), spec)

    groups = summary.get("groups") or {}
    account = {name: number(groups.get(name), ",.0f") for name in ACCOUNT}
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
        ("groups", ", ".join(f"{account[name]} {words}" for name, words in ACCOUNT.items())),
        ("TensorBoard", f"{_tensorboard()} --logdir {shlex.quote(str(run_folder))}"),
    ]
    return [f"{label:<12} {text}" for label, text in rows]


def print_scores(terminal: Terminal, result: Mapping[str, Any]) -> None:
    """The scores of an evaluation as a table. ``result`` is what ``dapo-async eval`` writes."""
    sampled = f"k = {result['k']}, T {result['temperature']:g}, top_p {result['top_p']:g}"
    table = Table(title=f"{result['prompts']} prompts, {sampled}")
    for name in ("score", "value", "95 % from", "to"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, score in result["scores"].items():
        form = ".1f" if name == "length_mean" else ".4f"
        table.add_row(name, *(format(score[part], form) for part in ("value", "low", "high")))
    with terminal.may_fail():
        terminal.print(table)


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
