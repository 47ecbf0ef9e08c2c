"""Putting a new set of weights into a module in service, all or nothing. Owned here: the check of names, shapes,
types and values, done before the first byte is written. Not owned: how weights travel.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dapo_async.errors import WeightsError
from dapo_async.weight_sync.encoding import tensor_digest

DIGEST_THREADS = 4


def tensors_of(module: nn.Module) -> dict[str, list[str]]:
    """Names of every parameter and persistent buffer, grouped by the tensor they share (tied weights)."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in groups.values()}


def check_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit ``module`` exactly.

    Every parameter is needed once, under any of its tied names; persistent buffers may be left out. Raises
    ``WeightsError`` naming the tensor: missing, unknown, of another shape or dtype, not finite, or tied but unequal.
    """
    groups, own = tensors_of(module), module.state_dict()
    parameters = {name for name, _ in module.named_parameters()}
    if unknown := sorted(set(tensors) - set(own)):
        raise WeightsError(f"the model has no tensor {_some(unknown)}")
    missing = [first for first, names in groups.items() if first in parameters and not any(n in tensors for n in names)]
    if missing:
        raise WeightsError(f"the weights lack {_some(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise WeightsError(
                f"{name} must be {own[name].dtype} {list(own[name].shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{name} holds values that are not finite")
    for names in groups.values():
        given = [name for name in names if name in tensors]
        if any(not torch.equal(tensors[given[0]], tensors[name]) for name in given[1:]):
            raise WeightsError(f"{_some(given)} are one tied tensor in the model, but differ in the weights")


@torch.no_grad()
def put_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into ``module`` in place, after ``check_weights`` has accepted them all."""
    check_weights(module, tensors)
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def write_weights(path: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file for another process. Returns the tensors' digests."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return digests(tensors)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``tensor_digest`` of each tensor; in parallel, as hashing leaves the interpreter free."""
    with ThreadPoolExecutor(DIGEST_THREADS, "weights digest") as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
