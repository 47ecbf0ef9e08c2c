"""Checkpoints: complete or ignored, loadable with ``from_pretrained``, and exact to the bit when resumed.

    step_120/
        config.json, model.safetensors, tokenizer.json, ...    what transformers loads
        trainer/optimizer.safetensors                           its tensors, as "<parameter>/<key>"
        trainer/trainer.msgpack                                 hyper-parameters, random states, the caller's state
        manifest.json                                           size and SHA-256 of every other file, written last

Owns what is in a checkpoint and how model, optimizer and random states are restored; ``checkpoint_folder`` owns how
one appears, all or nothing. What the caller's ``state`` means is the caller's business. No pickle.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from dapo_async.config.toml import changed_settings
from dapo_async.errors import CheckpointError, SaveError
from dapo_async.observe.checkpoint_folder import (
    check_contents,
    fixed_digest,
    keep_newest,
    latest_checkpoint,
    publish,
    remove_leftovers,
    write_manifest,
)

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

OPTIMIZER = "trainer/optimizer.safetensors"
TRAINER = "trainer/trainer.msgpack"
VERSIONS = {"torch": str(torch.__version__), "transformers": transformers.__version__}


class RandomStates(msgspec.Struct, forbid_unknown_fields=True):
    """States of the generators that a trainer may draw from."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[bytes, int, int, float]  # MT19937: key, position, has_gauss, cached_gaussian
    torch: bytes
    cuda: list[bytes]  # one per device


class TrainerState(msgspec.Struct, forbid_unknown_fields=True):
    """``trainer.msgpack``."""

    param_groups: list[dict[str, Any]]  # the optimizer's, with parameter names
    random: RandomStates
    state: dict[str, Any]  # the caller's


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    fixed: Mapping[str, Any] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write ``folder/step_<step>`` and only then remove all but the newest ``keep_last`` complete checkpoints.

    ``state`` holds what msgpack can: None, bool, 64-bit int, float, str, bytes, list, dict with str keys. Weights keep
    their own precision. ``fixed`` are settings by name that a resume must not change. A complete checkpoint of the same
    step is replaced. Raises ``SaveError`` if the disk refuses; nothing of it is left then, and earlier checkpoints are
    as they were.
    """
    folder = Path(folder)
    target = folder / f"step_{step}"
    building = folder / f"{target.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        (building / "trainer").mkdir(parents=True)
        model.save_pretrained(building)
        with _TokenizersErrors():
            tokenizer.save_pretrained(building)
        tensors, groups = _optimizer_state(model, optimizer)
        safetensors.torch.save_file(tensors, building / OPTIMIZER)
        trainer = TrainerState(param_groups=groups, random=_random_states(), state=state)
        (building / TRAINER).write_bytes(msgspec.msgpack.encode(trainer))
        write_manifest(building, step, fixed or {}, VERSIONS)
        publish(building, target)
        keep_newest(folder, keep_last, target)
    except (OSError, SafetensorError) as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


class _TokenizersErrors(contextlib.AbstractContextManager[None]):
    """Makes an ``OSError`` of the bare ``Exception`` that the tokenizers library raises when the disk refuses.

    Of that very class only: what is derived from it is a bug, and stays one.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise OSError(str(error)) from error


def _refused(target: Path, error: Exception) -> SaveError:
    latest = latest_checkpoint(target.parent)
    intact = f"the latest one before it, {latest}, is intact" if latest else "there is no earlier one"
    return SaveError(f"{target}: the checkpoint could not be written: {error}; {intact}")


def load_checkpoint(
    path: str | Path,
    *,
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Restore ``model``, ``optimizer`` and the random states in place, and return the caller's ``state``.

    All contents are checked against the manifest before anything is changed. Lists come back as lists, tuples as
    lists. CUDA generators are restored on as many devices as both machines have. Raises ``CheckpointError`` if the
    checkpoint is missing, incomplete, damaged, of another configuration (``fixed`` given both times and unequal; those
    that differ are named), or of another model.
    """
    path = Path(path)
    manifest = check_contents(path)
    if fixed and manifest.config_digest and manifest.config_digest != fixed_digest(fixed):
        differing = changed_settings(manifest.fixed, fixed) or f"one of {', '.join(fixed)} differs"
        raise CheckpointError(
            f"{path}: belongs to a run with other settings ({differing}); resume it with its own, or start a new run "
            "without --resume"
        )
    trainer = msgspec.msgpack.decode((path / TRAINER).read_bytes(), type=TrainerState)
    weights = _read_weights(path, model)
    optimizer_state = _read_optimizer(path, trainer.param_groups, model, optimizer)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
    optimizer.load_state_dict(optimizer_state)
    _set_random_states(trainer.random)
    return trainer.state


# --- model and optimizer ---------------------------------------------------------------------------------


def _read_weights(path: Path, model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """The model's state as saved, by the names ``model`` uses. Through transformers, which knows tied weights,
    shards, and how names in the file differ from names in memory."""
    try:
        saved = type(model).from_pretrained(path, dtype=model.dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it as a {type(model).__name__}: {error}") from None
    weights, here = saved.state_dict(), model.state_dict()
    if weights.keys() != here.keys():
        differing = sorted(weights.keys() ^ here.keys())
        raise CheckpointError(f"{path}: belongs to another model: only one of the two has {', '.join(differing[:3])}")
    for name, tensor in here.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: belongs to another model: {name} has shape {list(weights[name].shape)} there "
                f"and {list(tensor.shape)} here"
            )
    return weights


def _parameter_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order in which ``Optimizer.state_dict`` numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(id(parameter) in names for parameter in parameters), "the optimizer holds parameters of another model"
    return [names[id(parameter)] for parameter in parameters]


def _optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors by "<parameter>/<key>", and the parameter groups with names in place of numbers."""
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()
    tensors = {
        f"{names[number]}/{key}": value.detach().cpu().contiguous()
        for number, entries in state["state"].items()
        for key, value in entries.items()
    }
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return tensors, groups


def _read_optimizer(
    path: Path, groups: list[dict[str, Any]], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The argument of ``Optimizer.load_state_dict``."""
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    saved_names = [name for group in groups for name in group["params"]]
    if saved_names != list(numbers):
        raise CheckpointError(f"{path}: its optimizer has other parameters or groups than this one")
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        state.setdefault(numbers[name], {})[entry] = tensor
    restored = []
    for group, here in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        # msgpack has no tuples; the optimizer's own values say which of the lists were some (betas).
        values = {k: tuple(v) if isinstance(here.get(k), tuple) else v for k, v in group.items()}
        restored.append({**values, "params": [numbers[name] for name in group["params"]]})
    return {"state": state, "param_groups": restored}


# --- random states ---------------------------------------------------------------------------------------


def _random_states() -> RandomStates:
    _, key, position, has_gauss, cached = np.random.get_state()
    return RandomStates(
        python=random.getstate(),
        numpy=(np.asarray(key, dtype="<u4").tobytes(), int(position), int(has_gauss), float(cached)),
        torch=torch.get_rng_state().numpy().tobytes(),
        cuda=[state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    )


def _set_random_states(states: RandomStates) -> None:
    random.setstate(states.python)
    key, position, has_gauss, cached = states.numpy
    np.random.set_state(("MT19937", np.frombuffer(key, dtype="<u4"), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(states.torch))
    for device, state in enumerate(states.cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes_tensor(state), device)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
