"""Group advantages: hand values, the vectors, a slow reference, algebra, refusals."""

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.rl.advantages import group_advantages
from tests import ROOT

VECTORS: dict[str, Any] = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text())
EXACT = {"rtol": 1e-12, "atol": 1e-14}
REWARDS = st.lists(st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3)), min_size=2, max_size=32)


def test_hand_value() -> None:
    # Mean 0, squares sum to 4, Bessel: std sqrt(4/3).
    expected = 1 / (math.sqrt(4 / 3) + 1e-6)
    advantages = group_advantages([1, -1, -1, 1], divide_by_std=True)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, [expected, -expected, -expected, expected], **EXACT)


@pytest.mark.parametrize(("divide_by_std", "name"), [(True, "verl_grpo__ddof1_eps1e-6"), (False, "no_std__dr_grpo")])
def test_vectors(divide_by_std: bool, name: str) -> None:
    vector = VECTORS["advantage"]
    rewards, groups = np.array(vector["input"]["rewards"]), np.array(vector["input"]["groups"])
    found = [group_advantages(rewards[groups == g], divide_by_std=divide_by_std) for g in np.unique(groups)]
    np.testing.assert_allclose(np.concatenate(found), vector["output"][name], **EXACT)


@pytest.mark.parametrize("row", VECTORS["advantage_k_of_16"]["table"], ids=lambda row: str(row["n_correct"]))
def test_k_right_of_16(row: dict[str, Any]) -> None:
    k = row["n_correct"]
    advantages = group_advantages([1.0] * k + [-1.0] * (16 - k), divide_by_std=True)
    right, wrong = row["A_correct_ddof1"], row["A_wrong_ddof1"]
    np.testing.assert_allclose(advantages[:k], [right] * k, **EXACT)
    np.testing.assert_allclose(advantages[k:], [wrong] * (16 - k), **EXACT)


@settings(derandomize=True, database=None, deadline=None)
@given(REWARDS)
def test_against_the_standard_library(rewards: list[float]) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    expected = [(reward - mean) / (std + 1e-6) for reward in rewards]
    np.testing.assert_allclose(group_advantages(rewards, divide_by_std=True), expected, rtol=1e-9, atol=1e-9)
    expected = [reward - mean for reward in rewards]
    np.testing.assert_allclose(group_advantages(rewards, divide_by_std=False), expected, rtol=1e-9, atol=1e-12)


@settings(derandomize=True, database=None, deadline=None)
@given(REWARDS, st.randoms(use_true_random=False), st.booleans())
def test_centred_equivariant_and_shift_free(rewards: list[float], random: Any, divide_by_std: bool) -> None:
    advantages = group_advantages(rewards, divide_by_std=divide_by_std)
    assert abs(advantages.sum()) < 1e-9
    order = random.sample(range(len(rewards)), len(rewards))
    permuted = group_advantages([rewards[i] for i in order], divide_by_std=divide_by_std)
    np.testing.assert_allclose(permuted, advantages[order], rtol=1e-9, atol=1e-9)
    shifted = group_advantages([reward + 5 for reward in rewards], divide_by_std=divide_by_std)
    np.testing.assert_allclose(shifted, advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, -1.7, 1 / 3, 1.0])
def test_equal_rewards_give_exactly_zero(reward: float, divide_by_std: bool) -> None:
    # The mean of three 0.1 is not 0.1 in floating point.
    for size in (2, 3, 7, 16):
        assert group_advantages([reward] * size, divide_by_std=divide_by_std).tolist() == [0.0] * size


def test_a_group_of_one_and_no_aliasing() -> None:
    rewards = np.array([-1.5])
    np.testing.assert_allclose(group_advantages(rewards, divide_by_std=True), [-1.5 / (1 + 1e-6)], **EXACT)
    alone = group_advantages(rewards, divide_by_std=False)
    alone[0] = 7.0
    assert rewards[0] == -1.5


@pytest.mark.parametrize("rewards", [[], [[1.0, -1.0]], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_rewards_are_refused(rewards: list[Any]) -> None:
    with pytest.raises(ValueError, match="rewards must be a non-empty list of finite numbers"):
        group_advantages(rewards, divide_by_std=True)
