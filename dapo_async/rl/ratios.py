"""Importance ratios from differences of log-probs, and the KL estimator made of them. Pure tensor functions.

Owns the bound that keeps ratios finite. Does not own what is done with a ratio (``loss``).

Dimension key: T = completion tokens of one microbatch, packed.
"""

import torch
from torch import Tensor

# exp(20) is 4.9e8: far outside any clip bound, yet finite in float32. Without the bound a clipped token of
# log-ratio 100 has ratio inf, and its zero gradient becomes 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio_T: Tensor) -> Tensor:
    """exp of ``log_ratio_T`` [T], in nats, after bounding it to -20 .. 20."""
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k3(log_ratio_T: Tensor) -> Tensor:
    """Never negative estimate r - 1 - log r [T] of KL(q || p), for tokens drawn from q and log r = log p - log q.

    The log-ratio is bounded as in ``bounded_exp``. Source: GRPO, arXiv:2402.03300, Eq. 4.
    """
    bounded_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return bounded_T.exp() - 1.0 - bounded_T


def sequence_mean(x_T: Tensor, mask_T: Tensor, sequence_T: Tensor) -> Tensor:
    """For each token, the mean of ``x_T`` over the unmasked tokens of its sequence; [T].

    ``x_T`` must be 0 where ``mask_T`` (bool) is false; ``sequence_T`` (integers) may hold anything there. The
    log of GSPO's sequence ratio is such a mean: arXiv:2507.18071, Eq. 7.
    """
    _, index_T = sequence_T.unique(return_inverse=True)
    total = torch.zeros_like(x_T).index_add(0, index_T, x_T)
    count = torch.zeros_like(x_T).index_add(0, index_T, mask_T.to(x_T.dtype))
    return (total / count.clamp(min=1.0))[index_T]
