"""Verdicts on answers: right or wrong, by a built-in check or by the user's own function in a process of its own.

Called by the rollout loop between decode steps; nothing here knows tokens, rewards or sockets. Built-in checks run in
the caller. A user's ``module:function`` runs in one child process (``verifier_child``), fed by one thread that is the
child's only owner: it may raise, print, exit, hang or crash, and costs its own verdict only.
"""

import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple, Protocol

from dapo_async.config import Reward
from dapo_async.errors import ConfigError, WorkerError
from dapo_async.math_answer import check_answer
from dapo_async.verifier_child import (
    END_TIMEOUT_S,
    MAX_PREDICTED,
    Answer,
    Ask,
    Child,
    ChildGone,
    Closing,
    Load,
    Loaded,
    clean,
    describe,
)

START_TIMEOUT_S = 120.0  # importing the user's module, heavy libraries included
WAIT_S = 60.0  # how long one wait for the next submission lasts before it is renewed
LOGGED_CHARS = 200

logger = logging.getLogger(__name__)
Check = Callable[[str, str], tuple[bool, str]]


class Verdict(NamedTuple):
    """What a verifier says of one completion. ``correct`` is False unless ``status`` is ``ok``."""

    correct: bool
    predicted: str = ""  # the answer that was seen, at most 500 characters
    status: Literal["ok", "error", "timeout"] = "ok"


class Verifier(Protocol):
    """Judges texts, one verdict per ``submit``, not necessarily in order. For one calling thread."""

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        """Ask for a verdict on ``text``. Never blocks."""

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """Verdicts that have come in; waits up to ``timeout_s`` for the first one if any is pending."""

    @property
    def pending(self) -> int:
        """Submissions whose verdict ``poll`` has not returned yet."""

    def close(self) -> None:
        """Forget what is pending and leave no process behind. May be called twice."""


def make_verifier(reward: Reward) -> Verifier:
    """The verifier that ``reward.verifier`` names, ready for use; close it in the end.

    Raises ``ConfigError`` if there is no such check, module or function.
    """
    check = built_in(reward)
    return ProcessVerifier(reward) if check is None else InlineVerifier(check, reward.verifier)


def check_verifier(reward: Reward) -> None:
    """Raise ``ConfigError`` now rather than in a worker: a user's function is loaded in a child, which then ends."""
    make_verifier(reward).close()


# --- built-in checks -------------------------------------------------------------------------------------


def check_sums(text: str, truth: str) -> tuple[bool, str]:
    """``3+5=8;8-2=6;#6`` answers 6. Strict: one ``#``, then the digits of an integer and nothing else."""
    match = re.fullmatch(r"[^#]*#(0|[1-9][0-9]*)", text)
    if match is None:
        return False, text.rpartition("#")[2] if "#" in text else ""
    return match[1] == truth.strip(), match[1]


def check_exact(text: str, truth: str) -> tuple[bool, str]:
    """Equal but for surrounding white space."""
    return text.strip() == truth.strip(), text.strip()


def built_in(reward: Reward) -> Check | None:
    """The check named by ``reward.verifier``; None for a well-formed ``module:function``. Raises ``ConfigError``."""
    checks: dict[str, Check] = {
        "sums": check_sums,
        "dapo_math": lambda text, truth: check_answer(text, truth, reward.boxed_fallback),
        "exact": check_exact,
    }
    if reward.verifier in checks:
        return checks[reward.verifier]
    module, colon, function = reward.verifier.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(
            f'reward.verifier = "{reward.verifier}": must be {", ".join(checks)}, or module:function of your own, '
            'for example "my_rewards:score"'
        )
    return None


def _log_failure(name: str, why: str, text: str, truth: str) -> None:
    logger.warning(
        "verifier %s: %s; counted as wrong (truth %r, text ending in %r)",
        name,
        why,
        truth[:LOGGED_CHARS],
        text[-LOGGED_CHARS:],
    )


class InlineVerifier:
    """A built-in check, run within ``submit``."""

    def __init__(self, check: Check, name: str) -> None:
        self._check = check
        self._name = name
        self._done: list[tuple[Hashable, Verdict]] = []

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        try:
            correct, predicted = self._check(text, truth)
            verdict = Verdict(correct, clean(predicted, MAX_PREDICTED))
        except Exception as error:  # noqa: BLE001 - a check's bug costs its own verdict, not the worker
            _log_failure(self._name, describe(error), text, truth)
            verdict = Verdict(False, status="error")
        self._done.append((key, verdict))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        done, self._done = self._done, []
        return done

    @property
    def pending(self) -> int:
        return len(self._done)

    def close(self) -> None:
        self._done = []


# --- the user's function ---------------------------------------------------------------------------------


class ProcessVerifier:
    """The user's function, asked one text at a time in a child that is replaced when it hangs or dies."""

    def __init__(self, reward: Reward) -> None:
        self._name = reward.verifier
        self._timeout_s = reward.timeout_s
        self._child: Child | None = None  # the thread's
        self._asks: queue.SimpleQueue[tuple[Hashable, str, str] | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[tuple[Hashable, Verdict]] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._pending = 0
        self._thread = threading.Thread(target=self._serve, name="verifier", daemon=True)
        self._thread.start()
        problem = self._loaded.get(timeout=START_TIMEOUT_S + 2 * END_TIMEOUT_S)
        if problem:
            self.close()
            raise ConfigError(f'reward.verifier = "{self._name}": {problem}')

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        self._pending += 1
        self._asks.put((key, text, truth))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """As ``Verifier.poll``. Raises ``WorkerError`` if verdicts are pending that can never come."""
        done: list[tuple[Hashable, Verdict]] = []
        deadline = time.monotonic() + timeout_s
        while len(done) < self._pending:
            wait_s = 0.0 if done else max(0.0, deadline - time.monotonic())
            alive = self._thread.is_alive()  # asked before the queue, so that a last verdict is not overlooked
            try:
                done.append(self._verdicts.get(timeout=wait_s) if wait_s else self._verdicts.get_nowait())
            except queue.Empty:
                if not (alive or done):
                    raise WorkerError(f"the thread of verifier {self._name} ended with work pending") from None
                break
        self._pending -= len(done)
        return done

    @property
    def pending(self) -> int:
        return self._pending

    def close(self) -> None:
        self._closing.set()
        self._asks.put(None)
        self._thread.join(timeout=2 * END_TIMEOUT_S)
        self._pending = 0

    # What follows runs in the thread.

    def _serve(self) -> None:
        try:
            self._start()
            self._loaded.put("")
            while not self._closing.is_set():
                try:
                    ask = self._asks.get(timeout=WAIT_S)
                except queue.Empty:
                    continue
                if ask is not None:
                    key, text, truth = ask
                    self._verdicts.put((key, self._judge(Ask(clean(text), clean(truth)))))
        except ChildGone as gone:  # only of the first start: _judge keeps its own
            self._loaded.put(str(gone))
        except Closing:
            pass
        finally:
            self._discard()

    def _judge(self, ask: Ask) -> Verdict:
        try:
            answer = (self._child or self._start()).exchange(ask, Answer, self._timeout_s)
            why = answer.error
            verdict = Verdict(answer.correct, answer.predicted, "error" if why else "ok")
        except ChildGone as gone:
            self._discard()
            verdict, why = Verdict(False, status="error"), str(gone)
        except TimeoutError:
            self._discard()
            verdict, why = Verdict(False, status="timeout"), f"no verdict within {self._timeout_s:g} s"
        if why:
            _log_failure(self._name, why, ask.text, ask.truth)
        return verdict

    def _start(self) -> Child:
        """Start a child and load the function. Raises ``ChildGone`` with a whole sentence, or ``Closing``."""
        module, _, function = self._name.partition(":")
        here = os.getcwd()
        path = list(dict.fromkeys([here, *(entry or here for entry in sys.path)]))
        child = self._child = Child(self._closing)
        try:
            problem = child.exchange(Load(module, function, path), Loaded, START_TIMEOUT_S).error
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
