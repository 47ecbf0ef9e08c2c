"""Decoding for the Llama family (Llama, Qwen2, Qwen3) with few, large operations. Owned here: the forward arithmetic
over the module's weights, with query, key and value as one projection and gate and up as another. Not owned: the
weights; the module's parameters are made views of the fused ones, so a swap into the module needs no rebuild.

A test proves it equal to the module's own forward (``decoders.ModuleDecoder``). Called by ``decoders``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.slot_cache import SlotCache, attend, causal_bias, spread_bias

FAMILY = ("llama", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # kinds whose angles do not depend on the sequence's length
ROWS = 8  # a matrix product's bits depend on its number of rows only below this many

Store = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def fusable(config: Any) -> bool:
    """Whether ``FusedDecoder`` computes what a module of this configuration computes."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in STATIC_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


class Projection:
    """Several linear layers of one input as one; their parameters become views of its ``weight`` and ``bias``."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        start = 0
        for layer in layers:
            end = start + layer.out_features
            layer.weight.data = self.weight[start:end]
            if self.bias is not None:
                layer.bias.data = self.bias[start:end]
            start = end

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


class FusedLayer:
    """One decoder layer on rows [N·Q, hidden]."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.gate_up = Projection(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.scale = float(attention.scaling)
        self.norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self.norm_weight = torch.empty(0)  # [heads + KV heads, D], made by ``FusedDecoder.refresh``


class FusedDecoder:
    """Forward passes of one Llama-family module; see ``decoders.Decoder`` for the contract."""

    def __init__(self, model: Any, max_len: int) -> None:
        config, trunk = model.config, model.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group = self.heads // self.kv_heads
        self.embedding, self.head, self.norm = trunk.embed_tokens, model.lm_head, trunk.norm
        self.layers = [FusedLayer(layer) for layer in trunk.layers]
        self.head_dim = self.layers[0].qkv.weight.shape[0] // (self.heads + 2 * self.kv_heads)
        self.kv_shape = (len(self.layers), self.kv_heads, self.head_dim)
        positions = torch.arange(max_len, device=self.embedding.weight.device)[None]
        cos, sin = trunk.rotary_emb(self.embedding.weight, positions)
        # x·cos + rotate_half(x)·sin with the sign of rotate_half moved into the table: the rest is a plain roll.
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, : self.head_dim // 2], sin[0, :, self.head_dim // 2 :]), -1)
        self.refresh()

    def refresh(self) -> None:
        """Take over changed weights. Only the per-head norms are copies; everything else is shared with the module."""
        for layer in self.layers:
            if layer.norms is not None:
                query, key = (norm.weight.data for norm in layer.norms)
                layer.norm_weight = torch.cat((query.expand(self.heads, -1), key.expand(self.kv_heads, -1)))

    def prefill(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """See ``decoders.Decoder.prefill``."""
        prompts, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(prompts, length)
        stored: list[Tensor] = []

        def store(_: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            stored.append(torch.stack((key, value)))
            return key.flatten(0, 1), value.flatten(0, 1)

        hidden = self._forward(tokens, positions, length, store).view(prompts, length, -1)
        ends = hidden[torch.arange(prompts, device=tokens.device), last]
        logits = self._logits(F.pad(ends, (0, 0, 0, -prompts % ROWS)))
        return torch.stack(stored), logits[:prompts]

    def decode(self, tokens: Tensor, positions: Tensor, cache: SlotCache, length: int) -> Tensor:
        """See ``decoders.Decoder.decode``."""
        cache.begin(positions, length)

        def store(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return cache.update(layer, key.flatten(0, 2), value.flatten(0, 2))

        return self._logits(self._forward(tokens[:, None], positions[:, None], length, store))

    def _forward(self, tokens: Tensor, positions: Tensor, length: int, store: Store) -> Tensor:
        rows, queries = tokens.shape
        hidden = F.embedding(tokens.flatten(), self.embedding.weight)
        cos, sin = self.cos[positions.flatten(), None], self.sin[positions.flatten(), None]
        bias = spread_bias(causal_bias(positions, length, hidden.dtype), self.kv_heads, self.group)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(_rms_norm(hidden, layer.before_attention)).view(rows * queries, -1, self.head_dim)
            query, key = self._rotate(qkv[:, : self.heads + self.kv_heads], layer, cos, sin)
            keys, values = store(
                index,
                key.reshape(rows, queries, self.kv_heads, -1).transpose(1, 2),
                qkv[:, self.heads + self.kv_heads :].reshape(rows, queries, self.kv_heads, -1).transpose(1, 2),
            )
            query = query.reshape(rows, queries, self.kv_heads, self.group, -1).permute(0, 2, 3, 1, 4)
            query = query.reshape(rows * self.kv_heads, self.group * queries, -1)
            mixed = attend(query, keys, values, bias, layer.scale)
            mixed = mixed.view(rows, self.kv_heads, self.group, queries, -1).permute(0, 3, 1, 2, 4)
            hidden = hidden + layer.out(mixed.reshape(rows * queries, -1))
            gate, up = layer.gate_up(_rms_norm(hidden, layer.before_mlp)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return hidden

    def _rotate(self, heads: Tensor, layer: FusedLayer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (Qwen3) and rotated queries and keys of [rows, heads, D]."""
        if layer.norms is not None:
            heads = F.rms_norm(heads, (self.head_dim,), None, layer.norms[0].variance_epsilon) * layer.norm_weight
        rotated = torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin)
        return rotated[:, : self.heads], rotated[:, self.heads :]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(_rms_norm(hidden, self.norm)).float()


def _rms_norm(rows: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(rows, rows.shape[-1:], norm.weight, norm.variance_epsilon)
