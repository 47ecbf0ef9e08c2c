"""Starts the worker processes of one machine, notices every ending, restarts, and ends them in order.

Owns processes, their logs and nothing of what they do; it never imports ``workers``, it starts them by command
line. ``poll`` wants to be called about once a second. It waits for nobody without a deadline.

No orphan survives, whatever ends the owner (SIGKILL included) and whatever the worker is busy with. Each worker
leads a session of its own, and a sentinel process in it blocks on a pipe whose other end only the owner holds:
when the owner is gone the read returns, and the sentinel kills the whole group, grandchildren too. This needs
no help from the worker, and unlike Linux's parent-death signal it reaches grandchildren and other systems.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from dapo_async.errors import WorkerError

TAIL_LINES = 20
MAX_DELAY_S = 30.0
SERVED_WELL_S = 3600.0  # a process that ran for so long is no sign of a broken worker: counting begins anew
USERS_MISTAKE = "exit code 2"  # trying again would not help

_SENTINEL = "import os, sys; os.read(int(sys.argv[1]), 1); os.killpg(0, 9)"

# Becomes the worker, so that pid and exit code are the worker's own; the sentinel is its forked child. What asks
# the group to end does not end the sentinel: only the end of the owner does, or SIGKILL.
_SHIM = """
import os, signal, sys
pipe, sentinel, command = sys.argv[1], sys.argv[2], sys.argv[3:]
ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, ends)
child = os.fork()
if child == 0:
    for number in ends:
        signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
if child == 0:
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", sentinel, pipe])
os.close(int(pipe))
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"cannot start {command[0]}: {error}")
"""


class ProcessExit(NamedTuple):
    """One process that ended by itself."""

    slot: str  # the name given to the supervisor, for example "w0"
    name: str  # this start of it: "w0", then "w0.1", "w0.2", ...
    pid: int
    reason: str  # "exit code 1" or the signal's name, for example "SIGKILL", and why we sent it, if we did
    tail: str  # last lines of its log
    restart_in_s: float | None  # seconds until its slot starts again; None: it is given up


class _Slot:
    """One place for a worker and what has happened in it."""

    def __init__(self, name: str) -> None:
        self.slot = name
        self.name = name
        self.num_endings = 0  # of the whole run: each start has a name of its own
        self.num_failures = 0  # endings since a process last served well
        self.started_at = 0.0  # by the supervisor's clock
        self.process: subprocess.Popen[bytes] | None = None
        self.killed_for = ""  # why ``kill`` ended this process
        self.restart_at: float | None = None  # by the same clock, while it waits for its restart


class Supervisor:
    """Runs one process per name in ``names``. Not thread-safe: one thread calls it.

    ``command`` makes the argument list from the name of the start, which changes at each restart, so that a
    learner can tell the new process from the old one. ``env`` is the environment of all, ``own_env`` what each name
    has besides, which its restarts keep. Standard output and error go to ``log_folder/<name>.log``.
    A process that ran for ``SERVED_WELL_S`` starts the count of ``max_restarts``, and the delay, anew. ``clock`` is in
    seconds. ``events`` lists what was done, in order.
    """

    def __init__(
        self,
        names: Sequence[str],
        command: Callable[[str], list[str]],
        log_folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        own_env: Mapping[str, Mapping[str, str]] | None = None,
        max_restarts: int = 3,
        restart_delay_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = [_Slot(name) for name in names]
        self._started: set[str] = set()  # every name of a process so far
        self._command = command
        self._log_folder = log_folder
        self._env, self._own_env = env, own_env or {}
        self._max_restarts = max_restarts
        self._restart_delay_s = restart_delay_s
        self._clock = clock
        self._pipe: tuple[int, int] | None = None  # read and write end; the write end never leaves this process
        self.restarts = 0
        self.given_up = 0  # processes that ended once more than they may be restarted
        self.events: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def alive(self) -> list[str]:
        """Names of the processes that have not been seen to end."""
        return [slot.name for slot in self._slots if slot.process is not None]

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each name in ``alive``."""
        return {slot.name: slot.process.pid for slot in self._slots if slot.process is not None}

    def start(self) -> None:
        """Start every process. Raises ``WorkerError`` if the system refuses to make one."""
        assert self._pipe is None, "started twice"
        self._log_folder.mkdir(parents=True, exist_ok=True)
        self._pipe = os.pipe()
        for slot in self._slots:
            self._launch(slot)

    def poll(self, connected: Callable[[], Collection[str]] = tuple) -> list[ProcessExit]:
        """Processes that ended since the last call, exit code 0 included; starts again those whose delay is over.

        A process that ended once more than it may be restarted is given up as long as others work or will, ours or
        those of other machines among the names in ``connected()``; else it raises ``WorkerError``.
        """
        now = self._clock()
        ended = []
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is not None:
                ended.append(self._note_end(slot, now, connected))
            elif slot.restart_at is not None and now >= slot.restart_at:
                slot.name = f"{slot.slot}.{slot.num_endings}"
                slot.restart_at = None
                self.restarts += 1
                self._launch(slot)
        return ended

    def kill(self, name: str, why: str) -> None:
        """Kill the process of this name and its group; ``poll`` reports the ending with ``why``. Unknown names pass."""
        for slot in self._slots:
            if slot.name == name and slot.process is not None and slot.process.poll() is None and not slot.killed_for:
                slot.killed_for = why
                self.events.append(f"SIGKILL {name}: {why}")
                _signal_group(slot.process.pid, signal.SIGKILL)

    def stop(self, ask: Callable[[], None] | None = None, grace_s: float = 10.0) -> None:
        """End everything: ``ask`` the workers, wait, SIGTERM, wait, SIGKILL to what is left of each group.

        Each of the two waits lasts at most ``grace_s`` seconds; without ``ask`` there is only the second. What
        ``ask`` raises is raised again once all have ended. A second call does nothing.
        """
        if self._pipe is None:
            return
        for slot in self._slots:
            slot.restart_at = None
        try:
            if ask is not None and self.alive:
                self.events.append("ask")
                ask()
                self._wait_for_ends(grace_s)
        finally:
            self._signal_groups(signal.SIGTERM)
            self._wait_for_ends(grace_s)
            self._signal_groups(signal.SIGKILL)
            self._wait_for_ends(grace_s)
            for end in self._pipe:
                os.close(end)
            self._pipe = None
            self.events.append("stopped")

    def _launch(self, slot: _Slot) -> None:
        assert self._pipe is not None, "not started"
        pipe = self._pipe[0]
        command = [sys.executable, "-I", "-S", "-c", _SHIM, str(pipe), _SENTINEL, *self._command(slot.name)]
        try:
            with self._log_path(slot).open("ab") as log:
                slot.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**(os.environ if self._env is None else self._env), **self._own_env.get(slot.slot, {})},
                    pass_fds=(pipe,),
                    start_new_session=True,
                )
        except OSError as error:
            raise WorkerError(f"worker {slot.name} could not be started: {error}") from None
        slot.started_at = self._clock()
        self._started.add(slot.name)
        self.events.append(f"start {slot.name}")

    def _note_end(self, slot: _Slot, now: float, connected: Callable[[], Collection[str]]) -> ProcessExit:
        pid, reason = self._reap(slot)
        slot.num_endings += 1
        slot.num_failures = 1 if now - slot.started_at >= SERVED_WELL_S else slot.num_failures + 1
        tail = self._tail(slot)
        delay_s: float | None = None
        # Who has started once was started rightly: what looks like a mistake then is a passing state of the machine,
        # such as a GPU's memory that the process before it has not given back yet.
        mistaken = reason == USERS_MISTAKE and slot.num_endings == 1
        if slot.num_failures <= self._max_restarts and not mistaken:
            delay_s = min(self._restart_delay_s * 2 ** min(slot.num_failures - 1, 20), MAX_DELAY_S)
            slot.restart_at = now + delay_s
        elif any(other.process is not None or other.restart_at is not None for other in self._slots) or (
            set(connected()) - self._started  # that ours have ended may not be known there yet
        ):
            self.given_up += 1
        else:
            raise WorkerError(
                f"worker {slot.name} ended with {reason}; {slot.slot} has now ended {slot.num_failures} times "
                f"(counted anew once it has run for an hour) and may be restarted {self._max_restarts} times "
                f"(workers.max_restarts), and not at all if its first start was a user's mistake ({USERS_MISTAKE}). "
                f"Last lines of {self._log_path(slot)}:\n{tail}"
            )
        return ProcessExit(slot.slot, slot.name, pid, reason, tail, delay_s)

    def _reap(self, slot: _Slot) -> tuple[int, str]:
        """Forget the ended process of ``slot`` and kill what it left in its group, the sentinel included."""
        process = slot.process
        assert process is not None, "nothing to reap"
        assert process.returncode is not None, "still running"
        _signal_group(process.pid, signal.SIGKILL)
        code = process.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if slot.killed_for:
            reason, slot.killed_for = f"{reason} ({slot.killed_for}, killed)", ""
        slot.process = None
        self.events.append(f"end {slot.name}: {reason}")
        return process.pid, reason

    def _wait_for_ends(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            for slot in self._slots:
                if slot.process is not None and slot.process.poll() is not None:
                    self._reap(slot)
            if not self.alive or time.monotonic() >= deadline:
                return
            time.sleep(0.02)

    def _signal_groups(self, number: signal.Signals) -> None:
        for name, pid in self.pids.items():
            self.events.append(f"{number.name} {name}")
            _signal_group(pid, number)

    def _log_path(self, slot: _Slot) -> Path:
        return self._log_folder / f"{slot.name}.log"

    def _tail(self, slot: _Slot) -> str:
        try:
            with self._log_path(slot).open(encoding="utf-8", errors="replace") as log:
                return "".join(deque(log, maxlen=TAIL_LINES)).rstrip() or "(the log is empty)"
        except OSError as error:  # somebody removed it
            return f"(the log cannot be read: {error.strerror})"


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the group led by ``pid``. A group without living members is no error."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # some systems answer the latter when only zombies are left
        return
