"""The policy: loading it, and its log-probs of a microbatch's completion tokens.

The only owner of ``accelerate`` (device, precision, optimizer). Knows no loss, schedule or wire. Every ``transformers``
causal LM works whose logits are its output embedding times its hidden states; others are refused when loaded.

Dimension key: T = completion tokens, b = sequences, L = longest, N = all positions, H = heads, D = hidden or head size.
"""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dapo_async.config import settings as config
from dapo_async.errors import ConfigError
from dapo_async.model.batching import MicroBatch, TrainSequence, build_microbatch
from dapo_async.model.forward_pass import ForwardPass
from dapo_async.model.loading import LOADING_ERRORS, load_architecture, load_part, reason_of
from dapo_async.model.weight_files import check_finite, check_layers, check_ties
from dapo_async.rl.logprobs import selected_logprobs

log = logging.getLogger(__name__)

PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def make_accelerator(model_cfg: config.Model) -> Accelerator:
    """The device and precision of the learner, in one process.

    Run forward passes under its ``autocast()``, and ``backward`` and ``clip_grad_norm_`` through it.
    Raises ``ConfigError`` for a device that is not there, or under a launcher that started several processes.
    """
    several = [name for name in PROCESS_COUNTS if os.environ.get(name, "1") != "1"]
    if several:
        raise ConfigError(
            f"{several[0]} = {os.environ[several[0]]}: the learner is one process; start it without a launcher"
        )
    if model_cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('model.device = "cuda", but PyTorch finds no CUDA device here; use "cpu" or "auto"')
    on_cpu = model_cfg.device == "cpu" or not torch.cuda.is_available()
    mixed = "bf16" if model_cfg.precision == "bfloat16" else "no"
    try:
        return Accelerator(cpu=on_cpu, mixed_precision=mixed)
    except ValueError as error:
        raise ConfigError(f'model.precision = "{model_cfg.precision}" cannot be used here: {error}') from None


def load_policy(model_cfg: config.Model, forward_pass: ForwardPass, device: torch.device) -> PreTrainedModel:
    """The causal LM at ``model_cfg.path`` on ``device``, with float32 weights and the attention of ``forward_pass``.

    Dropout is off in its configuration: behaviour and learner must share one distribution. Raises ``ConfigError``
    for what is no model, has weights that are missing, not finite or contradict the configuration, an architecture
    that transformers cannot load as a causal LM, an attention it does not support, or a head that is not one linear
    layer.
    """
    path = model_cfg.path
    disable_progress_bar()
    trusted = model_cfg.trust_remote_code
    settings = load_architecture(path, trust_remote_code=trusted)
    _disable_dropout(settings)
    options: dict[str, Any] = {
        "config": settings,
        "dtype": torch.float32,
        "attn_implementation": forward_pass.attention,
    }
    options |= {"output_loading_info": True, "trust_remote_code": trusted}
    model, report = load_part("model", path, AutoModelForCausalLM.from_pretrained, **options)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(f'model.path = "{path}": its files lack {len(missing)} weights, {missing[0]} among them')
    check_layers(path, model, report["unexpected_keys"])
    check_ties(path, model)
    model.to(device).get_input_embeddings().padding_idx = None  # a pad token may be an end too, and have to learn
    check_finite(path, model)
    check_policy(model, model_cfg, padded=forward_pass.layout != "packed")
    _make_savable(model)
    if model_cfg.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.gradient_checkpointing = true: {type(model).__name__} does not support it")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers checkpoints activations in training mode only; without dropout the modes are otherwise equal.
    return model.train(model_cfg.gradient_checkpointing)


def _make_savable(model: PreTrainedModel) -> None:
    """transformers loads generation settings that it then refuses to save, with the model's checkpoint around them.

    For example a temperature without ``do_sample``. Nothing here generates by them; the tokens are kept.
    """
    given = model.generation_config
    if given is None:
        return
    try:
        given.validate(strict=True)
    except ValueError as error:
        log.warning("generation settings that contradict each other are not saved with checkpoints: %s", error)
        tokens = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {name: value for name, value in tokens.items() if not (isinstance(value, int) and value < 0)}
        model.generation_config = GenerationConfig(**known)


def _disable_dropout(settings: PreTrainedConfig) -> None:
    for name, value in settings.to_dict().items():
        if isinstance(value, float) and re.search(r"dropout|pdrop", name):
            setattr(settings, name, 0.0)


def check_policy(model: PreTrainedModel, model_cfg: config.Model, *, padded: bool) -> None:
    """Refuse a model whose log-probs ``completion_logprobs`` would get wrong. Raises ``ConfigError``.

    Runs the model once with its last hidden states blown up, where a soft-capped or scaled head differs from
    the plain product with the output embedding no matter how small its weights are.
    """
    head = _linear_head(model, model_cfg.path)
    if not padded:
        _check_packing(model, model_cfg)
    plain: list[Tensor] = []

    def blow_up(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        scale = 300.0 / linear(hidden, head.weight, head.bias).abs().max().clamp(min=1e-30)
        output.last_hidden_state = hidden * scale
        plain.append(linear(output.last_hidden_state, head.weight, head.bias).float())
        return output

    place, name = f'model.path = "{model_cfg.path}"', type(model).__name__
    try:
        with torch.autocast(head.weight.device.type, torch.bfloat16, model_cfg.precision == "bfloat16"):
            logits = _probe(model, blow_up, padded=padded).float()
    except LOADING_ERRORS as error:
        raise ConfigError(f"{place}: {name} cannot be run on three tokens: {reason_of(error)}") from None
    if not plain:
        raise _around_base_model(model, model_cfg.path)
    same_shape = logits.shape == plain[0].shape
    if not same_shape or not torch.allclose(logits, plain[0], rtol=0.0, atol=0.02 * float(plain[0].abs().max())):
        raise ConfigError(
            f"{place}: the logits of {name} are not its output embedding times its hidden states (soft-capped or "
            "scaled); such models are not supported"
        )


def check_architecture(model: PreTrainedModel, path: str) -> None:
    """What of ``check_policy`` can be told without numbers, of a model on the meta device. Raises ``ConfigError``."""
    _linear_head(model, path)
    called: list[nn.Module] = []
    try:
        _probe(model, lambda module, *_: called.append(module), padded=True)
    except LOADING_ERRORS as error:
        # Not every model runs without numbers (experts are chosen by them): loading it will tell.
        log.debug("%s does not run on the meta device: %s", type(model).__name__, reason_of(error))
        return
    if not called:
        raise _around_base_model(model, path)


def _linear_head(model: PreTrainedModel, path: str) -> nn.Linear:
    head = model.get_output_embeddings()
    if model.base_model is model or not isinstance(head, nn.Linear):
        name = type(model).__name__
        raise ConfigError(f'model.path = "{path}": {name} has no decoder with one linear output layer')
    return head


def _around_base_model(model: PreTrainedModel, path: str) -> ConfigError:
    return ConfigError(
        f'model.path = "{path}": {type(model).__name__} computes its logits around its base_model, so that its hidden '
        "states cannot be had; such models are not supported"
    )


def _probe(model: PreTrainedModel, hook: Callable[..., Any], *, padded: bool) -> Tensor:
    """Logits of three tokens, with ``hook`` on the forward pass of the model's decoder."""
    probe = TrainSequence(np.arange(3), np.arange(1), np.zeros(1), advantage=0.0, group=0)
    microbatch = build_microbatch([probe], [0], padded=padded, device=model.get_output_embeddings().weight.device)
    handle = model.base_model.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: Tensor = model(**_forward_arguments(microbatch)).logits
    finally:
        handle.remove()
    return logits


def _check_packing(model: PreTrainedModel, model_cfg: config.Model) -> None:
    heads = model.config.get_text_config()
    size = getattr(heads, "head_dim", None) or heads.hidden_size // heads.num_attention_heads
    if not model._supports_attention_backend or size % 8 or size > 256:
        raise ConfigError(
            f'model.path = "{model_cfg.path}": {type(model).__name__} with heads of {size} cannot use variable-length '
            'attention; set model.attention = "sdpa"'
        )


def completion_logprobs(
    model: PreTrainedModel,
    microbatch: MicroBatch,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = True,
    forward: Callable[[MicroBatch], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the microbatch's completion tokens and, if asked for, entropies at their positions.

    Both are [T], float32, nats, of logits / ``temperature``; see ``logprobs.selected_logprobs``. Call it under
    ``Accelerator.autocast()``. Hidden states that predict no completion token never meet the output embedding.
    ``forward`` gives those of the microbatch's flat rows [N, D] in the place of the module's own forward pass.
    """
    if forward is None:
        hidden_ND = model.base_model(**_forward_arguments(microbatch)).last_hidden_state.flatten(0, 1)
    else:
        hidden_ND = forward(microbatch)
    hidden_TD = hidden_ND.index_select(0, microbatch.predict_T)
    head = model.get_output_embeddings()
    return selected_logprobs(
        hidden_TD, head.weight, microbatch.target_T, bias_V=head.bias,
        temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy,
    )  # fmt: skip


def _forward_arguments(microbatch: MicroBatch) -> dict[str, Any]:
    """The microbatch in transformers' words; attention functions get the packed layout through them."""
    arguments: dict[str, Any] = {"input_ids": microbatch.input_ids, "use_cache": False}
    if microbatch.cu_seqlens is None:
        return arguments
    edges, longest = microbatch.cu_seqlens, microbatch.max_length
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
    return arguments | packed | {"position_ids": microbatch.position_ids}


def make_optimizer(model: nn.Module, settings: config.Optimizer, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW over all trainable weights, prepared by ``accelerator``.

    Weight decay covers norms and biases too, as in DAPO's published recipe, whose trainer knows no groups.
    """
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return accelerator.prepare_optimizer(optimizer, device_placement=False)
