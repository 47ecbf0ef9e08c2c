"""Verdicts on answers: right or wrong, by a built-in check, by math-verify, or by the user's own function.

Nothing here knows tokens, rewards or sockets. Built-in checks run in the caller, everything else in child processes
with a hard time limit (``pool``).
"""

import importlib.util
import re
import time
from collections.abc import Callable, Hashable
from typing import Literal, Protocol

import msgspec

from dapo_async.config.settings import Reward
from dapo_async.errors import ConfigError
from dapo_async.verify.child import MAX_PREDICTED, clean, describe
from dapo_async.verify.dapo_math import check_answer
from dapo_async.verify.pool import FailureLog, Task, Verdict, VerifierPool

# math-verify runs in children only: it may compute for ever, ask for all memory, and its own alarm needs a main thread.
MATH_VERIFY = ("dapo_async.verify.math_equivalence", "check_equivalence")
MATH_VERIFY_PROCESSES = 2  # so that one hung verification does not hold up the rest
MATH_VERIFY_BYTES = 4 << 30  # address space; what wants more (an exponent tower, say) fails alone
SLICE_S = 0.02  # how soon a wait for one of two verifiers looks at the other

Check = Callable[[str, str], tuple[bool, str]]


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

    With ``reward.compare_with`` its verdicts also say what the other one found. Raises ``ConfigError`` if there is no
    such check, package, module or function.
    """
    first = _make(reward, "verifier")
    if not reward.compare_with:
        return first
    try:
        return ComparedVerifier(first, _make(reward, "compare_with"))
    except ConfigError:
        first.close()
        raise


def check_verifier(reward: Reward) -> None:
    """Raise ``ConfigError`` now rather than in a worker: what runs in a child is loaded in one, which then ends."""
    make_verifier(msgspec.structs.replace(reward, processes=1)).close()


def _make(reward: Reward, setting: Literal["verifier", "compare_with"]) -> Verifier:
    """The verifier that this setting names. Raises ``ConfigError``."""
    name, place = getattr(reward, setting), f"reward.{setting}"
    if name in (checks := built_in(reward)):
        return InlineVerifier(checks[name], name)
    if name == "math_verify":
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                f'{place} = "math_verify" needs the math-verify package: install it, for example with '
                'pip install "dapo-async[math]", or use "dapo_math"'
            )
        task = Task(place, name, *MATH_VERIFY, reward.timeout_s, MATH_VERIFY_BYTES)
        return VerifierPool(task, reward.processes or MATH_VERIFY_PROCESSES)
    module, colon, function = name.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(
            f'{place} = "{name}": must be {", ".join(checks)}, math_verify, or module:function of your own, '
            'for example "my_rewards:judge"'
        )
    return VerifierPool(Task(place, name, module, function, reward.timeout_s), reward.processes or 1)


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


def built_in(reward: Reward) -> dict[str, Check]:
    """The checks that run in the caller, by name."""
    return {
        "sums": check_sums,
        "dapo_math": lambda text, truth: check_answer(text, truth, reward.boxed_fallback),
        "exact": check_exact,
    }


class InlineVerifier:
    """A built-in check, run within ``submit``."""

    def __init__(self, check: Check, name: str) -> None:
        self._check = check
        self._failures = FailureLog(name)
        self._done: list[tuple[Hashable, Verdict]] = []

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        try:
            correct, predicted = self._check(text, truth)
            verdict = Verdict(correct, clean(predicted, MAX_PREDICTED))
        except Exception as error:  # noqa: BLE001 - a check's bug costs its own verdict, not the worker
            self._failures.add(describe(error), text, truth)
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


# --- a second opinion ------------------------------------------------------------------------------------


class ComparedVerifier:
    """The verdicts of ``first``, each with what ``second`` says of the same text; given once both have spoken."""

    def __init__(self, first: Verifier, second: Verifier) -> None:
        self._both = first, second
        self._asked = 0  # submissions are numbered here, because a key may come twice
        self._open: dict[int, tuple[Hashable, dict[int, Verdict]]] = {}

    def submit(self, key: Hashable, text: str, truth: str) -> None:
        self._open[self._asked] = key, {}
        for verifier in self._both:
            verifier.submit(self._asked, text, truth)
        self._asked += 1

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """See ``Verifier``."""
        deadline = time.monotonic() + timeout_s
        wait_s = 0.0
        while True:
            done = self._collect(wait_s)
            remaining = deadline - time.monotonic()
            if done or not self._open or remaining <= 0:
                return done
            wait_s = min(remaining, SLICE_S)

    def _collect(self, wait_s: float) -> list[tuple[Hashable, Verdict]]:
        done = []
        for place, verifier in enumerate(self._both):
            for number, verdict in verifier.poll(wait_s):
                assert isinstance(number, int)  # as submitted
                key, verdicts = self._open[number]
                verdicts[place] = verdict
                if len(verdicts) == len(self._both):
                    del self._open[number]
                    done.append((key, verdicts[0]._replace(second=_word(verdicts[1]))))
        return done

    @property
    def pending(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self._open = {}
        for verifier in self._both:
            verifier.close()


def _word(verdict: Verdict) -> Literal["right", "wrong", "error", "timeout"]:
    if verdict.status != "ok":
        return verdict.status
    return "right" if verdict.correct else "wrong"
