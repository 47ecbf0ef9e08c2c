"""Rewards: hand values, the vectors of Eq. 13 and of groups with shaped rewards, algebra, refusals."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.rl.rewards import group_rewards, soft_overlong_punishment
from tests import ROOT

VECTORS: dict[str, Any] = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text())
EXACT = {"rtol": 1e-12, "atol": 1e-14}
SMALL = {"max_tokens": 100, "overlong_cache_tokens": 20}


def test_hand_values() -> None:
    # 80 is still free, 85 is a quarter into the cache of 20, 100 its end, 200 cannot cost more.
    expected = [0.0, 0.0, -0.25, -1.0, -1.0]
    punishment = soft_overlong_punishment([1, 80, 85, 100, 200], **SMALL)
    assert punishment.dtype == np.float64
    assert punishment.tolist() == expected
    rewards = group_rewards([True, False, True, False, True], [1, 80, 85, 100, 200], **SMALL, overlong_penalty=2.0)
    assert rewards.tolist() == [1.0, -1.0, 0.5, -3.0, -1.0]


@pytest.mark.parametrize("row", VECTORS["overlong"]["table"], ids=lambda r: f"{r['L_max']}-{r['L_cache']}-{r['len']}")
def test_boundary_lengths_of_the_vectors(row: dict[str, Any]) -> None:
    limits = {"max_tokens": row["L_max"], "overlong_cache_tokens": row["L_cache"]}
    np.testing.assert_allclose(soft_overlong_punishment([row["len"]], **limits), [row["paper_eq13"]], **EXACT)
    rewards = group_rewards([True, False], [row["len"]] * 2, **limits, overlong_penalty=1.0)
    expected = [row["total_reward_if_correct_paper"], row["total_reward_if_wrong_paper"]]
    np.testing.assert_allclose(rewards, expected, **EXACT)


@pytest.mark.parametrize("group", VECTORS["dynamic_sampling"]["groups"], ids=lambda group: group["uid"])
def test_overlong_punishment_can_give_spread_to_equal_verdicts(group: dict[str, Any]) -> None:
    correct = [bool(x) for x in group["acc"]]
    # A cache of 100 tokens up to 200 turns a punishment of -x into a length of 100 + 100 x.
    lengths = [100 - 100 * x for x in group["overlong"]]
    rewards = group_rewards(correct, lengths, max_tokens=200, overlong_cache_tokens=100, overlong_penalty=1.0)
    assert rewards.tolist() == group["seq_reward"]
    assert bool(rewards.std() > 0) is group["keep"]["seq_reward"]


def test_stop_token_counts_and_truncation_costs_the_whole_punishment() -> None:
    vector = VECTORS["length_semantics"]
    limit = vector["max_response_length"]
    rewards = group_rewards(
        [True, False], vector["length"], max_tokens=limit, overlong_cache_tokens=2, overlong_penalty=1.0
    )
    assert vector["length"][1] == limit
    assert rewards.tolist() == [1.0, -2.0]


def test_no_cache_no_punishment() -> None:
    limits = {"max_tokens": 10, "overlong_cache_tokens": 0}
    assert soft_overlong_punishment([1, 10, 11], **limits).tolist() == [0.0, 0.0, 0.0]


@settings(derandomize=True, database=None, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=20),
    max_tokens=st.integers(1, 300),
    share=st.floats(0, 1),
)
def test_against_the_formula_in_plain_python(lengths: list[int], max_tokens: int, share: float) -> None:
    cache = int(share * max_tokens)

    def punishment(length: int) -> float:
        if cache == 0 or length <= max_tokens - cache:
            return 0.0
        return ((max_tokens - cache) - length) / cache if length <= max_tokens else -1.0

    found = soft_overlong_punishment(lengths, max_tokens=max_tokens, overlong_cache_tokens=cache)
    np.testing.assert_allclose(found, [punishment(length) for length in lengths], **EXACT)
    assert ((found >= -1) & (found <= 0)).all()


@pytest.mark.parametrize("cache", [-1, 101])
def test_a_cache_outside_the_limit_is_refused(cache: int) -> None:
    with pytest.raises(ValueError, match=r"overlong_cache_tokens must lie in 0 \.\. 100"):
        soft_overlong_punishment([5], max_tokens=100, overlong_cache_tokens=cache)


@pytest.mark.parametrize("lengths", [[-1, 2], [[1, 2]], [float("nan")]])
def test_bad_lengths_are_refused(lengths: list[Any]) -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        soft_overlong_punishment(lengths, **SMALL)


@pytest.mark.parametrize("correct", [[], [1, 0], [1.0, -1.0], [[True]]])
def test_verdicts_must_be_booleans(correct: list[Any]) -> None:
    with pytest.raises(ValueError, match="verdicts"):
        group_rewards(correct, [1, 2], **SMALL, overlong_penalty=1.0)


def test_verdicts_and_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="got 1 verdicts for 2 lengths"):
        group_rewards([True], [1, 2], **SMALL, overlong_penalty=1.0)
