"""Log-probs and entropies of chosen tokens, computed in chunks so that full logits never exist.

Owns the step from hidden states to log-probs, forward and backward. Knows no model, batch or loss.

Dimension key: T = rows (one per completion token), D = hidden size, V = rows of the output embedding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def selected_logprobs(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    target_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    bias_V: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``target_T`` and entropies of their distributions, at logits divided by ``temperature``.

        z = (hidden @ head_weight^T + bias) / temperature
        logp = z[target] - logsumexp(z)        entropy = logsumexp(z) - sum_v softmax(z)_v z_v

    Both are [T], in nats, float32 (float64 for float64 input); entropy is ``None`` without ``with_entropy``.
    Gradients of both flow to the hidden states, the weight and the bias. No more than two float32 tensors of
    [chunk_tokens, V] are alive at any time (three where entropy has a gradient): with more rows than that, backward
    computes each chunk's logits again. Under autocast the matrix products run in its precision, the softmax does not.
    Rows of V that no tokenizer uses are part of the distribution, as they are for the sampler.

    Raises ``ValueError`` for shapes that do not fit, ``temperature`` <= 0 or ``chunk_tokens`` < 1.
    Source: DAPO, arXiv:2503.14476, section 4.1 (token-level policy); entropy as in Figure 2b.
    """
    rows, size = hidden_TD.shape
    if head_weight_VD.ndim != 2 or head_weight_VD.shape[1] != size or target_T.shape != (rows,):
        raise ValueError(
            f"hidden [T, D], head weight [V, D] and target [T] must agree, got {tuple(hidden_TD.shape)}, "
            f"{tuple(head_weight_VD.shape)} and {tuple(target_T.shape)}"
        )
    if bias_V is not None and bias_V.shape != head_weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{head_weight_VD.shape[0]}], got {tuple(bias_V.shape)}")
    if temperature <= 0 or chunk_tokens < 1:
        raise ValueError(f"temperature ({temperature}) and chunk_tokens ({chunk_tokens}) must be positive")
    logp_T, entropy_T = _SelectedLogprobs.apply(
        hidden_TD, head_weight_VD, bias_V, target_T, temperature, chunk_tokens, with_entropy
    )
    return logp_T, entropy_T


class _SelectedLogprobs(torch.autograd.Function):
    """The chunked computation; its backward is written out because autograd would keep every chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        device = hidden_TD.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.product = torch.get_autocast_dtype(device) if autocast else hidden_TD.dtype
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        weight = weight_VD.to(ctx.product)
        logps, entropies, kept = [], [], None
        for start in range(0, max(len(target_T), 1), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            kept = None  # the chunk before goes before this one's logits come
            logp_CV = _log_softmax(hidden_TD[chunk].to(ctx.product), weight, bias_V, temperature)
            logps.append(logp_CV.gather(1, target_T[chunk, None]).squeeze(1))
            if with_entropy:
                entropies.append(_entropy(logp_CV))
            kept = logp_CV
            del logp_CV
        # One chunk's log-softmax costs no more than recomputing it would, so a single chunk keeps it.
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, kept if len(logps) == 1 else None)
        return torch.cat(logps), torch.cat(entropies) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logp_T is None and grad_entropy_T is None:
            return (None,) * 7
        hidden_TD, weight_VD, bias_V, target_T, kept = ctx.saved_tensors
        weight = weight_VD.to(ctx.product)
        grad_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for start in range(0, len(target_T), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            hidden_CD = hidden_TD[chunk].to(ctx.product)
            logp_CV = _log_softmax(hidden_CD, weight, bias_V, ctx.temperature) if kept is None else kept
            grad_CV = _grad_logits(
                logp_CV,
                target_T[chunk],
                None if grad_logp_T is None else grad_logp_T[chunk],
                None if grad_entropy_T is None else grad_entropy_T[chunk],
            )
            grad_CV = _over(grad_CV, ctx.temperature)
            del logp_CV
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(ctx.product)
            if grad_hidden_TD is not None:
                grad_hidden_TD[chunk] = grad_CV @ weight
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
            del grad_CV
        return grad_hidden_TD, grad_weight_VD, grad_bias_V, None, None, None, None


def _log_softmax(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """Log-softmax of one chunk's logits / temperature, [C, V], in float32 or float64."""
    with torch.autocast(hidden_CD.device.type, enabled=False):
        logits_CV = linear(hidden_CD, weight_VD, None if bias_V is None else bias_V.to(hidden_CD.dtype))
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    return torch.log_softmax(_over(logits_CV, temperature), dim=-1)


def _over(values: Tensor, temperature: float) -> Tensor:
    """``values`` / ``temperature``, in place; at 1 that is a pass over [C, V] that would change nothing."""
    return values if temperature == 1.0 else values.div_(temperature)


def _entropy(logp_CV: Tensor) -> Tensor:
    """-sum p log p of each row, [C]; equals logsumexp(z) - sum softmax(z) z."""
    return logp_CV.exp().mul_(logp_CV).sum(-1).neg_()


def _grad_logits(
    logp_CV: Tensor, target_C: Tensor, grad_logp_C: Tensor | None, grad_entropy_C: Tensor | None
) -> Tensor:
    """Gradient with respect to z, [C, V].

        d logp[target] / dz_v = [v = target] - p_v        d entropy / dz_v = -p_v (log p_v + entropy)

    so both share one factor -p_v. Reuses no input's storage: ``logp_CV`` may be asked for again.
    """
    p_CV = logp_CV.exp()
    if grad_entropy_C is None:
        assert grad_logp_C is not None  # backward has returned if both are None
        grad_CV = p_CV.mul_(-grad_logp_C[:, None])
    else:
        entropy_C = -torch.linalg.vecdot(p_CV, logp_CV)
        factor_C = grad_entropy_C * entropy_C if grad_logp_C is None else grad_entropy_C * entropy_C + grad_logp_C
        grad_CV = p_CV.mul_(torch.addcmul(factor_C[:, None], logp_CV, grad_entropy_C[:, None]).neg_())
    if grad_logp_C is not None:
        grad_CV.scatter_add_(1, target_C[:, None], grad_logp_C[:, None])
    return grad_CV
