"""Truths that are not right for themselves are told, by verifier, file and prompt."""

import logging

import numpy as np
import pytest

from dapo_async.config.settings import Reward
from dapo_async.data.prompts import Prompt
from dapo_async.errors import ConfigError
from dapo_async.run.truths import MAX_TRUTHS, check_truths, judge_truths


def prompts(*truths: str) -> list[Prompt]:
    return [Prompt(f"p{number}", np.zeros(1, np.int32), truth, "") for number, truth in enumerate(truths)]


@pytest.mark.parametrize(
    ("verifier", "truths"),
    [
        ("sums", ["6", "0", " 12 "]),
        ("exact", ["6", "two\nlines", " spaced "]),
        ("dapo_math", ["6", r"\frac12", "1,234", "6\n"]),
        ("math_verify", ["6", r"\frac12" + "\n", "No solution.", r"\$32,\!348", "7/8.", r"\{1, 2\}", "two\nlines"]),
    ],
)
def test_truths_that_are_right_for_themselves(
    verifier: str, truths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    check_truths(Reward(verifier=verifier, processes=1, timeout_s=30.0), {"train.jsonl": prompts(*truths), "": []})
    assert caplog.messages == []


def test_some_that_are_not_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    files = {"train.jsonl": prompts("6", "-1", "x", "7", "1.5", "y" * 200), "heldout.jsonl": prompts("8")}
    with caplog.at_level(logging.WARNING):
        check_truths(Reward(verifier="sums"), files)
    assert caplog.messages == [
        'train.jsonl: 4 of 6 truths are not right for themselves under reward.verifier = "sums", so that no answer to '
        "their prompts can be: '-1' (prompt p1), 'x' (prompt p2), '1.5' (prompt p4)"
    ]


def test_a_file_without_one_that_is_right_is_refused() -> None:
    files = {"train.jsonl": prompts("6"), "heldout.jsonl": prompts("a", "b")}
    with pytest.raises(ConfigError, match=r"^heldout\.jsonl: 2 of 2 truths are not right for themselves under "):
        check_truths(Reward(verifier="sums"), files)


def test_nobody_asks_a_function_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    check_truths(Reward(verifier="no_such_module:judge"), {"train.jsonl": prompts("6")})
    assert caplog.messages == []


def test_a_slow_verifier_is_asked_for_a_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(MAX_TRUTHS, "sums", 2)
    with caplog.at_level(logging.WARNING):
        check_truths(Reward(verifier="sums"), {"train.jsonl": prompts("6", "x", "x", "x", "x")})
    assert "train.jsonl: 1 of 2 truths tried of 5 are not right" in caplog.text


def test_a_verdict_that_does_not_come_says_nothing_of_the_truth(caplog: pytest.LogCaptureFixture) -> None:
    reward = Reward(verifier="math_verify", processes=1, timeout_s=1e-6)
    assert judge_truths(reward, [r"\int_0^1 x\,dx"] * 3) == {}
    check_truths(reward, {"train.jsonl": prompts(r"\int_0^1 x\,dx")})
    assert not [told for told in caplog.messages if "not right for themselves" in told]
