"""Decoding for the Llama family (Llama, Qwen2, Qwen3) with few, large operations. Owned here: the forward arithmetic
over the module's weights, with query, key and value as one projection and gate and up as another, and with prompts
and running completions side by side in one pass. Not owned: the weights; the module's parameters are made views of
the fused ones, so a swap into the module needs no rebuild.

A test proves it equal to the module's own forward (``decoders.ModuleDecoder``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapo_async.model.kv_cache import ROWS
from workers.torch.slot_cache import SlotCache, attend, bucket, causal_bias, spread_bias


class Projection:
    """Several linear layers of one input as one; their parameters become views of its ``weight`` and ``bias``."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.weight, self.bias = layers[0].weight.data, None if layers[0].bias is None else layers[0].bias.data
        # oneDNN's product runs at twice the speed of MKL's on AMD; it is what torch.compile calls.
        self._onednn = (
            self.weight.dtype == torch.float32 and self.weight.is_cpu and torch.backends.mkldnn.is_available()
        )
        if len(layers) > 1:
            self._adopt(layers)

    def _adopt(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = None if self.bias is None else torch.cat([layer.bias.data for layer in layers])
        start = 0
        for layer in layers:
            end = start + layer.out_features
            layer.weight.data = self.weight[start:end]
            if self.bias is not None:
                layer.bias.data = self.bias[start:end]
            start = end

    def __call__(self, rows: Tensor) -> Tensor:
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return F.linear(rows, self.weight, self.bias)


class Norm:
    """RMS normalisation over the last dimension, in float32."""

    def __init__(self, norm: Any) -> None:
        self.weight = norm.weight.data
        self.eps = torch.tensor(norm.variance_epsilon, dtype=torch.float32, device=self.weight.device)

    def __call__(self, rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1.0 / rows.shape[-1]).rsqrt_()
        return (rows * scale).to(rows.dtype).mul_(self.weight)


class FusedLayer:
    """The parts of one decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.o_proj)
        self.gate_up = Projection(mlp.gate_proj, mlp.up_proj)
        self.down = Projection(mlp.down_proj)
        self.before_attention, self.before_mlp = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.scale = float(attention.scaling)
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self.head_norm = Norm(attention.q_norm) if self.head_norms else None


class _Prompts:
    """Prompts of one bucket within the flat rows of a pass, and their keys and values as they are made.

    ``rows`` [P, L] are the flat rows of the prompts, padded with each one's first row (finite, and later than every
    position that counts); ``back`` are the places of the true rows in the flattened [P·L].
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        width = bucket(max(lengths))
        steps, start, length = np.arange(width), np.array(starts)[:, None], np.array(lengths)[:, None]
        inside = steps < length
        self.rows = torch.from_numpy(start + np.where(inside, steps, 0)).to(device)
        self.back = torch.from_numpy(np.flatnonzero(inside)).to(device)
        self.targets = self.rows.view(-1)[self.back]
        self.positions = torch.arange(width, device=device).expand(len(starts), width)
        self.bias = torch.empty(0)
        self.stored: list[Tensor] = []  # per layer [2, P, KV heads, L, D]


class FusedDecoder:
    """Forward passes of one Llama-family module; see ``decoders.Decoder`` for the contract."""

    reads_together = True

    def __init__(self, model: Any, max_len: int) -> None:
        config, trunk = model.config, model.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group = self.heads // self.kv_heads
        self.embedding, self.head, self.norm = (
            trunk.embed_tokens.weight.data,
            Projection(model.lm_head),
            Norm(trunk.norm),
        )
        self.layers = [FusedLayer(layer) for layer in trunk.layers]
        self.head_dim = self.layers[0].qkv.weight.shape[0] // (self.heads + 2 * self.kv_heads)
        self.kv_shape = (len(self.layers), self.kv_heads, self.head_dim)
        cos, sin = trunk.rotary_emb(self.embedding, torch.arange(max_len, device=self.embedding.device)[None])
        # x·cos + rotate_half(x)·sin with the sign of rotate_half moved into the table: the rest is a plain roll.
        half = self.head_dim // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        self.refresh()

    def refresh(self) -> None:
        """Take over changed weights. Only the per-head norms are copies; everything else is shared with the module."""
        for layer in self.layers:
            if layer.head_norm is not None:
                query, key = (norm.weight.data for norm in layer.head_norms)
                layer.head_norm.weight = torch.cat((query.expand(self.heads, -1), key.expand(self.kv_heads, -1)))

    def run(
        self, tokens: Tensor, positions: Tensor, cache: SlotCache, length: int, prompts: Sequence[np.ndarray]
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``decoders.Decoder.run``."""
        return _Pass(self, tokens, positions, cache, length, prompts).run()


class _Pass:
    """One forward pass. Its rows: N of running completions, padded; then all prompts' tokens on end, padded."""

    def __init__(
        self,
        decoder: FusedDecoder,
        tokens: Tensor,
        positions: Tensor,
        cache: SlotCache,
        length: int,
        prompts: Sequence[np.ndarray],
    ) -> None:
        self.decoder, self.cache, self.running, device = decoder, cache, len(tokens), tokens.device
        self.tokens, self.positions = tokens, positions
        self.groups: list[tuple[list[int], _Prompts]] = []
        self.kept: Tensor | None = None  # rows whose logits are wanted; None: all
        if self.running:
            cache.begin(positions, length)
            self.bias = self._bias(positions[:, None], length)
        if prompts:
            self._append(prompts, device)

    def _append(self, prompts: Sequence[np.ndarray], device: torch.device) -> None:
        lengths = [len(prompt) for prompt in prompts]
        starts = (self.running + np.cumsum([0, *lengths[:-1]])).tolist()
        spare = np.zeros(-sum(lengths) % ROWS, dtype=np.int64)
        flat = torch.from_numpy(np.concatenate([*prompts, spare]).astype(np.int64)).to(device)
        places = torch.from_numpy(np.concatenate([*(np.arange(length) for length in lengths), spare])).to(device)
        self.tokens, self.positions = torch.cat((self.tokens, flat)), torch.cat((self.positions, places))
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            buckets.setdefault(bucket(length), []).append(index)
        for width, chosen in buckets.items():
            group = _Prompts([starts[i] for i in chosen], [lengths[i] for i in chosen], device)
            group.bias = self._bias(group.positions, width)
            self.groups.append((chosen, group))
        ends = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
        kept = [*range(self.running), *ends, *([0] * (-len(ends) % ROWS))]
        self.kept = torch.tensor(kept, device=device)

    def _bias(self, positions: Tensor, length: int) -> Tensor:
        decoder = self.decoder
        return spread_bias(causal_bias(positions, length, decoder.embedding.dtype), decoder.kv_heads, decoder.group)

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """Logits of the running rows and of each prompt's end, and the prompts' keys and values."""
        decoder = self.decoder
        hidden = F.embedding(self.tokens, decoder.embedding)
        cos, sin = decoder.cos[self.positions, None], decoder.sin[self.positions, None]
        for index, layer in enumerate(decoder.layers):
            heads = layer.qkv(layer.before_attention(hidden)).view(len(hidden), -1, decoder.head_dim)
            mixed = self._attend(index, layer, *self._rotate(heads, layer, cos, sin))
            if self.kept is not None and layer is decoder.layers[-1]:
                hidden, mixed = hidden[self.kept], mixed[self.kept]  # nobody reads the other rows any more
            hidden = hidden + layer.out(mixed)
            gate, up = layer.gate_up(layer.before_mlp(hidden)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate).mul_(up))
        logits = decoder.head(decoder.norm(hidden)).float()
        prefixes: list[tuple[int, Tensor]] = []
        for chosen, group in self.groups:
            prefixes += zip(chosen, torch.stack(group.stored).unbind(2), strict=True)
        return logits[: self.running + len(prefixes)], [prefix for _, prefix in sorted(prefixes, key=lambda p: p[0])]

    def _rotate(self, heads: Tensor, layer: FusedLayer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (Qwen3) and rotated query and key heads of [rows, heads, D], and the value heads as they are."""
        split = self.decoder.heads + self.decoder.kv_heads
        turned = heads[:, :split]
        if layer.head_norm is not None:
            turned = layer.head_norm(turned)
        return torch.addcmul(turned * cos, turned.roll(self.decoder.head_dim // 2, -1), sin), heads[:, split:]

    def _attend(self, index: int, layer: FusedLayer, turned: Tensor, value: Tensor) -> Tensor:
        """Attention of every row [rows, heads, D] within its own sequence: [rows, heads · D]."""
        heads, running = self.decoder.heads, self.running
        query, key = turned[:, :heads], turned[:, heads:]
        if not self.groups:
            return self._attend_running(index, layer, query, key, value)
        mixed = torch.zeros(len(turned), heads * self.decoder.head_dim, dtype=turned.dtype, device=turned.device)
        if running:
            mixed[:running] = self._attend_running(index, layer, query[:running], key[:running], value[:running])
        for _, group in self.groups:
            keys, values = (each[group.rows].transpose(1, 2) for each in (key, value))
            group.stored.append(torch.stack((keys, values)))
            of_group = self._attend_prompts(query[group.rows], keys, values, group.bias, layer.scale)
            mixed[group.targets] = of_group[group.back]
        return mixed

    def _attend_running(self, index: int, layer: FusedLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        decoder = self.decoder
        keys, values = self.cache.update(index, key.flatten(0, 1), value.flatten(0, 1))
        query = query.reshape(-1, decoder.group, decoder.head_dim)
        return attend(query, keys, values, self.bias, layer.scale).view(self.running, -1)

    def _attend_prompts(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
        """[N, Q, heads, D] against [N, KV heads, L, D]: [N·Q, heads · D]."""
        rows, queries, _, dim = query.shape
        kv_heads, group = self.decoder.kv_heads, self.decoder.group
        query = query.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
        query = query.reshape(rows * kv_heads, group * queries, dim)
        mixed = attend(query, keys.flatten(0, 1), values.flatten(0, 1), bias, scale)
        mixed = mixed.view(rows, kv_heads, group, queries, dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(rows * queries, kv_heads * group * dim)
