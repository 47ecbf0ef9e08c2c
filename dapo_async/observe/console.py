"""The terminal of a run: one live view on a tty, plain lines elsewhere, log records above, a summary at the end.

Owns the terminal and nothing that is shown there (``readout`` words it). The learner's thread calls ``update``,
``progress`` and ``summary``; log records may come from any thread. No thread of its own: the view is redrawn by
the calls, at most four times a second. A terminal that is odd, closed or gone never ends or changes the run.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dapo_async.observe.readout import Readout, duration, share, summary_lines

REDRAW_S = 0.25
PLAIN_PROGRESS_S = 5.0
MAX_WIDTH = 100
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Terminal(Console):
    """rich's console, except that the run outlives it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if 0 in self.size:  # COLUMNS=0 or LINES=0, which rich takes at its word
            self.size = ConsoleDimensions(self.width or 80, self.height or 25)

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles ``BrokenPipeError``; its own version ends the process."""
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
    """A context manager; leaving it, by an exception or Ctrl-C too, leaves the terminal as it was found."""

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
        self._live = (
            Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            if (_can_redraw(self._console) if live is None else live)
            else None
        )
        self._drawn = -REDRAW_S
        self._handler = _LogLines(self)
        self._silenced: list[logging.Handler] = []

    def __enter__(self) -> Self:
        self._take_logging()
        with self._terminal_may_fail():
            if self._live:
                self._live.start()
                # A process that is killed cannot bring a hidden cursor back, so it stays visible.
                self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        self._progress.advance(done, total)
        ended = total > 0 and done >= total
        if ended:
            self.message(f"{text}: done in {duration(now - self._progress.start)}")
            self._progress = None
        elif not self._live and self._progress.line_is_due(now):
            self.message(self._progress.words(now))
        self._redraw()

    def message(self, text: str) -> None:
        """Print ``text`` above the view. May be called from any thread."""
        shown = Text(_printable(text, self._console.encoding))
        with self._terminal_may_fail():
            self._console.print(shown, soft_wrap=True)

    def summary(self, summary: Mapping[str, Any], run_folder: str | Path | None = None) -> None:
        """End the view and print how the run went. ``summary`` has the keys of ``summary.json``, any may be missing."""
        self._stop()
        for line in summary_lines(summary, run_folder or self.run_folder):
            self.message(line)

    def close(self) -> None:
        """Restore terminal and logging; closing twice is harmless."""
        try:
            self._stop()
        finally:
            self._give_logging_back()

    def _stop(self) -> None:
        if self._live and self._live.is_started:
            self._redraw(at_once=True)
            with self._terminal_may_fail():
                self._live.stop()
        self._live = None

    def _redraw(self, at_once: bool = False) -> None:
        now = self._clock()
        if not self._live or not self._live.is_started or (now - self._drawn < REDRAW_S and not at_once):
            return
        self._drawn = now
        view = self._view(now)
        with self._terminal_may_fail():
            self._live.update(view, refresh=True)

    def _view(self, now: float) -> RenderableType:
        rows = Table.grid(expand=True)
        if self._readout.step is not None or self._progress is None:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, overflow="crop", style="bold")
            grid.add_column(no_wrap=True, overflow="crop")
            for label, text in [("run", str(self.run_folder)), *self._readout.rows()]:
                grid.add_row(label, Text(_printable(text, self._console.encoding)))
            rows.add_row(grid)
            rows.add_row(ProgressBar(completed=100 * self._readout.share_done()))
        if self._progress:
            words = _printable(self._progress.words(now), self._console.encoding)
            rows.add_row(Text(words, no_wrap=True, overflow="crop"))
            rows.add_row(ProgressBar(completed=100 * self._progress.share))
        return Panel(rows, width=min(MAX_WIDTH, self._console.width))

    @contextmanager
    def _terminal_may_fail(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # full for now: the next text may get through
        except OSError:
            self._console.give_up()
        except ValueError:  # closed
            self._console.quiet = True

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
        while self._silenced:
            root.addHandler(self._silenced.pop(0))


def print_scores(terminal: Terminal, result: Mapping[str, Any]) -> None:
    """The scores of an evaluation as a table. ``result`` is what ``dapo-async eval`` writes."""
    sampled = f"k = {result['k']}, T {result['temperature']:g}, top_p {result['top_p']:g}"
    table = Table(title=f"{result['prompts']} prompts, {sampled}")
    for name in ("score", "value", "95 % from", "to"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, score in result["scores"].items():
        form = ".1f" if name == "length_mean" else ".4f"
        table.add_row(name, *(format(score[part], form) for part in ("value", "low", "high")))
    try:
        terminal.print(table)
    except OSError:
        terminal.give_up()


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


class _Progress:
    """How far one named piece of work is."""

    def __init__(self, text: str, now: float) -> None:
        self.text = text
        self.start = now
        self.done = 0.0
        self.total = 0.0
        self._line_at = -PLAIN_PROGRESS_S
        self._line_tenth = 0

    @property
    def share(self) -> float:
        return share(self.done, self.total)

    def advance(self, done: float, total: float) -> None:
        self.done, self.total = done, total

    def line_is_due(self, now: float) -> bool:
        """Whether a plain line is due: every few seconds or every tenth of the work. Asking counts as printing."""
        tenth = int(10 * self.share)
        due = now - self._line_at >= PLAIN_PROGRESS_S or tenth > self._line_tenth
        if due:
            self._line_at, self._line_tenth = now, tenth
        return due

    def words(self, now: float) -> str:
        if not self.total > 0:
            return f"{self.text}: {self.done:,.0f}"
        left = duration((now - self.start) * (1 - self.share) / self.share) if self.share else "-"
        return f"{self.text}: {self.done:,.0f}/{self.total:,.0f} ({self.share:.0%}), time left {left}"


def _can_redraw(console: Console) -> bool:
    try:
        return console.file.isatty() and not console.is_dumb_terminal
    except (OSError, ValueError):
        return False


def _printable(text: str, encoding: str) -> str:
    """``text`` with a question mark for what the terminal would obey (escape sequences) or could not show."""
    text = "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
    try:
        return text.encode(encoding, "replace").decode(encoding)
    except LookupError:
        return text.encode("ascii", "replace").decode("ascii")
