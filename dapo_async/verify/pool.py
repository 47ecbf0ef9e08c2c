"""Verdicts from child processes: one text at a time per child, each replaced when it hangs or dies.

A thread per child is that child's only owner (``child``); whatever runs there, a user's function or ``math_verify``,
may raise, print, exit, hang or crash, and costs its own verdict only.
"""

import contextlib
import itertools
import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Hashable
from typing import Literal, NamedTuple

from dapo_async.errors import ConfigError, WorkerError
from dapo_async.verify.child import END_TIMEOUT_S, Ask, Child, ChildGone, Closing, Load, Loaded, Reply, clean

START_TIMEOUT_S = 120.0  # importing the module, heavy libraries included
WAIT_S = 60.0  # how long one wait for the next submission lasts before it is renewed
LOGGED_CHARS = 200
LOGGED_FAILURES = 20  # of one verifier, in full

logger = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What a verifier says of one completion. ``correct`` is False unless ``status`` is ``ok``."""

    correct: bool
    predicted: str = ""  # the answer that was seen, at most 500 characters
    status: Literal["ok", "error", "timeout"] = "ok"
    second: Literal["", "right", "wrong", "error", "timeout"] = ""  # of reward.compare_with; empty: not asked


class FailureLog:
    """Says which verifications failed, and that they count as wrong; of many, the first ones and every thousandth.

    A function that fails on every answer would fill the disk otherwise. May be called from several threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)

    def add(self, why: str, text: str, truth: str) -> None:
        """Log one failure in one line, or leave it to the counters that the learner keeps."""
        number = next(self._numbers)
        if number > LOGGED_FAILURES and number % 1000:
            return
        message = "verifier %s: %s; counted as wrong (truth %r, text ending in %r)"
        logger.warning(message, self._name, why, truth[:LOGGED_CHARS], text[-LOGGED_CHARS:])
        if number >= LOGGED_FAILURES:
            logger.warning("verifier %s failed %d times; only every thousandth is told now", self._name, number)


class Task(NamedTuple):
    """What the children of a pool run."""

    setting: str  # that names it, for errors: reward.verifier
    name: str  # as the user wrote it
    module: str
    function: str
    timeout_s: float
    memory_bytes: int = 0  # address space of a child (Linux); 0: no limit


class VerifierPool:
    """A ``verifier.Verifier`` that asks ``num_processes`` children at the same time, each one text at a time."""

    def __init__(self, task: Task, num_processes: int) -> None:
        """Raises ``ConfigError`` if a child cannot load the function."""
        self._name = task.name
        self._asks: queue.SimpleQueue[tuple[Hashable, str, str] | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[tuple[Hashable, Verdict]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._pending = 0
        failures = FailureLog(task.name)
        self._servers = [
            Server(task, failures, self._asks, self._verdicts, self._closing) for _ in range(num_processes)
        ]
        problems = [server.loaded.get(timeout=START_TIMEOUT_S + 2 * END_TIMEOUT_S) for server in self._servers]
        if any(problems):
            self.close()
            raise ConfigError(f'{task.setting} = "{task.name}": {next(filter(None, problems))}')

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        """See ``verifier.Verifier``."""
        self._pending += 1
        self._asks.put((key, text, truth))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """See ``verifier.Verifier``. Raises ``WorkerError`` if verdicts are pending that can never come."""
        done: list[tuple[Hashable, Verdict]] = []
        deadline = time.monotonic() + timeout_s
        while len(done) < self._pending:
            wait_s = 0.0 if done else max(0.0, deadline - time.monotonic())
            # Asked before the queue, so that a last verdict is not overlooked.
            alive = all(server.thread.is_alive() for server in self._servers)
            try:
                done.append(self._verdicts.get(timeout=wait_s) if wait_s else self._verdicts.get_nowait())
            except queue.Empty:
                if not (alive or done):
                    raise WorkerError(f"a thread of verifier {self._name} ended with work pending") from None
                break
        self._pending -= len(done)
        return done

    @property
    def pending(self) -> int:
        """See ``verifier.Verifier``."""
        return self._pending

    def close(self) -> None:
        """See ``verifier.Verifier``."""
        self._closing.set()
        for _ in self._servers:
            self._asks.put(None)
        for server in self._servers:
            server.thread.join(timeout=2 * END_TIMEOUT_S)
        self._pending = 0


class Server:
    """One thread of a pool with its child. ``loaded`` gets an empty text, or why the function cannot be had."""

    def __init__(
        self,
        task: Task,
        failures: FailureLog,
        asks: "queue.SimpleQueue[tuple[Hashable, str, str] | None]",
        verdicts: "queue.SimpleQueue[tuple[Hashable, Verdict]]",
        closing: threading.Event,
    ) -> None:
        self._task, self._asks, self._verdicts, self._closing = task, asks, verdicts, closing
        self._failures = failures
        self._child: Child | None = None  # the thread's
        self.loaded: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name="verifier", daemon=True)
        self.thread.start()

    # All that follows runs in the thread.

    def _serve(self) -> None:
        try:
            self._start()
            self.loaded.put("")
            while not self._closing.is_set():
                try:
                    ask = self._asks.get(timeout=WAIT_S)
                except queue.Empty:
                    continue
                if ask is not None:
                    key, text, truth = ask
                    self._verdicts.put((key, self._judge(Ask(clean(text), clean(truth)))))
        except ChildGone as gone:  # only of the first start: _judge keeps its own
            self.loaded.put(str(gone))
        except Closing:
            self.loaded.put("")  # another child could not load; nobody may wait for this one
        finally:
            self._discard()

    def _judge(self, ask: Ask) -> Verdict:
        try:
            answer = (self._child or self._start()).exchange(ask, Reply, self._task.timeout_s)
            why = answer.error
            verdict = Verdict(answer.correct, answer.predicted, "error" if why else "ok")
        except ChildGone as gone:
            self._discard()
            verdict, why = Verdict(False, status="error"), str(gone)
        except TimeoutError:
            self._discard()
            verdict, why = Verdict(False, status="timeout"), f"no verdict within {self._task.timeout_s:g} s"
        if why:
            self._failures.add(why, ask.text, ask.truth)
        return verdict

    def _start(self) -> Child:
        """Start a child and load the function. Raises ``ChildGone`` with a whole sentence, or ``Closing``."""
        module, limit = self._task.module, self._task.memory_bytes
        here = os.getcwd()
        path = list(dict.fromkeys([here, *(entry or here for entry in sys.path)]))
        child = self._child = Child(self._closing)
        try:
            if limit and sys.platform.startswith("linux"):
                with contextlib.suppress(ProcessLookupError):  # it is gone already, which exchange will say
                    resource.prlimit(child.pid, resource.RLIMIT_AS, (limit, limit))
            problem = child.exchange(Load(module, self._task.function, path), Loaded, START_TIMEOUT_S).error
        except TimeoutError:
            problem = f'importing module "{module}" took more than {START_TIMEOUT_S:g} s'
        except ChildGone as gone:
            problem = f'importing module "{module}" {gone}'
        if problem:
            self._discard()
            raise ChildGone(problem)
        return child

    def _discard(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
