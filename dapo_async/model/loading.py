"""Reading what transformers finds at ``model.path``, a folder or a hub id, with one sentence for what goes wrong.

Owned here: the form of a path, the errors of transformers that mean a wrong one, and their sentence. Not owned: what
is done with a part once it is read.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from dapo_async.data.hub_access import ask_hub
from dapo_async.errors import ConfigError

# What a wrong folder, an unreachable hub, an unknown architecture or a damaged file raises inside transformers.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_architecture(path: str) -> PreTrainedConfig:
    """The configuration of the model at ``path``. Raises ``ConfigError`` if there is none."""
    architecture: PreTrainedConfig = load_part("model", path, AutoConfig.from_pretrained)
    return architecture


def load_part(what: str, path: str, loader: Callable[..., Any], **options: Any) -> Any:
    """``loader(path, **options)``, its errors turned into one sentence. Raises ``ConfigError``."""
    place, folder = f'model.path = "{path}"', Path(path).is_dir()
    if folder and what == "model" and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{place} is not a model folder: it has no config.json")
    if not folder and not HUB_ID.fullmatch(path):
        raise ConfigError(f"{place}: no such folder, and not the form of a hub id (owner/name)")
    if not folder:
        ask_hub()
    try:
        return loader(path, **options)
    except LOADING_ERRORS as error:
        kind = "holds no" if folder else "is neither a folder nor a hub id reachable from here with a"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{place} {kind} {what} that transformers can load: {reason}") from None
