"""Operations of a decoder layer on flat rows, forward and backward, in few and large kernels.

Owned here: linear layers through oneDNN, RMSNorm, rotary positions and SwiGLU as autograd functions that save little
and make few passes over memory. Not owned: attention (``shared_attention``) and how a model is put together
(``fused_forward``). Everything computes in the type of its input, float32 or float64.

Dimension key: N = rows (token positions), I and O = inputs and outputs of a linear layer, H = heads, D = size of what
is normalised or of a head, F = size inside the MLP.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def product(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``rows @ weight^T + bias``; strided operands are read as they are.

    oneDNN where it applies: on an AMD core with AVX-512 its float32 products ran at 2.2 times the speed of MKL's, and
    at 1.7 times with both operands transposed (docs/log.md).
    """
    if _onednn(rows_NI):
        return torch.ops.mkldnn._linear_pointwise(rows_NI, weight_OI, bias_O, "none", [], "")
    return functional.linear(rows_NI, weight_OI, bias_O)


def _onednn(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and rows.is_cpu and torch.backends.mkldnn.is_available()


class Linears(torch.autograd.Function):
    """Several linear layers of the same rows [N, I], such as query, key and value: one [N, O] each."""

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, *layers: Tensor | None) -> tuple[Tensor, ...]:
        """``layers``: weight [O, I] and bias [O] (or ``None``) of each in turn."""
        weights, biases = layers[::2], layers[1::2]
        ctx.save_for_backward(rows_NI, *weights)
        ctx.biased = [bias is not None for bias in biases]
        return tuple(product(rows_NI, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_NO: Tensor) -> tuple[Tensor | None, ...]:
        rows_NI, *weights = ctx.saved_tensors
        # oneDNN copies a transposed first operand: take the narrower one; the rows serve all layers.
        rows_narrower = sum(len(weight) for weight in weights) >= rows_NI.shape[1]
        rows_IN = rows_NI.t().contiguous() if rows_narrower else rows_NI.t()
        grad_rows: Tensor | None = None
        of_layers: list[Tensor | None] = []
        for grad_NO, weight_OI, biased in zip(grads_NO, weights, ctx.biased, strict=True):
            share = product(grad_NO, weight_OI.t())
            grad_rows = share if grad_rows is None else grad_rows.add_(share)
            if rows_narrower:
                of_layers.append(product(rows_IN, grad_NO.t()).t().contiguous())
            else:
                of_layers.append(product(grad_NO.t(), rows_IN))
            of_layers.append(grad_NO.sum(0) if biased else None)
        return grad_rows, *of_layers


class RmsNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, of any leading ones."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        scale = length.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        unit_ND = x_ND * scale
        ctx.save_for_backward(unit_ND, scale, weight_D)
        return unit_ND * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """With u = x / rms and g = grad * weight: grad_x = (g - u * mean(g * u)) / rms, grad_weight = sum(grad * u)."""
        unit_ND, scale, weight_D = ctx.saved_tensors
        share_ND = grad_ND * unit_ND
        grad_weight = share_ND.flatten(0, -2).sum(0)
        along = (share_ND @ weight_D).div_(weight_D.shape[0]).unsqueeze(-1)
        grad_x = torch.mul(grad_ND, weight_D).addcmul_(unit_ND, along, value=-1.0).mul_(scale)
        return grad_x, grad_weight, None


class Rotate(torch.autograd.Function):
    """Rotary position embedding of heads [N, H, D]; RoFormer, arXiv:2104.09864, in the half-split form of Llama.

    ``cos`` and ``sin`` are [N, H, D], ``sin`` with its first half negated: then x * cos + swap_halves(x) * sin.
    """

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_NHD: Tensor, sin_NHD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NHD, sin_NHD)
        return torch.mul(x_NHD, cos_NHD).addcmul_(x_NHD.roll(x_NHD.shape[-1] // 2, -1), sin_NHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
        """A rotation is undone by the opposite angle; a scaled one (YaRN) keeps its scale."""
        cos_NHD, sin_NHD = ctx.saved_tensors
        swapped = grad_NHD.roll(grad_NHD.shape[-1] // 2, -1)
        return torch.mul(grad_NHD, cos_NHD).addcmul_(swapped, sin_NHD, value=-1.0), None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate) * up``, [N, F]; Shazeer, arXiv:2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        active_NF = functional.silu(gate_NF)
        ctx.save_for_backward(gate_NF, up_NF, active_NF)
        return active_NF * up_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF, active_NF = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * active_NF
