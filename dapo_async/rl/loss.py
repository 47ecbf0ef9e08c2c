"""The policy loss over packed completion tokens: pure functions of tensors, no state.

Owns clipping, off-policy corrections, the KL penalty, the weights that make microbatch losses add up, and the
sums the metrics are made of. Does not own advantages (``advantages``), log-probs (``logprobs``) nor the split
into microbatches (``batching``).

Dimension key: T = completion tokens of one microbatch, packed; S = sequences (completions) of one optimizer
step, over all microbatches and ranks. Log-probs are in nats, of logits / temperature.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dapo_async.config.settings import Objective
from dapo_async.rl.ratios import bounded_exp, k3, sequence_mean

# Bound on the k3 estimate of one token, as in verl: one outlier must not outweigh the whole batch.
MAX_K3 = 10.0


class LossSums(NamedTuple):
    """Detached float64 scalars over unmasked tokens: ``merge`` adds microbatches up, ``means`` divides.

    Across ranks, reduce ``ratio_max`` with max and every other field with sum. ``entropy`` and
    ``kl_reference`` are NaN if the pass was not given what they need.
    """

    num_tokens: Tensor
    ratio: Tensor  # the ratio that is clipped: per token or per sequence, against behaviour or proximal
    ratio_max: Tensor
    clip_low: Tensor  # tokens whose gradient the lower bound stops; CISPO: whose weight it raises
    clip_high: Tensor
    clip_dual: Tensor
    correction: Tensor  # weight proximal / behaviour after its bounds; 1 without correction
    masked: Tensor  # tokens whose correction is 0
    kl_k1: Tensor  # KL(behaviour || policy), estimators k1 and k3
    kl_k3: Tensor
    weight: Tensor  # policy / behaviour per token, for the effective sample size
    weight_squared: Tensor
    entropy: Tensor
    kl_reference: Tensor

    def merge(self, other: "LossSums") -> "LossSums":
        """The sums over the tokens of both."""
        added = LossSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
        return added._replace(ratio_max=torch.maximum(self.ratio_max, other.ratio_max))

    def means(self) -> dict[str, float]:
        """Plain numbers per unmasked token, named as the policy/ metrics; empty if all tokens are masked.

        ``ess_share`` is the effective sample size over n, (sum w)^2 / (n sum w^2). Waits for the device once.
        """
        total = LossSums(*torch.stack(list(self)).cpu())
        n = float(total.num_tokens)
        if n == 0:
            return {}
        sums = {
            "ratio_mean": total.ratio,
            "clip_low": total.clip_low,
            "clip_high": total.clip_high,
            "clip_dual": total.clip_dual,
            "correction_mean": total.correction,
            "masked_share": total.masked,
            "kl_behaviour_k1": total.kl_k1,
            "kl_behaviour_k3": total.kl_k3,
            "ess_share": total.weight**2 / total.weight_squared,
            "entropy": total.entropy,
            "kl_reference": total.kl_reference,
        }
        means = {name: float(value) / n for name, value in sums.items()} | {"ratio_max": float(total.ratio_max)}
        return {name: x for name, x in means.items() if name not in ("entropy", "kl_reference") or not math.isnan(x)}


def token_weights(
    lengths_S: ArrayLike, groups_S: ArrayLike, *, aggregation: str, length_norm_tokens: int = 0
) -> NDArray[np.float64]:
    """Weight that each unmasked token of a sequence carries in the loss of one optimizer step; float64 [S].

    ``lengths_S`` are numbers of unmasked tokens and ``groups_S`` says which sequences answer the same prompt;
    both list every sequence of the step, over all microbatches and ranks. The loss of the step is then the
    plain sum of weight x token loss, however it is split. With N unmasked tokens, P prompts and
    H = ``length_norm_tokens``:

        token-mean              1 / N        token-sum                1
        seq-mean-token-mean     1 / (S n_s)  seq-mean-token-sum       1 / S
        seq-mean-token-sum-norm 1 / (S H)    prompt-mean-token-mean   1 / (P n_group)

    A fully masked sequence (overlong filter) has weight 0 and still counts in S and P, as in verl's engine: the
    step does not grow when others are masked. Where ranks average gradients, multiply by the number of ranks.
    Raises ``ValueError`` for unequal shapes, no sequence, a negative length, a missing H or an unknown name.
    Sources: DAPO, arXiv:2503.14476, Eq. 8; GRPO, arXiv:2402.03300, Eq. 3; Dr. GRPO, arXiv:2503.20783, section 3.
    """
    lengths = np.asarray(lengths_S, dtype=np.float64)
    if lengths.ndim != 1 or lengths.size == 0 or not (lengths >= 0).all():
        raise ValueError(f"lengths must be a non-empty list of counts, got {lengths.tolist()}")
    _, group_of_S = np.unique(np.asarray(groups_S), return_inverse=True)
    if group_of_S.shape != lengths.shape:
        raise ValueError(f"got {lengths.size} lengths for groups of shape {group_of_S.shape}")
    if aggregation == "seq-mean-token-sum-norm" and length_norm_tokens < 1:
        raise ValueError(f"seq-mean-token-sum-norm needs length_norm_tokens >= 1, got {length_norm_tokens}")
    group_tokens = np.bincount(group_of_S, weights=lengths)
    divisors = {
        "token-mean": lengths.sum(),
        "token-sum": 1.0,
        "seq-mean-token-mean": lengths.size * lengths,
        "seq-mean-token-sum": lengths.size,
        "seq-mean-token-sum-norm": lengths.size * length_norm_tokens,
        "prompt-mean-token-mean": group_tokens.size * group_tokens[group_of_S],
    }
    if aggregation not in divisors:
        raise ValueError(f"aggregation must be one of {', '.join(divisors)}, got {aggregation}")
    return np.divide(1.0, divisors[aggregation], out=np.zeros_like(lengths), where=lengths > 0)


def policy_loss(
    *,
    logp_T: Tensor,
    behaviour_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    objective: Objective,
    proximal_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    reference_T: Tensor | None = None,
    entropy_T: Tensor | None = None,
) -> tuple[Tensor, LossSums]:
    """Loss of one microbatch (its share of the optimizer step's loss) and the sums for the metrics.

        sum_t weight_t * (correction_t * surrogate_t + kl_coef * k3_t - entropy_coef * entropy_t)

    All tensors are [T]. ``logp_T`` carries the gradient (and ``entropy_T``, if entropy_coef > 0); the rest is data.
    ``logp_T`` is float32 or float64 and the loss has its type. ``weight_T`` is from ``token_weights``; tokens that
    the correction sets to zero keep theirs, so the denominator does not shrink. ``sequence_T`` (integers) tells
    sequences apart; with ``objective.ratio`` "sequence" each must lie wholly in one microbatch. ``keep_T`` (bool)
    is from ``m2po_keep``. Where ``mask_T`` (bool) is false the others may hold anything, NaN included.

    Raises ``ValueError`` if shapes or types are wrong or the objective needs a tensor that is missing.
    Sources, with the formulas at their place: DAPO, arXiv:2503.14476, Eq. 8 to 10; decoupled PPO,
    arXiv:2110.00641, section 3; KL penalty k3: GRPO, arXiv:2402.03300, Eq. 4.
    """
    data = {"behaviour": behaviour_T, "advantage": advantage_T, "weight": weight_T, "sequence": sequence_T}
    optional = {"proximal": proximal_T, "keep": keep_T, "reference": reference_T, "entropy": entropy_T}
    _check_inputs(objective, {"logp": logp_T, "mask": mask_T} | data, optional)

    def unmasked(x_T: Tensor) -> Tensor:
        # Before any arithmetic, not after it: NaN * 0 is NaN, in the gradient too.
        return torch.where(mask_T, x_T.to(logp_T.dtype), 0.0)

    logp, behaviour = unmasked(logp_T), unmasked(behaviour_T.detach())
    advantage, weight = unmasked(advantage_T.detach()), unmasked(weight_T.detach())
    proximal = behaviour if proximal_T is None else unmasked(proximal_T.detach())

    log_ratio = logp - (proximal if objective.ratio_against == "proximal" else behaviour)
    if objective.ratio == "sequence":
        log_ratio = sequence_mean(log_ratio, mask_T, sequence_T)
    ratio = bounded_exp(log_ratio)
    surrogate, clipped = _surrogate(ratio, logp, advantage, objective)
    correction = _correction(bounded_exp(proximal - behaviour), keep_T, objective)
    token_loss = correction * surrogate

    penalty = None if reference_T is None else k3(unmasked(reference_T.detach()) - logp).clamp(-MAX_K3, MAX_K3)
    if penalty is not None and objective.kl_coef > 0:
        token_loss = token_loss + objective.kl_coef * penalty
    entropy = None if entropy_T is None else unmasked(entropy_T)
    if entropy is not None and objective.entropy_coef > 0:
        token_loss = token_loss - objective.entropy_coef * entropy

    sums = _loss_sums(mask_T, ratio, clipped, correction, logp - behaviour, entropy, penalty)
    return (weight * token_loss).sum(), sums


def m2po_keep(behaviour_T: Tensor, proximal_T: Tensor, mask_T: Tensor, threshold: float) -> Tensor:
    """Tokens that M2PO keeps; bool [T], false where ``mask_T`` is.

    Drops the tokens with the largest squared log-ratio of proximal to behaviour until the mean square of the
    rest is below ``threshold``. T spans the whole batch here, since the mean is the batch's. Tokens that tie
    with a dropped one are dropped too, so that the result does not depend on their order. Raises
    ``ValueError`` if the shapes differ. Source: M2PO, arXiv:2510.01161.
    """
    if not behaviour_T.shape == proximal_T.shape == mask_T.shape:
        shapes = [tuple(tensor.shape) for tensor in (behaviour_T, proximal_T, mask_T)]
        raise ValueError(f"behaviour, proximal and mask must share one shape, got {shapes}")
    # Masked cells become infinitely large, so that they are sorted to the end and dropped.
    square_T = torch.where(mask_T, (proximal_T.double() - behaviour_T.double()).detach().square(), torch.inf)
    ascending = square_T.sort().values
    running_mean = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
    dropped = ascending[~(running_mean < threshold)]
    return mask_T & (square_T < dropped[0]) if len(dropped) else mask_T.clone()


def _check_inputs(objective: Objective, required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless everything the objective needs is there, one-dimensional and of one length."""
    needed = {
        "proximal": objective.ratio_against == "proximal",
        "keep": objective.correction == "m2po",
        "reference": objective.kl_coef > 0,
        "entropy": objective.entropy_coef > 0,
    }
    missing = [name for name, tensor in optional.items() if needed[name] and tensor is None]
    if missing:
        raise ValueError(f"this objective needs {' and '.join(missing)}, which was not given")
    given = required | {name: tensor for name, tensor in optional.items() if tensor is not None}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if given["mask"].dim() != 1 or given["mask"].numel() == 0 or len(set(shapes.values())) != 1:
        raise ValueError(f"all inputs must share one shape [T] with T >= 1, got {shapes}")
    types = {name: tensor.dtype for name, tensor in given.items()}
    if types["mask"] != torch.bool or types.get("keep", torch.bool) != torch.bool:
        raise ValueError(f"mask and keep must be bool, got {types}")
    if given["sequence"].is_floating_point() or types["logp"] not in (torch.float32, torch.float64):
        raise ValueError(f"sequence must be integer and logp float32 or float64, got {types}")


def _surrogate(
    ratio_T: Tensor, logp_T: Tensor, advantage_T: Tensor, objective: Objective
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Token losses, and which tokens are clipped below, above and by the dual clip.

    PPO's -min(r A, clip(r) A) bounds r above by 1 + clip_high if A > 0 and below by 1 - clip_low if A < 0; the
    dual clip (arXiv:1912.09729, Eq. 5) bounds it above by c if A < 0. Written as bounds on r, the three are one
    clamp. CISPO (arXiv:2506.13585, Eq. 4) bounds a detached r on both sides whatever the sign of A; its lower
    bound goes away with clip_low = 1.
    """
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    if objective.surrogate == "cispo":
        loss_T = -ratio_T.detach().clamp(low, high) * advantage_T * logp_T
        return loss_T, (ratio_T < low, ratio_T > high, torch.zeros_like(ratio_T, dtype=torch.bool))
    cap = objective.dual_clip or math.inf
    worse_T, better_T = advantage_T < 0, advantage_T > 0
    low_T = torch.zeros_like(ratio_T).masked_fill(worse_T, low)
    high_T = torch.full_like(ratio_T, high).masked_fill(worse_T, cap)
    loss_T = -ratio_T.clamp(low_T, high_T) * advantage_T
    return loss_T, (worse_T & (ratio_T < low), better_T & (ratio_T > high), worse_T & (ratio_T > cap))


def _correction(weight_T: Tensor, keep_T: Tensor | None, objective: Objective) -> Tensor:
    """Detached factor on the surrogate, made of ``weight_T`` = proximal / behaviour.

    full: decoupled PPO, w; truncate: TIS, min(w, cap); mask: IcePop (arXiv:2510.18855), w inside [floor, cap] and
    else 0; m2po: 1 if kept and else 0.
    """
    if objective.correction == "full":
        return weight_T
    if objective.correction == "truncate":
        return weight_T.clamp(max=objective.correction_cap)
    if objective.correction == "mask":
        outside_T = (weight_T < objective.correction_floor) | (weight_T > objective.correction_cap)
        return weight_T.masked_fill(outside_T, 0.0)
    if objective.correction == "m2po" and keep_T is not None:
        return keep_T.to(weight_T.dtype)
    return torch.ones_like(weight_T)


@torch.no_grad()
def _loss_sums(
    mask_T: Tensor,
    ratio_T: Tensor,
    clipped: tuple[Tensor, Tensor, Tensor],
    correction_T: Tensor,
    log_weight_T: Tensor,
    entropy_T: Tensor | None,
    penalty_T: Tensor | None,
) -> LossSums:
    """``log_weight_T``: policy minus behaviour log-probs; ``penalty_T``: k3 to the reference model."""

    def total(x_T: Tensor | None) -> Tensor:
        if x_T is None:
            return torch.full((), math.nan, dtype=torch.float64, device=mask_T.device)
        return torch.where(mask_T, x_T.double(), 0.0).sum()

    weight_T = bounded_exp(log_weight_T)
    low_T, high_T, dual_T = clipped
    return LossSums(
        num_tokens=total(mask_T),
        ratio=total(ratio_T),
        ratio_max=torch.where(mask_T, ratio_T.double(), 0.0).amax(),
        clip_low=total(low_T),
        clip_high=total(high_T),
        clip_dual=total(dual_T),
        correction=total(correction_T),
        masked=total(correction_T == 0),
        kl_k1=total(-log_weight_T),
        kl_k3=total(k3(log_weight_T)),
        weight=total(weight_T),
        weight_squared=total(weight_T.square()),
        entropy=total(entropy_T),
        kl_reference=total(penalty_T),
    )
