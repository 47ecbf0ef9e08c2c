"""The proof that the fused pass computes what a model does, on the model's own weights.

Owned here: what no configuration shows, such as adapters, and the comparison of hidden states and all gradients with
those of the module's own pass on a small probe. Not owned: the pass itself (``fused_forward``), and what settings,
device and configuration say about it (``forward_pass``).
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dapo_async.model.batching import MicroBatch, TrainSequence, build_microbatch, build_shared
from dapo_async.model.cpu.fused_forward import FusedForward
from dapo_async.model.forward_pass import ForwardPass

log = logging.getLogger(__name__)

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# Largest difference, relative to a tensor's largest number: rounding gives 2e-6, a wrong formula 1e-2 and more.
TOLERANCE = 1e-3


def prove(forward_pass: ForwardPass, model: PreTrainedModel) -> ForwardPass:
    """``forward_pass``, or the module's own where that is fused and ``model`` computes something else; says which.

    Raises ``ConfigError`` if model.forward = "fused" and it cannot be used.
    """
    if forward_pass.fused and (obstacle := _parts_obstacle(model) or difference(model)):
        forward_pass = forward_pass.unfused(obstacle)
    if forward_pass.fused:
        log.info("forward pass: fused, each prompt once per group; proved equal to the module's own")
    elif forward_pass.wish == "auto":
        level = logging.INFO if forward_pass.device_type == "cuda" else logging.WARNING
        log.log(level, "forward pass: the module's own: %s", forward_pass.obstacle)
    return forward_pass


def _parts_obstacle(model: PreTrainedModel) -> str:
    """Adapters and other changed modules: the fused pass reads weights and would pass them by."""
    trunk: Any = model.base_model
    for index, layer in enumerate(trunk.layers):
        for name in LINEARS:
            part = layer.get_submodule(name)
            if type(part) is not nn.Linear:
                return f"layer {index} has a {type(part).__name__} as {name}"
    return ""


def difference(model: PreTrainedModel) -> str:
    """Where the fused pass and the module's own differ on a probe; empty: nowhere. Leaves no gradients behind.

    The probe: two prompts with three ragged completions each, hidden states that predict their tokens, and the
    gradient of a random combination of these with respect to every weight.
    """
    probe = _probe(model.config.get_text_config().vocab_size)
    indices, device = range(len(probe)), model.device
    padded = build_microbatch(probe, indices, padded=True, device=device)
    shared = build_shared(probe, indices, device=device)
    names, parameters = zip(*((n, p) for n, p in model.base_model.named_parameters() if p.requires_grad), strict=True)

    def run(hidden_ND: Tensor, micro: MicroBatch) -> list[Tensor]:
        hidden_TD = hidden_ND.index_select(0, micro.predict_T)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(hidden_TD.shape, generator=generator).to(hidden_TD)
        return [hidden_TD.detach(), *torch.autograd.grad((hidden_TD * direction).sum(), parameters)]

    expected = run(
        model.base_model(input_ids=padded.input_ids, use_cache=False).last_hidden_state.flatten(0, 1), padded
    )
    found = run(FusedForward(model)(shared), shared)
    largest = max(float(tensor.abs().max()) for tensor in expected[1:])
    for name, one, other in zip(("hidden states", *names), expected, found, strict=True):
        # A gradient that is zero but for rounding is measured against the others.
        size = max(float(one.abs().max()), 1e-3 * largest)
        error = float((one - other).abs().max()) / size
        if not error <= TOLERANCE:
            what = name if name == "hidden states" else f"the gradient of {name}"
            return f"{what} of the fused pass differs from the module's own by {error:.1e}"
    return ""


def _probe(vocab_size: int) -> list[TrainSequence]:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, vocab_size, length).astype(np.int32) for length in (5, 3)]
    return [
        TrainSequence(
            prompts[number // 3],
            random.integers(0, vocab_size, length).astype(np.int32),
            np.zeros(length, dtype=np.float32),
            advantage=0.0,
            group=number // 3,
        )
        for number, length in enumerate((7, 1, 4, 12, 6, 2))
    ]
