"""Forward passes over the slot cache for any transformers causal LM. Owned here: the ``Decoder`` contract, the generic
decoder that drives the module's own forward, the choice between it and the fused one, and the refusal of models
whose attention is not plain. Not owned: sampling, slots, weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from dapo_async.errors import ConfigError
from dapo_async.model.family import architecture_obstacle
from dapo_async.model.kv_cache import BUCKET, ROWS
from workers.torch.fused_decoder import FusedDecoder
from workers.torch.slot_cache import SlotCache, attend, bucket, causal_bias, spread_bias

ATTENTION = "dapo_slots"
PROBE_TOKENS = 6
# Largest difference to the module's own logits, relative to the largest of them, that is rounding and not a mistake.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class Decoder(Protocol):
    """One model's forward passes. Row j of a result depends on row j of the arguments only, bit for bit."""

    kv_shape: tuple[int, int, int]  # layers, KV heads, head dimension
    reads_together: bool  # several prompts in one pass

    def run(
        self, tokens: Tensor, positions: Tensor, cache: SlotCache, length: int, prompts: Sequence[np.ndarray]
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed slot j ``tokens[j]`` at ``positions[j]`` (< ``length``), and read ``prompts`` (int [tokens], no slots).

        ``tokens`` and ``positions`` are int64 [N], N a multiple of ``ROWS``, maybe 0. Returns next-token logits,
        float32 [N + prompts, vocab], and each prompt's keys and values [layers, 2, KV heads, bucket, head dim].
        """

    def refresh(self) -> None:
        """The module's parameters have changed in place."""


class _StepCache(Cache):
    """Shows one step of a ``SlotCache`` to a module's forward."""

    def __init__(self, cache: SlotCache, positions: Tensor, length: int) -> None:
        super().__init__(layers=[])
        self._cache, self._length = cache, length
        cache.begin(positions, length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, kv_heads = key_states.shape[:2]
        keys, values = self._cache.update(layer_idx, key_states.flatten(0, 2), value_states.flatten(0, 2))
        return keys.unflatten(0, (rows, kv_heads)), values.unflatten(0, (rows, kv_heads))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length - 1


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface over ``attend``: [N, heads, Q, D] to [N, Q, heads, D]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(f"this model's attention uses {name}, which the torch engine does not compute")
    rows, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    assert attention_mask is not None
    scale = options.get("scaling")
    mixed = attend(
        query.reshape(rows * kv_heads, group * queries, dim),
        key.flatten(0, 1),
        value.flatten(0, 1),
        spread_bias(attention_mask[:, 0], kv_heads, group),
        dim**-0.5 if scale is None else scale,
    )
    return mixed.view(rows, heads, queries, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


class ModuleDecoder:
    """Drives the module's own forward, whatever its architecture."""

    reads_together = False

    def __init__(self, model: PreTrainedModel, max_len: int) -> None:
        self.model: Any = model
        self.max_len = max_len
        self.kv_shape = (1, 1, 1)
        _, prefix = self._read(np.zeros(1, dtype=np.int64))
        layers, _, kv_heads, _, head_dim = prefix.shape
        self.kv_shape = (layers, kv_heads, head_dim)

    def refresh(self) -> None:
        """Nothing is copied from the module."""

    def run(
        self, tokens: Tensor, positions: Tensor, cache: SlotCache, length: int, prompts: Sequence[np.ndarray]
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``Decoder``. Prompts go one at a time: logits are then made at their last positions only."""
        read = [self._read(prompt) for prompt in prompts]
        logits = [row for row, _ in read]
        if len(tokens):
            step = _StepCache(cache, positions, length)
            logits.insert(0, self._forward(tokens[:, None], positions[:, None], step, length))
        return torch.cat(logits), [prefix for _, prefix in read]

    def _read(self, prompt: np.ndarray) -> tuple[Tensor, Tensor]:
        """Next-token logits [1, vocab] and keys and values of one prompt, padded to its bucket."""
        length = bucket(len(prompt))
        tokens = torch.zeros(1, length, dtype=torch.int64)
        tokens[0, : len(prompt)] = torch.from_numpy(prompt)
        positions = torch.arange(length).clamp_(max=self.max_len - 1)[None].to(self.model.device)
        cache: Any = DynamicCache()
        last = torch.tensor([len(prompt) - 1], device=self.model.device)
        logits = self._forward(tokens.to(self.model.device), positions, cache, length, logits_to_keep=last)
        return logits, torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])

    def _forward(self, tokens: Tensor, positions: Tensor, cache: Cache, length: int, **options: Any) -> Tensor:
        bias = causal_bias(positions, length, self.model.dtype)[:, None]
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=bias,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1].float()


def load_module(
    model: str | Path | PreTrainedModel, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The module itself, or one built from a model folder's configuration (its weights are then random).

    Raises ``ConfigError`` where transformers finds no causal LM at ``model``.
    """
    module: Any = model
    if not isinstance(model, PreTrainedModel):
        try:
            trusted = {"trust_remote_code": trust_remote_code}
            architecture = AutoConfig.from_pretrained(model, **trusted)
            module = AutoModelForCausalLM.from_config(architecture, dtype=dtype, **trusted)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no causal language model can be built from {model}: {error}") from None
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_attention(config: Any, max_len: int) -> None:
    """Refuse what the slot cache cannot serve. Raises ``ConfigError``."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ConfigError(f"the torch engine serves decoders; {kind} is an encoder-decoder")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_len and getattr(config, "use_sliding_window", True):
        raise ConfigError(f"{kind} has a sliding window of {window} tokens, sequences may have {max_len}: shorten them")
    if not layer_types <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"the torch engine serves full attention; {kind} also has {', '.join(sorted(layer_types))}")
    limit = getattr(config, "max_position_embeddings", None)
    # Rotary positions are computed, not looked up, and scaling may stretch them: how far, ``check`` has settled.
    if limit is not None and limit < max_len and not getattr(config, "rope_parameters", None):
        raise ConfigError(f"sequences of {max_len} tokens exceed the {limit} positions of {kind}")


@torch.inference_mode()
def build_decoder(model: PreTrainedModel, max_len: int, *, fused: bool = True) -> Decoder:
    """The fastest decoder that fits ``model``, proved on a few tokens against the module's own attention.

    ``fused=False`` asks for the generic one. Raises ``ConfigError`` where no decoder computes what the module does.
    """
    check_attention(model.config, max_len)
    ids = (torch.arange(PROBE_TOKENS, device=model.device) % model.config.vocab_size)[None]
    try:
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        model.set_attn_implementation(ATTENTION)
        # A module may silently keep its own attention; its result is compared all the same.
        fits = fused and not architecture_obstacle(model.config)
        decoder: Decoder = FusedDecoder(model, max_len) if fits else ModuleDecoder(model, max_len)
        found = _probe(decoder, ids[0], model)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{model.config.model_type} cannot run on the torch engine: {error}") from error
    difference = float((found - expected[-2:]).abs().max() / expected.abs().max())
    if not difference <= PROBE_TOLERANCE.get(model.dtype, 0.1):
        raise ConfigError(
            f"{model.config.model_type} computes attention in a way the torch engine does not "
            f"(its logits differ by {difference:.2g} relative): it serves plain full attention only"
        )
    return decoder


def _probe(decoder: Decoder, ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Logits of the last two positions of ``ids``: one by prefill, one by a decode step over it."""
    cache = SlotCache(decoder.kv_shape, ROWS, BUCKET, model.dtype, model.device)
    fed, none = len(ids) - 1, torch.zeros(0, dtype=torch.int64, device=model.device)
    before, (prefix,) = decoder.run(none, none, cache, 0, [ids[:fed].cpu().numpy()])
    cache.share(0, ROWS, prefix)
    positions = torch.full((ROWS,), fed, device=model.device)
    after, _ = decoder.run(ids[fed:].expand(ROWS), positions, cache, cache.view_length(len(ids)), [])
    return torch.cat((before, after[:1]))
