"""Scores against values worked out by hand, a slow reference, and what must hold for any answers."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from dapo_async.rl.scores import Score, ScoredAnswer, majority, pass_at_k, powers_up_to, score, with_intervals


def judged(predicted: str, truth: str = "7", num_tokens: int = 3, truncated: bool = False) -> ScoredAnswer:
    return ScoredAnswer(correct=predicted == truth, predicted=predicted, num_tokens=num_tokens, truncated=truncated)


def judged_all(predicted: str) -> list[ScoredAnswer]:
    """One answer per letter; 7 is right, and - is no answer."""
    return [judged("" if letter == "-" else letter) for letter in predicted]


# --- pass@k ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        (5, 2, 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
        (10, 3, 5, 11 / 12),  # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252
        (6, 2, 1, 1 / 3),  # pass@1 is the share of right answers
        (6, 0, 6, 0.0),
        (6, 1, 6, 1.0),  # all are drawn
        (6, 5, 2, 1.0),  # one wrong answer cannot fill both places
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([i < c for i in range(n)], k))
                share = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(2000, 1, 1000), (2000, 700, 4), (1024, 3, 512), (10_000, 1, 1)])
def test_pass_at_k_is_stable_where_binomials_have_no_float(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    # A product of c factors in float64: some ulps of its size, which is at most 1.
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_that_is_not_defined(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])])
def test_the_k_of_pass_at_k(k: int, expected: list[int]) -> None:
    assert powers_up_to(k) == expected


# --- maj@k -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("7", 1.0),
        ("8", 0.0),
        ("7788", 1 / 2),  # two tied, one of them right
        ("778899", 1 / 3),
        ("889977", 1 / 3),  # the order does not matter
        ("8899", 0.0),
        ("77889", 1 / 2),  # the lone 9 is not among the winners
        ("778", 1.0),
        ("7889", 0.0),
        ("77--", 1 / 2),  # no answer is a vote too
        ("7---", 0.0),
        ("777-", 1.0),
    ],
)
def test_majority_by_hand(predicted: str, expected: float) -> None:
    assert majority(judged_all(predicted)) == pytest.approx(expected, abs=1e-15)


def test_majority_is_the_mean_over_fair_tie_breaking() -> None:
    rng = np.random.default_rng(0)
    samples = judged_all("77788899905")
    votes = {answer: sum(s.predicted == answer for s in samples) for answer in "78905"}
    best = [answer for answer, count in votes.items() if count == max(votes.values())]
    drawn = [best[i] == "7" for i in rng.integers(len(best), size=4000)]
    # Standard deviation of a mean of 4,000 draws with p = 1/3 is 0.0075; four of them.
    assert majority(samples) == pytest.approx(np.mean(drawn), abs=0.03)


def test_verdicts_that_differ_on_one_string_count_by_their_share() -> None:
    samples = [
        ScoredAnswer(correct=right, predicted="x", num_tokens=1, truncated=False) for right in (True, True, False)
    ]
    assert majority(samples) == pytest.approx(2 / 3)


def judged_as(*told: tuple[str, bool]) -> list[ScoredAnswer]:
    return [ScoredAnswer(correct=right, predicted=text, num_tokens=1, truncated=False) for text, right in told]


def test_right_answers_are_one_vote_however_they_are_spelled() -> None:
    right = [("7", True), ("$7$", True), ("7.0", True), ("14/2", True), ("\\sqrt{49}", True)]
    assert majority(judged_as(*right, *[("8", False)] * 4)) == 1.0
    assert majority(judged_as(*right, *[("8", False)] * 5)) == 1 / 2
    assert majority(judged_as(*right, *[("8", False)] * 6)) == 0.0


def test_wrong_answers_of_one_value_are_one_vote() -> None:
    wrong = [("8", False), ("$8$", False), ("8.0", False), ("16/2", False), ("\\boxed{8}", False)]
    assert majority(judged_as(*wrong, *[("7", True)] * 4)) == 0.0
    assert majority(judged_as(("8", False), ("9", False), ("10", False), ("7", True), ("7.0", True))) == 1.0


def test_wrong_answers_of_another_value_are_other_votes() -> None:
    wrong = [
        ("8", False),
        ("8!", False),
        ("-8", False),
        ("8/3", False),
        ("(8)(3)", False),
        ("", False),
        ("[INVALID]", False),
    ]
    assert majority(judged_as(*wrong, ("7", True), ("7", True))) == 1.0


# --- intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Means of resamples: 0, 1/2, 1 with probability 1/4, 1/2, 1/4: both tails hold more than 2.5 %.
        ([0, 1], 0.0, 1.0),
        # Binomial(4, 1/4) / 4: P(0) = 0.316; P(4) = 0.004 and P(3 or 4) = 0.051, so the upper end is 3/4.
        ([0, 0, 0, 1], 0.0, 0.75),
        # The mirror image.
        ([1, 1, 0, 1], 0.25, 1.0),
        # Binomial(6, 1/2) / 6: P(0) = 0.016 and P(0 or 1) = 0.109, so the ends are 1/6 and 5/6.
        ([0, 1, 0, 1, 0, 1], 1 / 6, 5 / 6),
        ([0.5, 0.5, 0.5], 0.5, 0.5),
        ([0.25], 0.25, 0.25),
    ],
)
def test_intervals_by_hand(values: Sequence[float], low: float, high: float) -> None:
    """2,000 resamples put each tail within 0.4 % (one standard deviation at most) of the probabilities above."""
    for seed in range(5):
        assert with_intervals({"x": values}, seed=seed)["x"] == Score(
            pytest.approx(float(np.mean(values))), pytest.approx(low), pytest.approx(high)
        )


def test_the_interval_of_many_prompts_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, size=400)
    got = with_intervals({"x": values.tolist()}, seed=0)["x"]
    spread = 1.96 * values.std() / math.sqrt(len(values))
    # The 2.5 % quantile of 2,000 resampled means has a standard error of about 0.06 of their standard deviation.
    assert got.low == pytest.approx(values.mean() - spread, abs=0.2 * spread)
    assert got.high == pytest.approx(values.mean() + spread, abs=0.2 * spread)


def test_intervals_depend_on_the_seed_alone() -> None:
    columns = {"x": np.random.default_rng(2).random(50).tolist(), "y": np.random.default_rng(3).random(50).tolist()}
    assert with_intervals(columns, seed=0) == with_intervals(columns, seed=0)
    alone = with_intervals({"y": columns["y"]}, seed=0)["y"]
    assert with_intervals(columns, seed=0)["y"].low == pytest.approx(alone.low)  # the order of sums differs
    assert with_intervals(columns, seed=0) != with_intervals(columns, seed=1)


# --- all together ----------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    answers = [
        [
            judged("7", num_tokens=2),
            judged("7", num_tokens=4),
            judged("8", num_tokens=6, truncated=True),
        ],
        [judged("8", num_tokens=1), judged("9", num_tokens=1), judged("7", num_tokens=1)],
    ]
    got = {name: result.value for name, result in score(answers, seed=0).items()}
    assert got == {
        "avg@3": pytest.approx((2 / 3 + 1 / 3) / 2),
        "pass@1": pytest.approx((2 / 3 + 1 / 3) / 2),
        "pass@2": pytest.approx((1 + 2 / 3) / 2),  # 1 - C(1, 2) / C(3, 2) = 1 and 1 - C(2, 2) / C(3, 2)
        "pass@3": 1.0,
        "maj@3": pytest.approx((1 + 1 / 3) / 2),
        "length_mean": pytest.approx((4 + 1) / 2),
        "truncated_share": pytest.approx((1 / 3 + 0) / 2),
    }


def test_no_majority_without_answers_to_count() -> None:
    silent = [[ScoredAnswer(correct=right, num_tokens=1, truncated=False) for right in (True, False)]]
    assert set(score(silent, seed=0)) == {"avg@2", "pass@1", "pass@2", "length_mean", "truncated_share"}


@pytest.mark.parametrize("answers", [[], [[]], [[judged("7")], [judged("7"), judged("8")]]])
def test_ragged_answers_are_refused(answers: list[list[ScoredAnswer]]) -> None:
    with pytest.raises(ValueError, match="same number of answers"):
        score(answers, seed=0)
