"""PyTorch's variable-length attention for ``transformers``: packed sequences in one row, CUDA and bfloat16 only.

Owned here: the attention function, registered under the name ``VARLEN`` when this module is imported. Not owned: when
it is used (``forward_pass``).

Dimension key: H = heads, N = all positions, D = head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from dapo_async.errors import ConfigError

VARLEN = "varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """PyTorch's variable-length causal attention, in the form that transformers calls: [1, H, N, D] to [1, N, H, D].

    Keys and values may have fewer heads than the query; the kernel groups them. Raises
    ``ConfigError`` for attention features that the kernel lacks.
    """
    lacking = [name for name in ("softcap", "s_aux", "position_bias") if features.get(name) is not None]
    if lacking:
        raise ConfigError(f'model.attention = "varlen" lacks {lacking[0]} of {type(module).__name__}; use "sdpa"')
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ValueError("varlen attention needs one packed row and its cu_seq_lens_q and max_length_q")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query_NHD, key_NHD, value_NHD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    output_NHD = varlen_attn(
        query_NHD,
        key_NHD,
        value_NHD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output_NHD, Tensor)  # the kernel returns more only when asked to
    return output_NHD[None], None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Variable-length attention reads ``cu_seq_lens_q`` instead of a mask."""


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, _no_mask)
