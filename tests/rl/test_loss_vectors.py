"""The loss against the reference vectors, values and gradients, in both precisions."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dapo_async.config.settings import Objective
from dapo_async.rl.advantages import group_advantages
from dapo_async.rl.loss import m2po_keep
from tests.rl.loss_cases import (
    INPUT,
    PROXIMAL,
    ROLLOUT_LOGP,
    TOLERANCE,
    VECTORS,
    packed,
    rollout_batch,
    run,
    vector_batch,
    vector_weights,
)

EXPECTED = VECTORS["policy_loss"]["output"]
CORRECTION = VECTORS["rollout_correction"]["output"]
OTHER = VECTORS["other_objectives"]["output"]
MASK = packed(INPUT["mask"]).bool()
AGGREGATIONS = list(EXPECTED["dapo_0.2_0.28_c10"]["grad_logp"])
DTYPES = [torch.float64, torch.float32]


def clip_objective(name: str) -> Objective:
    config = EXPECTED[name]
    return Objective(clip_low=config["eps_low"], clip_high=config["eps_high"], dual_clip=config["clip_ratio_c"] or 0.0)


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **TOLERANCE[dtype])


def weighted(batch: dict[str, torch.Tensor], aggregation: str = "token-mean") -> dict[str, torch.Tensor]:
    return batch | {"weight_T": vector_weights(aggregation)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("config", EXPECTED)
def test_loss_and_gradient_of_every_clip_config_and_aggregation(
    config: str, aggregation: str, dtype: torch.dtype
) -> None:
    loss, gradient, _ = run(weighted(vector_batch(dtype), aggregation), clip_objective(config))
    assert gradient.dtype == dtype
    close(loss, EXPECTED[config]["loss"][aggregation], dtype)
    close(gradient, packed(EXPECTED[config]["grad_logp"][aggregation]), dtype)


@pytest.mark.parametrize("config", EXPECTED)
def test_sequence_norm_with_a_constant_length(config: str) -> None:
    batch = vector_batch() | {"weight_T": vector_weights("seq-mean-token-sum-norm", length_norm_tokens=20480)}
    loss, _, _ = run(batch, clip_objective(config))
    close(loss, EXPECTED[config]["loss"]["seq-mean-token-sum-norm(scale=20480)"])


@pytest.mark.parametrize("config", EXPECTED)
def test_token_losses_one_microbatch_per_token(config: str) -> None:
    batch = weighted(vector_batch(), "token-sum")
    losses, gradients = [], []
    for t in range(len(MASK)):
        loss, gradient, _ = run({name: x[t : t + 1] for name, x in batch.items()}, clip_objective(config))
        losses.append(loss)
        gradients.append(gradient.item())
    close(losses, packed(EXPECTED[config]["token_loss"]))
    close(gradients, packed(EXPECTED[config]["token_dloss_dlogp_unaggregated"]))


@pytest.mark.parametrize("config", EXPECTED)
def test_clip_shares_and_kl(config: str) -> None:
    means = run(weighted(vector_batch()), clip_objective(config))[2].means()
    close(means["clip_low"], EXPECTED[config]["trl_clip_low_mean"])
    close(means["clip_high"], EXPECTED[config]["trl_clip_high_mean"])
    close(means["clip_low"] + means["clip_high"], EXPECTED[config]["pg_clipfrac"])
    close(means["clip_dual"], EXPECTED[config]["pg_clipfrac_lower"])
    close(means["kl_behaviour_k1"], EXPECTED[config]["ppo_kl_k1"])


def test_advantages_of_the_vectors_are_ours() -> None:
    rewards, groups = np.array(INPUT["rewards"]), np.array(INPUT["groups"])
    ours = np.concatenate([group_advantages(rewards[groups == g], divide_by_std=True) for g in (0, 1)])
    close(ours, INPUT["advantage_per_seq_verl"])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_overlong_filter_masks_a_whole_sequence(aggregation: str) -> None:
    """The masked sequence leaves the token counts and stays in the count of sequences (verl's engine)."""
    vector = VECTORS["policy_loss_overlong_filtered_seq1"]
    mask = packed(vector["input"]["mask"]).bool()
    lengths = [sum(map(int, row)) for row in vector["input"]["mask"]]
    batch = vector_batch() | {"mask_T": mask, "weight_T": vector_weights(aggregation, lengths=lengths)}
    loss, gradient, _ = run(batch, Objective())
    engine = vector["output"]["verl_engine_fixed_global_batch_size_6"]
    close(loss, engine.get(aggregation, vector["output"]["excluded_from_denominator"][aggregation]))
    assert torch.all(gradient[~mask] == 0)


def test_microbatches_and_ranks_add_up_to_the_global_token_mean() -> None:
    vector = VECTORS["microbatch_dp"]
    ranks = vector["input"]["split_rank_to_microbatches"]
    batch = weighted(vector_batch())
    parts = []
    for rank in ranks:
        chosen = [torch.isin(batch["sequence_T"], torch.tensor(sequences)) for sequences in rank]
        losses = [run({name: x[rows] for name, x in batch.items()}, Objective())[0] for rows in chosen]
        # The reducer averages over ranks, so each rank's loss is multiplied by their number.
        parts.append([len(ranks) * loss for loss in losses])
    close(parts, vector["output"]["verl_engine_fixed_parts"])
    close(np.mean([sum(part) for part in parts]), vector["output"]["correct_global_token_mean"])


@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        ("token_tis_2", {"correction": "truncate", "correction_cap": 2.0}),
        ("token_icepop_0.5_5", {"correction": "mask", "correction_floor": 0.5, "correction_cap": 5.0}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_correction_weights_and_loss(weights: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    objective = Objective(**PROXIMAL, **settings)
    loss, _, sums = run(weighted(rollout_batch(dtype)), objective)
    close(loss, CORRECTION["loss_token_mean"][f"decoupled_ppo * {weights}"], dtype)
    expected = packed(CORRECTION["weights"][weights])
    close(sums.correction, expected.sum(), dtype)
    close(sums.masked, (expected[MASK] == 0).sum(), dtype)
    # At logp = proximal and advantage 1 the gradient of a token is minus its correction weight.
    batch = rollout_batch(dtype)
    batch |= {"logp_T": batch["proximal_T"], "advantage_T": torch.ones_like(batch["advantage_T"])}
    _, gradient, _ = run(weighted(batch, "token-sum"), objective)
    close(-gradient, expected, dtype)


def test_areal_decoupled_ppo() -> None:
    expected = VECTORS["areal_decoupled_ppo"]["output"]
    areal = {**PROXIMAL, "dual_clip": 0.0, "correction_cap": 5.0, "correction_floor": 0.0}
    for correction, name in [
        ("full", "uncapped"), ("truncate", "token_clamp_mode"), ("mask", "token_mask_mode(loss/original token count)"),
    ]:  # fmt: skip
        loss, _, _ = run(weighted(rollout_batch()), Objective(**areal, correction=correction))
        close(loss, expected[name])


def test_ppo_against_behaviour() -> None:
    loss, _, sums = run(weighted(rollout_batch()), Objective())
    close(loss, CORRECTION["bypass_ppo_clip"]["loss_token_mean"])
    means = sums.means()
    close(means["clip_low"] + means["clip_high"], CORRECTION["bypass_ppo_clip"]["pg_clipfrac"])


def test_reinforce_with_truncated_ratio_is_cispo_without_lower_bound() -> None:
    objective = Objective(surrogate="cispo", clip_low=1.0, clip_high=1.0)
    loss, gradient, _ = run(weighted(rollout_batch()), objective)
    close(loss, CORRECTION["bypass_reinforce_token_tis_2"]["loss_token_mean"])
    close(gradient, packed(CORRECTION["bypass_reinforce_token_tis_2"]["grad_logp"]))


def test_behaviour_metrics() -> None:
    batch = weighted(rollout_batch())
    means = run(batch | {"logp_T": batch["proximal_T"]}, Objective())[2].means()
    close(means["kl_behaviour_k1"], CORRECTION["metrics"]["kl_k1"])
    close(means["kl_behaviour_k3"], CORRECTION["metrics"]["k3"])
    # The vector's weights are truncated at 2; ours are not, so the log-ratio is truncated before.
    behaviour = packed(ROLLOUT_LOGP)
    truncated = behaviour + (batch["proximal_T"] - behaviour).clamp(max=math.log(2.0))
    sums = run(batch | {"logp_T": truncated}, Objective())[2]
    # verl adds 1e-8 to the mean weight before it divides by it.
    bias = (1 + 1e-8 * sums.num_tokens / sums.weight) ** 2
    close(sums.means()["ess_share"] * bias, CORRECTION["metrics"]["ess_token_tis2"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gspo(dtype: torch.dtype) -> None:
    expected = OTHER["gspo_3e-4_4e-4_seq-mean-token-mean"]
    objective = Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    loss, gradient, sums = run(weighted(vector_batch(dtype), "seq-mean-token-mean"), objective)
    close(loss, expected["loss"], dtype)
    close(gradient, packed(expected["grad_logp"]), dtype)
    close(sums.ratio, np.dot(expected["seq_ratio"], INPUT["lengths"]), dtype)
    close(sums.ratio_max, max(expected["seq_ratio"]), dtype)
    close(sums.means()["clip_low"] + sums.means()["clip_high"], expected["clipfrac_tokens"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "clip_low", "clip_high"),
    [("cispo_verl_two_sided_0.8_1.28_token-mean", 0.2, 0.28), ("cispo_trl_scalerl_max5_token-mean", 1.0, 4.0)],
)
def test_cispo(name: str, clip_low: float, clip_high: float, dtype: torch.dtype) -> None:
    objective = Objective(surrogate="cispo", clip_low=clip_low, clip_high=clip_high)
    loss, gradient, _ = run(weighted(vector_batch(dtype)), objective)
    close(loss, OTHER[name]["loss"], dtype)
    close(gradient, packed(OTHER[name]["grad_logp"]), dtype)


def test_m2po_mask_and_loss() -> None:
    batch = weighted(rollout_batch())
    batch["keep_T"] = m2po_keep(batch["behaviour_T"], batch["proximal_T"], batch["mask_T"], 0.04)
    expected = packed(OTHER["m2po_mask_tau0.04(areal: behave vs prox)"]).bool()
    assert torch.equal(batch["keep_T"], expected)
    loss, gradient, sums = run(batch, Objective(**PROXIMAL, correction="m2po", dual_clip=0.0))
    close(loss, OTHER["m2po_loss_token-mean_original_den"])
    assert torch.all(gradient[~expected] == 0)
    assert sums.masked == (MASK & ~expected).sum()


def test_kl_to_the_reference_model() -> None:
    vector = OTHER["kl_to_reference"]
    batch = weighted(vector_batch()) | {"reference_T": packed(vector["ref_logp"])}
    without, _, _ = run(batch, Objective())
    loss, _, sums = run(batch, Objective(kl_coef=0.5))
    close(sums.means()["kl_reference"], vector["token_mean"]["k3"])
    close(loss - without, 0.5 * vector["token_mean"]["k3"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_ratio_is_bounded(dtype: torch.dtype) -> None:
    vector = VECTORS["log_ratio_clamp"]
    log_ratio, advantage = packed(vector["input"]["log_ratio"], dtype), packed(vector["input"]["adv"], dtype)
    for t, (ratio, expected, slope) in enumerate(
        zip(*(vector["output"][name][0] for name in ("ratio", "loss", "grad")), strict=True)
    ):
        batch = {
            "logp_T": log_ratio[t : t + 1],
            "behaviour_T": torch.zeros(1, dtype=dtype),
            "advantage_T": advantage[t : t + 1],
            "weight_T": torch.ones(1),
            "mask_T": torch.ones(1, dtype=torch.bool),
            "sequence_T": torch.zeros(1, dtype=torch.int64),
        }
        loss, gradient, sums = run(batch, Objective())
        close(loss, expected, dtype)
        close(gradient, [slope], dtype)
        close(sums.ratio, ratio, dtype)
