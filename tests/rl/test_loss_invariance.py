"""What must not change loss and gradient: the split, masked cells, order; and what must vanish."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.config.settings import Objective
from dapo_async.rl.advantages import group_advantages
from dapo_async.rl.loss import LossSums, token_weights
from dapo_async.rl.rewards import group_rewards
from tests.rl.loss_cases import OBJECTIVES, Batch, random_batch, run

EXACT = {"rtol": 1e-12, "atol": 1e-13}
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30, -3.0]
names = st.sampled_from(list(OBJECTIVES))
deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def rows_of(batch: Batch, rows: torch.Tensor) -> Batch:
    return {name: x[rows] for name, x in batch.items()}


def assert_same_sums(found: LossSums, expected: LossSums) -> None:
    np.testing.assert_allclose(torch.stack(list(found)), torch.stack(list(expected)), rtol=1e-12, atol=1e-13)


@deterministic
@given(name=names, seed=st.integers(0, 10**6), parts=st.lists(st.integers(0, 4), min_size=9, max_size=9))
def test_any_split_into_microbatches_adds_up(name: str, seed: int, parts: list[int]) -> None:
    """``parts`` puts each of the 9 sequences into one of 5 microbatches, whichever rank they run on."""
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    loss, gradient, sums = run(batch, objective)
    part_of_T = torch.tensor(parts)[batch["sequence_T"]]
    total, gathered, merged = 0.0, torch.zeros_like(gradient), None
    for part in sorted(set(parts)):
        rows = part_of_T == part
        part_loss, gathered[rows], part_sums = run(rows_of(batch, rows), objective)
        total += part_loss
        merged = part_sums if merged is None else merged.merge(part_sums)
    np.testing.assert_allclose(total, loss, **EXACT)
    np.testing.assert_allclose(gathered, gradient, **EXACT)
    assert merged is not None
    assert_same_sums(merged, sums)


@deterministic
@given(name=names, seed=st.integers(0, 10**6))
def test_masked_cells_may_hold_anything(name: str, seed: int) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    loss, gradient, sums = run(batch, objective)
    masked = ~batch["mask_T"]
    rng = np.random.default_rng(seed)
    spoiled = {}
    for key, x in batch.items():
        spoiled[key] = x.clone()
        if x.is_floating_point():
            spoiled[key][masked] = torch.from_numpy(rng.choice(GARBAGE, int(masked.sum())))
    spoiled["sequence_T"][masked] = torch.from_numpy(rng.choice([-1, 10**12, 3], int(masked.sum())))
    spoiled["keep_T"][masked] ^= True
    spoiled_loss, spoiled_gradient, spoiled_sums = run(spoiled, objective)
    assert spoiled_loss == loss
    assert torch.equal(spoiled_gradient, gradient)
    assert torch.all(gradient[masked] == 0)
    assert_same_sums(spoiled_sums, sums)
    # And leaving them out altogether is the same as masking them: packing needs no padding.
    packed_loss, packed_gradient, packed_sums = run(rows_of(batch, ~masked), objective)
    np.testing.assert_allclose(packed_loss, loss, **EXACT)
    np.testing.assert_allclose(packed_gradient, gradient[~masked], **EXACT)
    assert_same_sums(packed_sums, sums)


@deterministic
@given(name=names, seed=st.integers(0, 10**6), order=st.permutations(range(9)))
def test_order_of_sequences_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    loss, gradient, sums = run(batch, objective)
    rows = torch.cat([torch.nonzero(batch["sequence_T"] == sequence)[:, 0] for sequence in order])
    permuted_loss, permuted_gradient, permuted_sums = run(rows_of(batch, rows), objective)
    np.testing.assert_allclose(permuted_loss, loss, **EXACT)
    np.testing.assert_allclose(permuted_gradient, gradient[rows], **EXACT)
    assert_same_sums(permuted_sums, sums)


@deterministic
@given(
    lengths=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(any),
    order=st.permutations(range(6)),
    labels=st.permutations(range(3)),
    aggregation=st.sampled_from(sorted({objective.aggregation for objective in OBJECTIVES.values()})),
)
def test_order_and_names_of_groups_do_not_matter(
    lengths: list[int], order: list[int], labels: list[int], aggregation: str
) -> None:
    groups = [0, 0, 1, 1, 1, 2]
    weights = token_weights(lengths, groups, aggregation=aggregation, length_norm_tokens=16)
    permuted = token_weights(
        [lengths[i] for i in order], [labels[groups[i]] for i in order], aggregation=aggregation, length_norm_tokens=16
    )
    np.testing.assert_allclose(permuted, weights[order], **EXACT)


@pytest.mark.parametrize("name", [name for name, x in OBJECTIVES.items() if not x.kl_coef])
@pytest.mark.parametrize("correct", [True, False])
def test_a_group_of_equal_rewards_has_exactly_zero_gradient(name: str, correct: bool) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(3, objective)
    rewards = group_rewards([correct] * 3, [19] * 3, max_tokens=20, overlong_cache_tokens=3, overlong_penalty=0.7)
    first = batch["sequence_T"] < 3
    advantages = torch.from_numpy(group_advantages(rewards, divide_by_std=objective.advantage_std))
    batch["advantage_T"][first] = advantages[batch["sequence_T"][first]]
    _, gradient, _ = run(batch, objective)
    assert torch.all(gradient[first] == 0)
    assert torch.any(gradient[~first] != 0)


@deterministic
@given(name=st.sampled_from(["icepop", "cispo_open_icepop", "m2po"]), seed=st.integers(0, 10**6))
def test_tokens_dropped_by_a_correction_keep_the_denominator(name: str, seed: int) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    weight = (batch["proximal_T"] - batch["behaviour_T"]).exp()
    dropped = (weight < objective.correction_floor) | (weight > objective.correction_cap)
    dropped = ~batch["keep_T"] if name == "m2po" else dropped
    loss, gradient, _ = run(batch, objective)
    assert torch.all(gradient[dropped] == 0)
    # Masking them by hand, weights unchanged, leaves the same sum over the rest.
    rest_loss, rest_gradient, _ = run(batch | {"mask_T": batch["mask_T"] & ~dropped}, objective)
    np.testing.assert_allclose(loss, rest_loss, **EXACT)
    np.testing.assert_allclose(gradient, rest_gradient, **EXACT)


@deterministic
@given(name=st.sampled_from([n for n, x in OBJECTIVES.items() if not x.kl_coef]), seed=st.integers(0, 10**6))
def test_on_policy_every_objective_is_reinforce(name: str, seed: int) -> None:
    objective = OBJECTIVES[name]
    batch = random_batch(seed, objective)
    batch |= {"logp_T": batch["behaviour_T"], "proximal_T": batch["behaviour_T"]}
    batch["keep_T"] = torch.ones_like(batch["mask_T"])
    if objective.ratio == "sequence":
        # A sequence spreads its gradient evenly, so the identity needs one weight per sequence, as in practice.
        assert objective.aggregation in ("token-mean", "seq-mean-token-mean")
    _, gradient, sums = run(batch, objective)
    reinforce = torch.where(batch["mask_T"], -batch["advantage_T"] * batch["weight_T"], 0.0)
    np.testing.assert_allclose(gradient, reinforce, **EXACT)
    means = sums.means()
    ones = [means[key] for key in ("ratio_mean", "ratio_max", "correction_mean", "ess_share")]
    np.testing.assert_allclose(ones, 1.0, rtol=1e-12)
    zeros = [means[key] for key in ("clip_low", "clip_high", "clip_dual", "masked_share", "kl_behaviour_k1")]
    assert zeros == [0.0] * 5


def test_scaling_the_advantage_scales_the_loss() -> None:
    objective = Objective()
    batch = random_batch(11, objective)
    loss, gradient, _ = run(batch, objective)
    doubled_loss, doubled_gradient, _ = run(batch | {"advantage_T": 2 * batch["advantage_T"]}, objective)
    np.testing.assert_allclose(doubled_loss, 2 * loss, **EXACT)
    np.testing.assert_allclose(doubled_gradient, 2 * gradient, **EXACT)
