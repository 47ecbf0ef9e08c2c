"""What the weight files of a model say that its configuration does not, and refusals of what would be lost there.

Owned here: the safetensors files of a folder, read without loading the model; ties between embedding and head that the
files contradict; and numbers that are none, after loading. Not owned: loading (``policy``).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dapo_async.errors import ConfigError
from dapo_async.model.loading import reason_of

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS = 4096  # of two tensors that are compared at one time: bounds memory
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # number of a layer in a weight's name


def check_ties_of_files(path: str, model: PreTrainedModel) -> None:
    """Refuse a folder whose files hold two different tensors for weights that ``model``, made without them, ties.

    Reads those tensors only, and safetensors only. Raises ``ConfigError``.
    """
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not ties:
        return
    files = _files_of_tensors(path)
    for target, source in ties.items():
        names = [_name_in(files, name, model.base_model_prefix) for name in (target, source)]
        if all(names) and not _equal(path, files, *names):
            raise _contradiction(path, *names)


def check_ties(path: str, model: PreTrainedModel) -> None:
    """Refuse a loaded model whose tied weights are two: transformers unties what files contradict, workers do not.

    Raises ``ConfigError``.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            raise _contradiction(path, target, source)


def check_finite(path: str, model: PreTrainedModel) -> None:
    """Refuse weights that hold NaN or infinity. Raises ``ConfigError`` naming the first."""
    for name, weight in model.named_parameters():
        # Smallest and largest need no copy of the weight, and NaN is both.
        if weight.numel() and not all(bool(bound.isfinite()) for bound in torch.aminmax(weight.detach())):
            count = int((~weight.detach().isfinite()).sum())
            raise ConfigError(
                f'model.path = "{path}": weight {name} holds NaN or infinity ({count} of {weight.numel()} numbers); '
                "its files are damaged, or were saved by a training that had gone wrong"
            )


def check_layers(path: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Refuse files with more layers than ``model``: ``unexpected`` are weights that it has no place for.

    Other weights that a model does not use (a vision tower, a value head) are no mistake. Raises ``ConfigError``.
    """
    known = {LAYER.sub("*", name) for name, _ in model.named_parameters()}
    extra = sorted(name for name in unexpected if LAYER.search(name) and LAYER.sub("*", name) in known)
    if extra:
        raise ConfigError(
            f'model.path = "{path}": its files hold {len(extra)} weights of layers that config.json does not have, '
            f"{extra[0]} among them; set its number of layers right"
        )


def _contradiction(path: str, target: str, source: str) -> ConfigError:
    return ConfigError(
        f'model.path = "{path}": config.json says that {target} and {source} are one (tie_word_embeddings = true), but '
        "its files hold two that differ; set tie_word_embeddings to false there, or take the head out of the files"
    )


def _files_of_tensors(path: str) -> dict[str, Path]:
    """The file of each tensor in a folder's safetensors files; empty where there are none."""
    folder = Path(path)
    try:
        if (folder / ONE_FILE).is_file():
            with safe_open(folder / ONE_FILE, "pt") as file:
                return dict.fromkeys(file.keys(), folder / ONE_FILE)
        if (folder / INDEX).is_file():
            named: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    return {}


def _name_in(files: dict[str, Path], name: str, prefix: str) -> str:
    """What files call the weight ``name``: a decoder saved by itself leaves out its place in the causal LM."""
    return next((called for called in (name, name.removeprefix(f"{prefix}.")) if called in files), "")


def _equal(path: str, files: dict[str, Path], first: str, second: str) -> bool:
    try:
        with safe_open(files[first], "pt") as one, safe_open(files[second], "pt") as other:
            a: Any = one.get_slice(first)
            b: Any = other.get_slice(second)
            if a.get_shape() != b.get_shape():
                return False
            starts = range(0, a.get_shape()[0], ROWS)
            return all(torch.equal(a[row : row + ROWS].float(), b[row : row + ROWS].float()) for row in starts)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError(f'model.path = "{path}": its safetensors files cannot be read: {reason_of(error)}')
