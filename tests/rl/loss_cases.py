"""Shared by the tests of the loss: the reference vectors as packed tensors, objectives by name, random batches,
and a slow scalar reference."""

import json
import math
from typing import Any

import numpy as np
import torch

from dapo_async.config.settings import Objective
from dapo_async.rl.loss import LossSums, policy_loss, token_weights
from tests import ROOT

VECTORS: dict[str, Any] = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text())
# As stated by the vectors themselves, in _meta.
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.float32: {"rtol": 2e-6, "atol": 1e-6}}

INPUT = VECTORS["policy_loss"]["input"]
ROLLOUT_LOGP = VECTORS["rollout_correction"]["input"]["rollout_logp"]

PROXIMAL: dict[str, Any] = {"ratio_against": "proximal"}
OBJECTIVES: dict[str, Objective] = {
    "dapo": Objective(),
    "grpo": Objective(clip_high=0.2, dual_clip=0.0, kl_coef=0.1, aggregation="seq-mean-token-mean"),
    "dr_grpo": Objective(advantage_std=False, aggregation="seq-mean-token-sum-norm", length_norm_tokens=16),
    "entropy": Objective(entropy_coef=0.01, kl_coef=0.02, aggregation="prompt-mean-token-mean"),
    "proximal": Objective(**PROXIMAL, aggregation="token-sum"),
    "decoupled": Objective(**PROXIMAL, correction="full"),
    "tis": Objective(**PROXIMAL, correction="truncate"),
    "icepop": Objective(**PROXIMAL, correction="mask", aggregation="seq-mean-token-sum"),
    "m2po": Objective(**PROXIMAL, correction="m2po"),
    "gspo": Objective(ratio="sequence", clip_low=0.05, clip_high=0.08, aggregation="seq-mean-token-mean"),
    "gspo_tis": Objective(**PROXIMAL, ratio="sequence", correction="truncate"),
    "cispo": Objective(surrogate="cispo"),
    "cispo_open_icepop": Objective(**PROXIMAL, surrogate="cispo", clip_low=1.0, clip_high=4.0, correction="mask"),
}

Batch = dict[str, torch.Tensor]


def packed(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).flatten()


def vector_batch(dtype: torch.dtype = torch.float64, logp: list[list[float]] | None = None) -> Batch:
    """The six sequences of the vectors, row after row, their padding left in as masked tokens full of garbage.

    ``logp``: ``new_logp`` unless given. Behaviour and proximal are both ``old_logp``.
    """
    rows, width = np.shape(INPUT["mask"])
    return {
        "logp_T": packed(logp or INPUT["new_logp"], dtype).requires_grad_(),
        "behaviour_T": packed(INPUT["old_logp"], dtype),
        "proximal_T": packed(INPUT["old_logp"], dtype),
        "advantage_T": torch.tensor(INPUT["advantage_per_seq_verl"], dtype=dtype).repeat_interleave(width),
        "mask_T": packed(INPUT["mask"]).bool(),
        "sequence_T": torch.arange(rows).repeat_interleave(width),
    }


def rollout_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """As ``vector_batch``, with the sampler's log-probs as behaviour and ``old_logp`` as proximal."""
    return vector_batch(dtype) | {"behaviour_T": packed(ROLLOUT_LOGP, dtype)}


def vector_weights(aggregation: str, length_norm_tokens: int = 8, lengths: list[int] | None = None) -> torch.Tensor:
    """Weights [T] of the padded vectors. H of the vectors is the padded width, 8, unless they say otherwise."""
    weights = token_weights(
        lengths or INPUT["lengths"], INPUT["groups"], aggregation=aggregation, length_norm_tokens=length_norm_tokens
    )
    return torch.from_numpy(weights).repeat_interleave(len(INPUT["mask"][0]))


def run(batch: Batch, objective: Objective) -> tuple[float, torch.Tensor, LossSums]:
    """Loss, its gradient with respect to the log-probs, and the sums."""
    leaf = batch["logp_T"].detach().clone().requires_grad_()
    loss, sums = policy_loss(**(batch | {"logp_T": leaf}), objective=objective)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad, sums


def random_batch(seed: int, objective: Objective, num_groups: int = 3, group_size: int = 3) -> Batch:
    """A packed batch of random lengths with some sequences and some tokens masked; all of ``policy_loss``'s inputs."""
    rng = np.random.default_rng(seed)
    num_sequences = num_groups * group_size
    lengths = rng.integers(1, 8, num_sequences)
    total = int(lengths.sum())
    sequence = np.repeat(np.arange(num_sequences), lengths)
    mask = (rng.random(total) < 0.9) & (rng.random(num_sequences) < 0.85)[sequence]
    mask[0] = True
    weights = token_weights(
        np.bincount(sequence, weights=mask, minlength=num_sequences),
        np.arange(num_sequences) // group_size,
        aggregation=objective.aggregation,
        length_norm_tokens=objective.length_norm_tokens,
    )
    behaviour = -rng.exponential(1.0, total)
    columns = {
        "behaviour_T": behaviour,
        "proximal_T": behaviour + rng.normal(0, 0.5, total),
        "logp_T": behaviour + rng.normal(0, 0.6, total) + 2.5 * (rng.random(total) < 0.1),
        "reference_T": behaviour + rng.normal(0, 0.7, total),
        "entropy_T": rng.exponential(1.0, total),
        "advantage_T": rng.normal(0, 1, num_sequences)[sequence],
        "weight_T": weights[sequence],
    }
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    kept = torch.from_numpy(rng.random(total) < 0.8)
    return batch | {"mask_T": torch.from_numpy(mask), "sequence_T": torch.from_numpy(sequence), "keep_T": kept}


def reference_loss(batch: Batch, objective: Objective) -> tuple[float, list[float], dict[str, float]]:
    """Loss, gradient and metrics of ``policy_loss``, token by token in Python floats, with derivatives by hand."""
    x = {name: tensor.tolist() for name, tensor in batch.items()}
    tokens = [t for t, unmasked in enumerate(x["mask_T"]) if unmasked]
    gradient = [0.0] * len(x["mask_T"])
    base = x["proximal_T"] if objective.ratio_against == "proximal" else x["behaviour_T"]
    loss, found = 0.0, {name: 0.0 for name in ("low", "high", "dual", "masked", "ratio", "correction")}
    for t in tokens:
        same = [s for s in tokens if objective.ratio == "token" and s == t]
        same = same or [s for s in tokens if x["sequence_T"][s] == x["sequence_T"][t]]
        ratio = math.exp(sum(x["logp_T"][s] - base[s] for s in same) / len(same))
        advantage, low, high = x["advantage_T"][t], 1 - objective.clip_low, 1 + objective.clip_high
        correction = _reference_correction(
            math.exp(x["proximal_T"][t] - x["behaviour_T"][t]), x["keep_T"][t], objective
        )
        scale = x["weight_T"][t] * correction
        found["ratio"] += ratio
        found["correction"] += correction
        found["masked"] += correction == 0
        if objective.surrogate == "cispo":
            bounded = min(max(ratio, low), high)
            loss -= scale * bounded * advantage * x["logp_T"][t]
            gradient[t] -= scale * bounded * advantage
            found["low"] += ratio < low
            found["high"] += ratio > high
        else:
            gain = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            capped = advantage < 0 and objective.dual_clip > 0 and gain < objective.dual_clip * advantage
            gain = objective.dual_clip * advantage if capped else gain
            loss -= scale * gain
            found["low"] += advantage < 0 and ratio < low
            found["high"] += advantage > 0 and ratio > high
            found["dual"] += capped
            if gain == ratio * advantage:
                for s in same:
                    gradient[s] -= scale * ratio * advantage / len(same)
        if objective.kl_coef:
            d = x["reference_T"][t] - x["logp_T"][t]
            loss += x["weight_T"][t] * objective.kl_coef * min(math.exp(d) - d - 1, 10.0)
            gradient[t] += x["weight_T"][t] * objective.kl_coef * (1 - math.exp(d)) * (math.exp(d) - d - 1 <= 10.0)
        loss -= x["weight_T"][t] * objective.entropy_coef * x["entropy_T"][t]
    return loss, gradient, {name: value / len(tokens) for name, value in found.items()}


def _reference_correction(weight: float, keep: bool, objective: Objective) -> float:
    return {
        "none": 1.0,
        "full": weight,
        "truncate": min(weight, objective.correction_cap),
        "mask": weight if objective.correction_floor <= weight <= objective.correction_cap else 0.0,
        "m2po": float(keep),
    }[objective.correction]
