"""math-verify as a verifier: what it accepts, what hangs or crashes in it, several processes, and a second opinion."""

import importlib.util
import logging
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo_async.config.settings import Reward
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import Tally
from dapo_async.errors import ConfigError
from dapo_async.transport.messages import Completion
from dapo_async.verify.pool import Task, VerifierPool
from dapo_async.verify.verifier import Verdict, Verifier, check_verifier, make_verifier
from tests.transport.message_cases import a_group
from tests.verify.test_verifier import DEADLINE_S, USER_MODULE, VECTORS, judge

ENDLESS = r"Answer: $\sum_{k=1}^{10^9} \sin(k^2)$"


@pytest.fixture(scope="module")
def math_verify() -> Iterator[Verifier]:
    made = make_verifier(Reward(verifier="math_verify", timeout_s=30.0, processes=1))
    yield made
    made.close()


def all_verdicts(verifier: Verifier, num: int) -> dict[Any, Verdict]:
    """The next ``num`` verdicts, by key."""
    found: dict[Any, Verdict] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < num:
        assert time.monotonic() < deadline, f"only {sorted(found)} came"
        found |= dict(verifier.poll(timeout_s=1.0))
    return found


# --- which answers are right -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "truth", "correct"),
    [
        ("Answer: 33", "33", True),
        ("Answer: 540.", "540", True),
        ("**Answer:** 540", "540", True),
        ("Answer: **42**", "42", True),
        ("Answer: (42)", "42", True),
        ("Answer: 033", "33", True),
        ("Answer: 33.0", "33", True),
        (r"Answer: \frac{66}{2}", "33", True),
        (r"Answer: $\frac{66}{2}$", "33", True),
        (r"Answer: \(33\)", "33", True),
        ("Answer: x = 33", "33", True),
        ("Answer: 1,234", "1234", True),
        ("Answer: 2^5 + 1", "33", True),
        (r"so it is \boxed{\frac{1}{2}}, as said", "0.5", True),
        (r"Answer: \boxed{33}", "33", True),
        ("Answer: b + a", "a+b", True),
        ("Answer: 5\nno, wait.\nAnswer: 33", "33", True),
        ("Answer: 33\n" + "as one can see. " * 100, "33", True),  # DAPO's check looks at 300 characters
        ("Answer:\n\n33", "33", True),
        ("Answer: 34", "33", False),
        ("Answer: 7", "-7", False),
        ("Answer: 33\nno, wait.\nAnswer: 5", "33", False),
        (r"\boxed{33} ... Answer: 5", "33", False),
        ("Answer: 33 or 34", "33", False),
        ("Answer: ???", "33", False),
        ("first 5 + 5 = 10, then 10 + 23 = 33", "33", False),  # cut off: an intermediate result is no answer
        (r"\boxed{33", "33", False),
        ("", "33", False),
    ],
)
def test_equivalence(math_verify: Verifier, text: str, truth: str, correct: bool) -> None:
    verdict = judge(math_verify, text, truth)
    assert (verdict.correct, verdict.status) == (correct, "ok")


def test_the_answer_that_was_seen_is_told(math_verify: Verifier) -> None:
    assert judge(math_verify, "so\nAnswer: 66/2", "33") == Verdict(True, "66/2", "ok")
    assert judge(math_verify, "so 33", "33") == Verdict(False, "[INVALID]", "ok")


# --- what goes wrong in it -------------------------------------------------------------------------------


def test_what_hangs_or_wants_all_memory_costs_its_own_verdict() -> None:
    verifier = make_verifier(Reward(verifier="math_verify", timeout_s=3.0, processes=1))
    try:
        # Whether it meets the limit of time or that of memory first is the machine's business.
        assert judge(verifier, ENDLESS, "33").status in ("timeout", "error")
        assert judge(verifier, "Answer: 66/2", "33") == Verdict(True, "66/2", "ok")
    finally:
        verifier.close()


def test_an_empty_truth_is_an_error_not_a_wrong_answer(math_verify: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert judge(math_verify, "Answer: 33", "") == Verdict(False, "", "error")
    assert "ValueError: the truth is empty; counted as wrong" in caplog.messages[0]


def test_nothing_but_failures_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    verifier = make_verifier(Reward(verifier="math_verify", processes=1))
    judge(verifier, "Answer: 33", "33")
    verifier.close()
    assert capfd.readouterr().err == ""  # math-verify would warn that its own time limits are off


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for reward, setting in (
        (Reward(verifier="math_verify"), "verifier"),
        (Reward(verifier="exact", compare_with="math_verify"), "compare_with"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_verifier(reward)
        assert str(caught.value) == (
            f'reward.{setting} = "math_verify" needs the math-verify package: install it, for example with '
            'pip install "dapo-async[math]", or use "dapo_math"'
        )


# --- several processes -----------------------------------------------------------------------------------


@pytest.fixture
def user_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    more = """
        def hoard(text, truth):
            return len(bytearray(int(text))) > 0
    """
    (tmp_path / "my_rewards.py").write_text(USER_MODULE + textwrap.dedent(more))
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards:score"


def test_one_that_hangs_does_not_hold_up_the_others(user_function: str) -> None:
    verifier = make_verifier(Reward(verifier=user_function, timeout_s=1000.0, processes=2))
    verifier.submit("hung", "loop", "")
    for key in range(5):
        verifier.submit(key, "truth", "truth")
    assert all_verdicts(verifier, 5) == dict.fromkeys(range(5), Verdict(True))
    assert verifier.pending == 1
    verifier.close()  # nothing stays behind: every test is checked for that


def test_every_process_is_replaced_when_it_dies(user_function: str) -> None:
    verifier = make_verifier(Reward(verifier=user_function, timeout_s=30.0, processes=3))
    for key in range(9):
        verifier.submit(key, "os._exit", "")
    assert all_verdicts(verifier, 9) == dict.fromkeys(range(9), Verdict(False, status="error"))
    verifier.submit("pid", "pid", "")
    assert all_verdicts(verifier, 1)["pid"].correct
    verifier.close()


def test_a_limit_of_memory_binds_the_child_alone(user_function: str) -> None:
    task = Task("reward.verifier", "hoard", "my_rewards", "hoard", timeout_s=30.0, memory_bytes=2 << 30)
    verifier = VerifierPool(task, 1)
    assert judge(verifier, str(1 << 20)) == Verdict(True)
    assert judge(verifier, str(4 << 30)) == Verdict(False, status="error")
    assert judge(verifier, str(1 << 20)) == Verdict(True)
    verifier.close()


def test_if_one_process_cannot_load_all_end() -> None:
    with pytest.raises(ConfigError, match='there is no module "no_such_module"'):
        make_verifier(Reward(verifier="no_such_module:score", processes=3))


# --- a second opinion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["math_verify", "exact"])
def test_the_second_verifier_changes_nothing_of_the_verdict(second: str) -> None:
    alone = make_verifier(Reward())
    both = make_verifier(Reward(verifier="dapo_math", compare_with=second, processes=2))
    for key, vector in enumerate(VECTORS):
        alone.submit(key, vector["solution"], vector["ground_truth"])
        both.submit(key, vector["solution"], vector["ground_truth"])
    compared = all_verdicts(both, len(VECTORS))
    assert {key: verdict._replace(second="") for key, verdict in compared.items()} == dict(alone.poll())
    assert {verdict.second for verdict in compared.values()} <= {"right", "wrong"}
    assert both.pending == 0
    both.close()


def test_where_the_two_differ() -> None:
    verifier = make_verifier(Reward(verifier="dapo_math", compare_with="math_verify", processes=1))
    texts = {"Answer: 33": "33", "Answer: 33.0": "33", "Answer: square 33": "33", "Answer: 5": "33"}
    for key, (text, truth) in enumerate(texts.items()):
        verifier.submit(key, text, truth)
    found = all_verdicts(verifier, 4)
    assert [(found[key].correct, found[key].second) for key in range(4)] == [
        (True, "right"),
        (False, "right"),
        (True, "wrong"),
        (False, "wrong"),
    ]
    verifier.close()


def test_failures_of_the_second_are_told_and_the_first_stands(user_function: str) -> None:
    verifier = make_verifier(Reward(verifier="exact", compare_with=user_function, timeout_s=1.5))
    for text, second in (("raise", "error"), ("os._exit", "error"), ("loop", "timeout"), ("same", "right")):
        assert judge(verifier, text, text) == Verdict(True, text, "ok", second)  # type: ignore[arg-type]
    verifier.close()


def test_a_key_that_comes_twice_gets_two_verdicts(user_function: str) -> None:
    verifier = make_verifier(Reward(verifier="exact", compare_with=user_function))
    for text in ("a", "b"):
        verifier.submit("same key", text, "b")
    found: list[tuple[Any, Verdict]] = []
    deadline = time.monotonic() + DEADLINE_S
    while verifier.pending and time.monotonic() < deadline:
        found += verifier.poll(timeout_s=1.0)
    assert found == [("same key", Verdict(False, "a", "ok", "wrong")), ("same key", Verdict(True, "b", "ok", "right"))]
    assert verifier.poll(timeout_s=5.0) == []
    verifier.close()


def test_a_second_that_cannot_be_had_is_named_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r'^reward\.compare_with = "maths": must be sums, '):
        check_verifier(Reward(compare_with="maths"))
    with pytest.raises(ConfigError, match=r'^reward\.compare_with = "nowhere:f": there is no module "nowhere" in '):
        check_verifier(Reward(verifier="math_verify", compare_with="nowhere:f"))  # and the first leaves nothing
    table = {"model": {"path": "m"}, "data": {"train": "t"}, "reward": {"verifier": "exact", "compare_with": "exact"}}
    with pytest.raises(ConfigError, match='compare_with must name another verifier than verifier = "exact"'):
        build_config(table, "test")


def test_disagreements_are_tallied_each_way_and_failures_apart() -> None:
    opinions: list[tuple[bool, Any, Any]] = [
        (True, "ok", "right"),
        (True, "ok", "wrong"),
        (True, "ok", "wrong"),
        (False, "ok", "right"),
        (False, "ok", "wrong"),
        (True, "ok", "error"),
        (False, "ok", "timeout"),
        (False, "timeout", "right"),  # the first had no opinion
        (False, "error", "wrong"),
        (True, "ok", ""),
    ]
    completions = [
        Completion(num_tokens=1, spans=[(0, 1)], finish="stop", correct=correct, verdict=verdict, second=second)
        for correct, verdict, second in opinions
    ]
    totals: Counter[str] = Counter()
    tally = Tally(totals)
    tally.add(a_group(completions=completions), "accepted")
    names = ("compared", "first_only", "second_only", "second_errors", "second_timeouts")
    assert [totals[name] for name in names] == [5, 2, 1, 1, 1]
