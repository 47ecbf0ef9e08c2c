"""Reading what transformers finds at ``model.path``, a folder or a hub id, with one sentence for what goes wrong.

Owned here: the form of a path, the errors of transformers that mean a wrong one, their sentence, and what in a
configuration no model can have. Not owned: what is done with a part once it is read.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dapo_async.data.hub_access import ask_hub
from dapo_async.errors import ConfigError

# What a wrong folder, an unreachable hub, an unknown architecture, a damaged file or a value that no code expected
# raises inside transformers, which computes with what a file says before it has looked at it.
LOADING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SafetensorError, StrictDataclassError,
)  # fmt: skip
SPEAKING = (OSError, SafetensorError, StrictDataclassError)  # their messages need no name of the error
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MAX_REASON = 300  # letters
# Of the text part of a configuration, where it has them: numbers of which a model has at least one.
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size",
)  # fmt: skip
# Files beside a configuration that does not mention it, by which older tools say that weights are quantised.
QUANTISED_FILES = ("quantize_config.json", "quant_config.json")


def load_architecture(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the model at ``path``.

    Raises ``ConfigError`` if there is none, its counts fit no model, or it says that the weights are quantised.
    """
    architecture: PreTrainedConfig = load_part(
        "model", path, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code
    )
    try:
        _check_counts(path, architecture.get_text_config())
    except LOADING_ERRORS as error:  # a configuration may refuse to tell one number for all layers
        raise ConfigError(f'model.path = "{path}": config.json: {reason_of(error)}') from None
    _check_full_precision(path, architecture)
    return architecture


def empty_model(path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM at ``path`` on the meta device: shapes and names, without numbers. Raises ``ConfigError``."""
    architecture = load_architecture(path, trust_remote_code=trust_remote_code)

    def build(_path: str, **options: Any) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, **options)
        return model

    with torch.device("meta"):
        model: PreTrainedModel = load_part("model", path, build, trust_remote_code=trust_remote_code)
    return model


def load_part(
    what: str, path: str, loader: Callable[..., Any], *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """``loader(path, **options)``, its errors turned into one sentence. Raises ``ConfigError``.

    Code that a folder or hub id brings runs only if ``trust_remote_code``; nobody is asked on the terminal.
    """
    place, folder = f'model.path = "{path}"', Path(path).is_dir()
    if folder and what == "model" and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{place} is not a model folder: it has no config.json")
    if not folder and not HUB_ID.fullmatch(path):
        raise ConfigError(f"{place}: no such folder, and not the form of a hub id (owner/name)")
    if not folder:
        ask_hub()
    try:
        return loader(path, trust_remote_code=trust_remote_code, **options)
    except StrictDataclassError as error:
        raise ConfigError(f"{place}: config.json: {reason_of(error)}") from None
    except LOADING_ERRORS as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"{place} brings Python code of its own for its {what}, which is not run unasked: read it, and set "
                "model.trust_remote_code = true if it may"
            ) from None
        kind = "holds no" if folder else "is neither a folder nor a hub id reachable from here with a"
        raise ConfigError(f"{place} {kind} {what} that transformers can load: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """What an error of another library says, in one line: its first, or all where the first is but a heading."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(" ".join(lines).split()) if lines[0].endswith(":") else lines[0]
    if not isinstance(error, SPEAKING):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."


def _check_counts(path: str, text: PreTrainedConfig) -> None:
    """Refuse numbers that transformers takes and then divides by, or makes empty or negative tensors of."""
    place = f'model.path = "{path}": config.json'
    for name in COUNTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count < 1:
            raise ConfigError(f"{place} says {name} = {count}: must be at least 1")
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ConfigError(
            f"{place} says num_attention_heads = {heads} and num_key_value_heads = {kv_heads}: the first must be a "
            "multiple of the second"
        )


def _check_full_precision(path: str, architecture: PreTrainedConfig) -> None:
    """Refuse quantised weights, in whatever way: they have no gradients, and no float32 master can be made of them."""
    told: Any = None
    for part in (architecture, architecture.get_text_config()):
        told = told or getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
    file = next((name for name in QUANTISED_FILES if (Path(path) / name).is_file()), "")
    if not told and not file:
        return
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    said = f"config.json has a quantization_config ({method or 'without a method'})" if told else f"there is a {file}"
    raise ConfigError(
        f'model.path = "{path}" holds quantised weights, which cannot be trained: {said}; name the model in full '
        "precision that it was made from"
    )
