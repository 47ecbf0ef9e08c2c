"""Whether the learner's forward pass is the fused one: what speaks against it, and the proof that it is right.

Owned here: the choice ``model.forward`` and its reasons. The fused pass is used only if, on a small probe, hidden
states and all gradients equal those of the module's own pass. Not owned: the pass itself (``fused_forward``). Called by
``launch``; ``memory_check`` and ``check`` ask for obstacles, for which no weights are needed.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dapo_async.config.settings import Config
from dapo_async.errors import ConfigError
from dapo_async.model.batching import MicroBatch, TrainSequence, build_microbatch, build_shared
from dapo_async.model.cpu.fused_forward import FusedForward
from dapo_async.model.cpu.shared_attention import LONGEST
from dapo_async.model.family import architecture_obstacle

log = logging.getLogger(__name__)

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# Largest difference, relative to a tensor's largest number: rounding gives 2e-6, a wrong formula 1e-2 and more.
TOLERANCE = 1e-3


def choose_forward(model: PreTrainedModel, config: Config, device: torch.device) -> bool:
    """Whether to use the fused pass for ``model``. Says why not in the log.

    Raises ``ConfigError`` if model.forward = "fused" and it cannot be used.
    """
    choice = config.model.forward
    if choice == "module":
        return False
    reason = settings_obstacle(config, device.type) or architecture_obstacle(model.config) or _parts_obstacle(model)
    reason = reason or difference(model)
    if not reason:
        log.info("forward pass: fused, each prompt once per group; proved equal to the module's own")
        return True
    if choice == "fused":
        raise ConfigError(f'model.forward = "fused": {reason}; use "auto"')
    log.log(logging.INFO if device.type == "cuda" else logging.WARNING, "forward pass: the module's own: %s", reason)
    return False


def check_forward(config: Config, device: torch.device) -> None:
    """Refuse a wish that the settings alone make impossible. Raises ``ConfigError``."""
    reason = settings_obstacle(config, device.type)
    if config.model.forward == "fused" and reason:
        raise ConfigError(f'model.forward = "fused": {reason}; use "auto"')


def settings_obstacle(config: Config, device_type: str) -> str:
    """What in the settings speaks against the fused pass; empty: nothing."""
    settings, longest = config.model, config.longest_sequence_tokens
    obstacles = {
        f"the learner is on {device_type}, the fused pass is for CPUs": device_type != "cpu",
        f'model.precision is "{settings.precision}", the fused pass computes in float32': settings.precision
        != "float32",
        f'model.attention is "{settings.attention}"': settings.attention not in ("auto", "sdpa"),
        "model.gradient_checkpointing is on": settings.gradient_checkpointing,
        f"sequences of up to {longest} tokens, the fused pass is for {LONGEST}": longest > LONGEST,
    }
    return next((what for what, is_so in obstacles.items() if is_so), "")


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
