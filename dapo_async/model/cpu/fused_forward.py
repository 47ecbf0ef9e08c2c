"""Training forward passes of the Llama family (Llama, Qwen2, Qwen3) on the CPU: every prompt once, nothing padded.

Owned here: the pass over a module's own parameters. Not owned: the operations (``fused_ops``, ``shared_attention``),
the layout of rows (``prompt_sharing``), whether it may be used (``forward_pass``), and the proof that it is right
(``proof``).

Dimension key: N = flat rows of a microbatch, D = hidden size, H = query heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dapo_async.model.batching import MicroBatch
from dapo_async.model.cpu.fused_ops import Linears, RmsNorm, Rotate, SwiGlu
from dapo_async.model.cpu.shared_attention import BlockIndex, SharedAttention, block_index


class FusedForward:
    """Hidden states of flat rows. Reads the module's parameters in every pass: nothing has to be kept in step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.trunk: Any = model.base_model
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, micro: MicroBatch) -> Tensor:
        """Last hidden states [N, D], normalised, of a microbatch in shared layout."""
        assert micro.blocks is not None  # shared layout
        assert micro.position_ids is not None
        trunk = self.trunk
        hidden = functional.embedding(micro.input_ids[0], trunk.embed_tokens.weight)
        angles = self._angles(hidden, micro.position_ids[0])
        heads, kv_heads = self.heads, self.kv_heads
        blocks = [block_index(block, heads=heads, kv_heads=kv_heads, like=hidden) for block in micro.blocks]
        for layer in trunk.layers:
            hidden = hidden + self._attend(layer, hidden, angles, blocks)
            mlp = layer.mlp
            gate, up = _linears(_norm(layer.post_attention_layernorm, hidden), mlp.gate_proj, mlp.up_proj)
            hidden = hidden + _linears(SwiGlu.apply(gate, up), mlp.down_proj)[0]
        return _norm(trunk.norm, hidden)

    def _attend(
        self, layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], blocks: Sequence[BlockIndex]
    ) -> Tensor:
        attention = layer.self_attn
        rows = _norm(layer.input_layernorm, hidden)
        projected = _linears(rows, attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (x.view(len(x), -1, angles[0].shape[-1]) for x in projected)
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        cos, sin = angles
        query = Rotate.apply(query, cos, sin)
        key = Rotate.apply(key, cos[:, : self.kv_heads], sin[:, : self.kv_heads])
        mixed = SharedAttention.apply(query, key, value, blocks, float(attention.scaling))
        return _linears(mixed, attention.o_proj)[0]

    def _angles(self, hidden: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [N, H, D], from a table of the module's own angles."""
        longest = int(positions_N.max()) + 1
        if self._tables is None or len(self._tables[0]) < longest or self._tables[0].dtype != hidden.dtype:
            cos, sin = self.trunk.rotary_emb(hidden, torch.arange(2 * longest, device=hidden.device)[None])
            half = cos.shape[-1] // 2
            signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
            self._tables = (cos[0], signed)
        cos, sin = (table[positions_N, None].expand(-1, self.heads, -1).contiguous() for table in self._tables)
        return cos, sin


def _norm(norm: Any, x: Tensor) -> Tensor:
    return RmsNorm.apply(x, norm.weight, float(norm.variance_epsilon))


def _linears(rows: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    return Linears.apply(rows, *(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
