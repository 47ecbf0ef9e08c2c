"""The terminal of a run, as it is: on a real pty, on pipes and files, and on terminals that are odd or gone."""

import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_async.observe.console import LiveView, Terminal, print_scores
from dapo_async.observe.metrics import METRICS
from tests import ROOT

BEGIN, ERASE = "\x1b[?25h", "\x1b[2K"
DEADLINE_S = 60.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    assert root.handlers == before


def tty(width: int = 80, height: int = 30, encoding: str = "utf-8") -> tuple[Terminal, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Terminal(file=file, force_terminal=True, width=width, height=height, markup=False, _environ={}), raw


def drawings(raw: io.BytesIO) -> list[str]:
    """What was drawn, split where a panel begins."""
    return re.split(r"(?=[╭+])", raw.getvalue().decode("utf-8"))[1:]


# --- live ------------------------------------------------------------------------------------------------


def test_live_shows_the_newest_numbers_and_redraws_at_most_four_times_a_second() -> None:
    console, raw = tty()
    clock = Clock()
    with LiveView(100, "runs/demo", console=console, live=True, clock=clock) as view:
        for step in range(1, 101):
            clock.now = step / 20
            view.update({"reward/mean": step / 1000}, step=step)
        during = len(drawings(raw))
    assert during == 20  # 5 s
    last = drawings(raw)[-1]
    assert "100/100" in last
    assert "0.100" in last
    assert "runs/demo" in last


def test_live_shows_progress_before_there_are_numbers_and_both_after() -> None:
    console, raw = tty()
    clock = Clock()
    with LiveView(10, "runs/demo", console=console, live=True, clock=clock) as view:
        clock.now = 10.0
        view.progress(0, 1000, "warm start")
        clock.now = 20.0
        view.progress(250, 1000, "warm start")
        first = drawings(raw)[-1]
        clock.now = 50.0
        view.progress(1000, 1000, "warm start")
        view.update({"reward/mean": 0.5}, step=1)
        clock.now = 51.0
        view.progress(1, 4, "evaluation")
        second = drawings(raw)[-1]
    assert "warm start: 250/1,000 (25%), time left 0:30" in first
    assert "reward" not in first
    assert "warm start: done in 0:40\n" in raw.getvalue().decode()
    assert "evaluation: 1/4 (25%)" in second
    assert "reward" in second


def test_log_records_print_above_and_escape_sequences_do_not_reach_the_terminal() -> None:
    console, raw = tty()
    with LiveView(10, "runs/demo", console=console, live=True) as view:
        view.update({}, step=1)
        logging.getLogger("dapo_async.coordinator.coordinator").warning("worker %s is silent\x1b[2J", "w0")
    text = raw.getvalue().decode()
    assert re.search(r"\d\d:\d\d:\d\d WARNING dapo_async\.coordinator\.coordinator: worker w0 is silent\?\[2J\n", text)
    assert text.index("w0 is silent") < text.rindex("╭")
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 20, 79, 500])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_no_size_or_encoding_of_a_terminal_ends_the_run(width: int, encoding: str) -> None:
    console, raw = tty(width, 3, encoding)
    clock = Clock()
    with LiveView(10, "runs/\u03b7\ud800", console=console, live=True, clock=clock) as view:
        for step in range(3):
            clock.now += 1.0
            view.progress(step, 3, "\u03b7")
            view.update(dict.fromkeys(METRICS, float("nan")), step=step)
            view.message("\u03b7 \U0001f600")
        view.summary({})
    assert not console.quiet
    assert "TensorBoard" in raw.getvalue().decode(encoding)


# --- plain -----------------------------------------------------------------------------------------------


def test_plain_is_one_line_per_step_and_nothing_for_updates_between(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(3, "runs/demo") as view:
        for step in range(1, 4):
            view.update({"buffer/groups": 1}, waiting="generation")
            view.update({"reward/mean": 0.5, "buffer/capacity": 48}, step=step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    assert all(len(line) > 100 and "buffer 1/48" in line and "\x1b" not in line for line in lines)


def test_plain_progress_comes_every_tenth_or_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with LiveView(3, "runs/demo", clock=clock) as view:
        for done in range(1001):  # fast: 10 s for all
            clock.now = done / 100
            view.progress(done, 1000, "warm start")
        fast = capsys.readouterr().out.splitlines()
        for done in range(10):  # slow: a thousandth every 2 s
            clock.now += 2.0
            view.progress(done, 1000, "evaluation")
        slow = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in fast[:-1]] == [
        f"warm start: {done}/1,000 ({done // 10}%)" for done in range(0, 1000, 100)
    ]
    assert fast[-1] == "warm start: done in 0:10"
    assert [line.split("/")[0] for line in slow] == [f"evaluation: {done}" for done in (0, 3, 6, 9)]


def test_progress_without_a_total_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(3, "runs/demo") as view:
        view.progress(12, 0, "reading")
    assert capsys.readouterr().out == "reading: 12\n"


def test_plain_output_can_be_cut_off_and_the_run_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from dapo_async.observe.console import LiveView\n"
        "with LiveView(2000, 'runs/demo') as view:\n"
        "    for step in range(2000):\n"
        "        view.update({'reward/mean': 1.0}, step=step)\n"
        "    view.summary({})\n"
        "print('the run ended well', file=sys.stderr)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, script], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, env=env())
    os.close(writing)
    assert os.read(reading, 10).startswith(b"step 0/200")
    os.close(reading)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert errors.decode() == "the run ended well\n"
    assert process.returncode == 0


@pytest.mark.parametrize("stream", ["closed", "none", "full"])
def test_no_usable_stdout_does_not_end_the_run(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    file = None if stream == "none" else open("/dev/full" if stream == "full" else os.devnull, "w")  # noqa: SIM115
    if file and stream == "closed":
        file.close()
    monkeypatch.setattr(sys, "stdout", file)
    with LiveView(3, "runs/demo") as view:
        view.progress(1, 2, "warm start")
        view.update({}, step=1)
        view.summary({})
    monkeypatch.undo()
    if file:
        file.close()


@pytest.mark.parametrize("stream", [os.devnull, "/dev/full"])
def test_scores_for_a_terminal_that_is_gone_end_nothing(stream: str) -> None:
    if not os.path.exists(stream):
        pytest.skip(f"needs {stream}")
    result = {"k": 4, "temperature": 1.0, "top_p": 1.0, "prompts": 8}
    with open(stream, "w") as file:
        terminal = Terminal(file=file)
        if stream == os.devnull:
            file.close()
        print_scores(terminal, result | {"scores": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}})
    assert terminal.quiet


def test_a_log_record_whose_arguments_do_not_fit_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(3, "runs/demo"):
        record = logging.makeLogRecord({"name": "x", "msg": "%d", "args": ("not a number",)})
        logging.getLogger().handlers[-1].handle(record)
    assert "--- Logging error ---" in capsys.readouterr().err


def test_only_handlers_that_write_to_the_terminal_are_replaced_and_all_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(tmp_path / "log")]
    for handler in handlers:
        root.addHandler(handler)
    before = list(root.handlers)
    try:
        with LiveView(3, "runs/demo"):
            logging.getLogger("x").warning("once")
        assert set(root.handlers) == set(before)
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
    out, err = capsys.readouterr()
    assert out.count("once") == 1
    assert err == ""
    assert (tmp_path / "log").read_text() == "once\n"


def test_summary_ends_the_view(capsys: pytest.CaptureFixture[str]) -> None:
    console, raw = tty()
    with LiveView(3, "runs/demo", console=console, live=True) as view:
        view.update({}, step=3)
        view.summary({"start_accuracy": 0.4, "final_accuracy": 0.95}, "runs/other")
    text = raw.getvalue().decode()
    after = text[text.rindex("╰") :]
    assert "accuracy     0.400 -> 0.950 (held out)\n" in after
    assert "tensorboard --logdir runs/other\n" in after
    assert ERASE not in after


# --- a real pty ------------------------------------------------------------------------------------------

SCRIPT = """
import logging, os, signal, sys
from dapo_async.observe.console import LiveView
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
clock = iter(range(10**6))
with LiveView(5, "runs/demo", clock=lambda: next(clock)) as view:
    view.progress(1, 2, "warm start")
    view.progress(2, 2, "warm start")
    for step in range(1, 4):
        view.update({"reward/mean": step / 10, "workers/alive": 1}, step=step)
        logging.getLogger("dapo_async").warning("record %d", step)
    how = sys.argv[1]
    if how == "raise":
        raise RuntimeError("as planned")
    if how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    view.summary({"steps": 3})
"""


def env(**changes: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    return plain | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | changes


def run_on_pty(script: Path, how: str, size: tuple[int, int] = (40, 100), **changes: str) -> tuple[int, str, bool]:
    """Exit status, everything that reached the terminal, and whether its settings are as before."""
    script.write_text(SCRIPT)
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            [sys.executable, script, how], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=env(**changes)
        )
        raw = b""
        deadline = time.monotonic() + DEADLINE_S
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no end within {DEADLINE_S} s; so far: {raw!r}")
            if select.select([ours], [], [], 0.05)[0]:
                raw += os.read(ours, 65536)
        return process.wait(timeout=DEADLINE_S), raw.decode(), termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def screen(output: str) -> list[str]:
    """The lines a person sees at the end: a terminal that knows newline, return, up and erase line, and no more."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token == "\r":
            column = 0
        elif token == ERASE:
            rows[row] = ""
        elif token.endswith("A"):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return rows


@pytest.mark.parametrize(
    ("how", "status", "ending"),
    [
        ("end", 0, "tensorboard --logdir runs/demo"),
        ("raise", 1, "RuntimeError: as planned"),
        ("interrupt", -2, "Interrupt"),
    ],
)
def test_pty_is_left_as_found_however_the_run_ends(how: str, status: int, ending: str, tmp_path: Path) -> None:
    code, output, same_settings = run_on_pty(tmp_path / "script.py", how)
    assert code == status
    assert same_settings
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    rows = screen(output)
    order = [i for i, row in enumerate(rows) for part in ("warm start: done", "record ", "╭", ending) if part in row]
    assert len(order) == 6, "\n".join(rows)  # one end of the warm start, three records, one panel, one ending
    assert order == sorted(order)
    panel = "\n".join(rows[order[4] : order[5]])
    assert "3/5" in panel
    assert "0.300" in panel


def test_a_killed_run_leaves_the_cursor_visible(tmp_path: Path) -> None:
    code, output, same_settings = run_on_pty(tmp_path / "script.py", "kill")
    assert code == -9
    assert same_settings
    assert "record 3" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(term: str, tmp_path: Path) -> None:
    code, output, _ = run_on_pty(tmp_path / "script.py", "end", TERM=term)
    assert code == 0
    assert "\x1b" not in output
    assert [line.split(" | ")[0] for line in output.splitlines() if line.startswith("step ")] == [
        "step 1/5",
        "step 2/5",
        "step 3/5",
    ]


@pytest.mark.parametrize(
    "changes", [{}, {"COLUMNS": "0", "LINES": "0"}, {"COLUMNS": "wide"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_pty_without_a_size_or_with_a_wrong_one_works(changes: dict[str, str], tmp_path: Path) -> None:
    code, output, _ = run_on_pty(tmp_path / "script.py", "end", (0, 0), **changes)
    assert code == 0
    assert "tensorboard --logdir runs/demo" in output
