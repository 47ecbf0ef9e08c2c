"""The policy loss: hand values, a slow scalar reference on random data, weights, sums, refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dapo_async.config.settings import Objective
from dapo_async.rl.loss import m2po_keep, policy_loss, token_weights
from tests.rl.loss_cases import OBJECTIVES, Batch, random_batch, reference_loss, run

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def small_batch(ratios: list[float], advantages: list[float], dtype: torch.dtype = torch.float64) -> Batch:
    """One sequence whose behaviour log-probs are -1 and whose tokens have these ratios; weight 1 / T."""
    total = len(ratios)
    return {
        "logp_T": torch.tensor(ratios, dtype=torch.float64).log().sub(1.0).to(dtype),
        "behaviour_T": torch.full((total,), -1.0, dtype=dtype),
        "advantage_T": torch.tensor(advantages, dtype=dtype),
        "weight_T": torch.full((total,), 1 / total, dtype=torch.float64),
        "mask_T": torch.ones(total, dtype=torch.bool),
        "sequence_T": torch.zeros(total, dtype=torch.int64),
    }


def test_hand_value() -> None:
    # Objective terms: min(1.5, 1.28), 0.5, -1.5, -max(0.5, 0.8), 1.1 sum to 0.58; loss -0.58 / 5.
    # Gradient -r A / 5 where no clip is active: tokens 1, 2 and 4.
    loss, gradient, sums = run(small_batch([1.5, 0.5, 1.5, 0.5, 1.1], [1, 1, -1, -1, 1]), Objective())
    assert loss == pytest.approx(-0.116, rel=1e-12)
    np.testing.assert_allclose(gradient, [0, -0.1, 0.3, 0, -0.22], **EXACT)
    assert (sums.clip_low, sums.clip_high, sums.clip_dual) == (1, 1, 0)


def test_dual_clip_by_hand() -> None:
    # A < 0 and r = 12: -r A = 12 is capped at 10 and has no gradient. A > 0 is clipped at 1.28 as ever.
    batch = small_batch([12.0, 12.0], [-1, 1])
    loss, gradient, sums = run(batch, Objective())
    assert loss == pytest.approx((10 - 1.28) / 2, rel=1e-12)
    assert gradient.tolist() == [0, 0]
    assert (sums.clip_low, sums.clip_high, sums.clip_dual) == (0, 1, 1)
    loss, gradient, sums = run(batch, Objective(dual_clip=0.0))
    assert loss == pytest.approx((12 - 1.28) / 2, rel=1e-12)
    np.testing.assert_allclose(gradient, [6, 0], **EXACT)
    assert sums.clip_dual == 0


def test_sequence_ratio_by_hand() -> None:
    # Geometric mean of 4 and 1/4 is 1: neither token is clipped, and both share the gradient of both.
    batch = small_batch([4.0, 0.25], [1, 1])
    loss, gradient, sums = run(batch, Objective(ratio="sequence"))
    assert loss == pytest.approx(-1.0, rel=1e-12)
    np.testing.assert_allclose(gradient, [-0.5, -0.5], **EXACT)
    assert sums.ratio_max == pytest.approx(1.0)
    # The effective sample size stays one of tokens: (4.25)^2 / (2 * (16 + 1/16)).
    assert sums.means()["ess_share"] == pytest.approx(4.25**2 / (2 * 16.0625), rel=1e-12)


def test_kl_penalty_is_bounded_per_token() -> None:
    # d = 4: e^4 - 4 - 1 = 49.6 is bounded to 10 and has no gradient. d = ln 2: 2 - ln 2 - 1, gradient 1 - 2.
    batch = small_batch([1.0, 1.0], [0, 0])
    batch["reference_T"] = batch["behaviour_T"] + torch.tensor([4.0, math.log(2)], dtype=torch.float64)
    loss, gradient, sums = run(batch, Objective(kl_coef=0.5))
    assert loss == pytest.approx(0.25 * (10 + 1 - math.log(2)), rel=1e-12)
    np.testing.assert_allclose(gradient, [0, -0.25], **EXACT)
    assert sums.means()["kl_reference"] == pytest.approx((11 - math.log(2)) / 2, rel=1e-12)


def test_entropy_bonus_pulls_entropy_up_and_masked_tokens_do_not() -> None:
    batch = small_batch([1.0, 1.0], [0, 0])
    batch["mask_T"] = torch.tensor([True, False])
    entropy = torch.tensor([0.3, torch.nan], dtype=torch.float64, requires_grad=True)
    loss, sums = policy_loss(**batch, entropy_T=entropy, objective=Objective(entropy_coef=0.1))
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * 0.5 * 0.3)
    assert entropy.grad is not None
    np.testing.assert_allclose(entropy.grad, [-0.05, 0.0], **EXACT)
    assert sums.means()["entropy"] == pytest.approx(0.3)


def test_unused_entropy_is_measured_only() -> None:
    batch = small_batch([1.1], [1.0])
    without = run(batch, Objective())[0]
    loss, _, sums = run(batch | {"entropy_T": torch.tensor([0.7]), "reference_T": batch["behaviour_T"]}, Objective())
    assert loss == without
    assert sums.means()["entropy"] == pytest.approx(0.7)
    assert sums.means()["kl_reference"] == pytest.approx(0.1 + 1 / 1.1 - 1 + math.log(1.1) - 0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_against_the_scalar_reference(name: str, seed: int) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    loss, gradient, sums = run(batch, objective)
    expected_loss, expected_gradient, expected = reference_loss(batch, objective)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    means = sums.means()
    assert sums.num_tokens == batch["mask_T"].sum()
    found = [means[x] for x in ("clip_low", "clip_high", "clip_dual", "masked_share", "ratio_mean", "correction_mean")]
    keys = ("low", "high", "dual", "masked", "ratio", "correction")
    np.testing.assert_allclose(found, [expected[key] for key in keys], rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_stays_float32_and_close(name: str) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(7, objective)
    exact_loss, exact_gradient, _ = run(batch, objective)
    single = {key: x.float() if x.is_floating_point() else x for key, x in batch.items()}
    loss, sums = policy_loss(**single, objective=objective)
    assert loss.dtype == torch.float32
    assert all(x.dtype == torch.float64 and x.shape == () and not x.requires_grad for x in sums)
    loss, gradient, _ = run(single, objective)
    # Differences of log-probs of size 10 carry 1e-6; a ratio of 10 and a token sum amplify it.
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_log_ratios_keep_loss_and_gradient_finite(name: str, gap: float) -> None:
    batch = small_batch([1.0, 1.0], [1, -1], torch.float32)
    batch |= {"proximal_T": batch["behaviour_T"] - 1.0, "reference_T": batch["behaviour_T"] - gap}
    batch |= {"entropy_T": torch.ones(2), "keep_T": torch.tensor([True, True])}
    loss, gradient, sums = run(batch | {"logp_T": batch["behaviour_T"] + gap}, OBJECTIVES[name])
    assert math.isfinite(loss)
    assert gradient.isfinite().all()
    assert torch.stack(list(sums)).isfinite().all()


def test_only_the_log_probs_carry_gradient() -> None:
    objective = OBJECTIVES["cispo_open_icepop"]
    batch = random_batch(1, objective)
    leaves = {key: x.clone().requires_grad_() if x.is_floating_point() else x for key, x in batch.items()}
    loss, _ = policy_loss(**leaves, objective=objective)
    loss.backward()
    assert [key for key, x in leaves.items() if x.grad is not None] == ["logp_T"]


def test_sums_without_entropy_or_reference_leave_them_out() -> None:
    _, _, sums = run(small_batch([1.0], [1.0]), Objective())
    assert math.isnan(sums.entropy)
    means = sums.merge(sums).means()
    assert "entropy" not in means
    assert "kl_reference" not in means
    assert means["ess_share"] == 1.0
    assert means["correction_mean"] == 1.0


def test_a_microbatch_of_masked_tokens_costs_nothing() -> None:
    for objective in (Objective(), Objective(ratio="sequence")):
        batch = small_batch([1.5, 0.5], [1, -1]) | {"mask_T": torch.zeros(2, dtype=torch.bool)}
        loss, gradient, sums = run(batch, objective)
        assert loss == 0
        assert gradient.tolist() == [0, 0]
        assert sums.means() == {}


def test_the_largest_ratio_is_one_of_an_unmasked_token() -> None:
    batch = small_batch([0.5, 0.25, 3.0], [1, 1, 1]) | {"mask_T": torch.tensor([True, True, False])}
    assert run(batch, Objective())[2].ratio_max == pytest.approx(0.5)


def test_token_weights_by_hand() -> None:
    lengths, groups = [2, 0, 4, 1, 1], ["a", "a", "b", "b", "c"]

    def weights(aggregation: str) -> list[float]:
        return token_weights(lengths, groups, aggregation=aggregation, length_norm_tokens=10).tolist()

    # 8 tokens, 5 sequences of which the masked one counts, 3 prompts with 2, 5 and 1 tokens.
    assert weights("token-mean") == [1 / 8, 0, 1 / 8, 1 / 8, 1 / 8]
    assert weights("token-sum") == [1, 0, 1, 1, 1]
    assert weights("seq-mean-token-mean") == [1 / 10, 0, 1 / 20, 1 / 5, 1 / 5]
    assert weights("seq-mean-token-sum") == [1 / 5, 0, 1 / 5, 1 / 5, 1 / 5]
    assert weights("seq-mean-token-sum-norm") == [1 / 50, 0, 1 / 50, 1 / 50, 1 / 50]
    assert weights("prompt-mean-token-mean") == [1 / 6, 0, 1 / 15, 1 / 15, 1 / 3]


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "prompt-mean-token-mean"])
def test_a_step_of_masked_sequences_has_zero_weights(aggregation: str) -> None:
    assert token_weights([0, 0], [0, 1], aggregation=aggregation).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths_S": []}, "lengths must be a non-empty list of counts"),
        ({"lengths_S": [1, -1]}, "lengths must be a non-empty list of counts"),
        ({"groups_S": [0, 0, 1]}, "got 2 lengths for groups of shape"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "needs length_norm_tokens >= 1, got 0"),
        ({"aggregation": "mean"}, "aggregation must be one of token-mean"),
    ],
)
def test_token_weights_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(**({"lengths_S": [1, 2], "groups_S": [0, 0], "aggregation": "token-mean"} | changes))


@pytest.mark.parametrize(
    ("objective", "missing"),
    [
        (Objective(ratio_against="proximal"), "proximal"),
        (Objective(ratio_against="proximal", correction="m2po"), "proximal and keep"),
        (Objective(kl_coef=0.1), "reference"),
        (Objective(entropy_coef=0.1), "entropy"),
    ],
)
def test_an_objective_without_its_inputs_is_refused(objective: Objective, missing: str) -> None:
    with pytest.raises(ValueError, match=f"needs {missing}, which was not given"):
        policy_loss(**small_batch([1.0], [1.0]), objective=objective)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_T", torch.ones(3), "share one shape"),
        ("entropy_T", torch.ones(1), "share one shape"),
        ("mask_T", torch.ones(2, dtype=torch.int64), "must be bool"),
        ("keep_T", torch.ones(2), "must be bool"),
        ("sequence_T", torch.zeros(2), "sequence must be integer"),
        ("logp_T", torch.zeros(2, dtype=torch.bfloat16), "logp float32 or float64"),
    ],
)
def test_wrong_shapes_and_types_are_refused(name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**(small_batch([1.0, 1.0], [1.0, 1.0]) | {name: tensor}), objective=Objective())


def test_empty_and_two_dimensional_inputs_are_refused() -> None:
    batch = small_batch([1.0, 1.0], [1.0, 1.0])
    for change in (lambda x: x[:0], lambda x: x[None]):
        with pytest.raises(ValueError, match=r"one shape \[T\] with T >= 1"):
            policy_loss(**{name: change(x) for name, x in batch.items()}, objective=Objective())


def test_m2po_by_hand() -> None:
    # Squares 0.01, 0.04, 0.09, 0.25: the means of the smallest 1, 2, 3, 4 are 0.01, 0.025, 0.0467, 0.0975.
    proximal = torch.tensor([0.5, -0.1, 0.2, -0.3, 0.0], dtype=torch.float64)
    mask = torch.tensor([True, True, True, True, False])
    behaviour = torch.tensor([0.0, 0.0, 0.0, 0.0, torch.nan], dtype=torch.float64)
    kept = {tau: m2po_keep(behaviour, proximal, mask, tau).tolist() for tau in (0.009, 0.03, 0.05, 0.1)}
    assert kept == {
        0.009: [False, False, False, False, False],
        0.03: [False, True, True, False, False],
        0.05: [False, True, True, True, False],
        0.1: [True, True, True, True, False],
    }


def test_m2po_drops_ties_together_and_keeps_all_on_policy() -> None:
    behaviour, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    # Two of the three tied tokens would still meet the bound; which two would depend on their order.
    assert m2po_keep(behaviour, torch.tensor([0.0, 0.3, 0.3, 0.3]), mask, 0.061).tolist() == [True, False, False, False]
    assert m2po_keep(behaviour, behaviour, mask, 1e-9).all()
    # The mean must be below the threshold: 0.5 squared is not below 0.25.
    assert not m2po_keep(behaviour, behaviour + 0.5, mask, 0.25).any()
    with pytest.raises(ValueError, match="share one shape"):
        m2po_keep(behaviour, behaviour[:2], mask, 0.1)
