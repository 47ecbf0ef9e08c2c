"""Inside vLLM's own process: new weights are loaded, and what then serves is compared with what was published.

vLLM fuses tensors (q, k and v into one), pads the vocabulary, and on CPU packs matrices for its kernels. So each layer
is checked twice: its loaded tensors bit for bit, before they are packed; and, where packing hides them, its product
with a probe against the published matrix. ``engine`` names this module to vLLM, which imports it in its workers
and calls it through its weight-transfer API. The processes of a parallel engine compare the parts that they hold
(``vllm_shards``), and together look for every tensor. Those of experts are checked by the digest of what arrived only.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from dapo_async.errors import WeightsError
from workers.parent import follow_parent
from workers.serving_weights import digests
from workers.vllm.engine import BACKEND
from workers.vllm.shards import shard

PROBES = 4  # rows of the probe
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of a product, relative to its largest


class Extension:
    """Named as vLLM's worker extension, so that its workers import this module."""


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One whole set of weights."""

    path: str = ""  # safetensors, under the names of the model's checkpoint
    digests: dict[str, str] = field(default_factory=dict)  # by name; see ``serving_weights.digests``


class FileTransfer(WeightTransferEngine[NoInit, FileUpdate]):
    """vLLM's weight transfer from a file on this machine, verified."""

    init_info_cls, update_info_cls = NoInit, FileUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """See vLLM. Until the update is finished, every layer is compared just before it is packed."""
        initialize_layerwise_reload(self.model)
        self._names = {id(layer): name for name, layer in self.model.named_modules()}
        self._found: set[str] = set()  # published tensors found in the model, bit for bit
        self._faults: list[str] = []
        self._turned: set[str] = set()  # vLLM's tensors that are the published ones transposed (GPT-2)
        methods = [getattr(layer, "quant_method", None) for layer in self.model.modules()]
        self._methods: list[Any] = list({id(method): method for method in methods if method is not None}.values())
        for method in self._methods:
            method.process_weights_after_loading = self._compared_first(method.process_weights_after_loading)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's own, without its ``torch.accelerator.synchronize``, which fails where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load the file; its tensors stay at hand until ``finish_weight_update`` has compared them."""
        with safe_open(update_info.path, "pt") as file:
            self._published = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        found = digests(self._published)
        for name, expected in update_info.digests.items():
            if found.get(name) != expected:
                raise WeightsError(f"{name} did not arrive as it was published")
        self.model.load_weights(iter(self._published.items()))

    def finish_weight_update(self) -> None:
        """Pack what is not packed yet, and compare what serves. Raises ``WeightsError`` if it is anything else."""
        finalize_layerwise_reload(self.model, self.model_config)
        for method in self._methods:
            del method.process_weights_after_loading  # the class's own again
        repack_tied_head(self.model)
        self.compare_all()
        self._published = {}

    def compare_all(self) -> None:
        """Every published tensor must be in the model, and what multiplies must be it. Raises ``WeightsError``.

        In a parallel engine each process compares what it holds, and a tensor must be somewhere in one of them.
        """
        for name, layer in self.model.named_modules():
            self._compare(name, layer)
            self._probe(name, layer)
        unseen = self._unseen()  # all processes take part, whatever they have found
        if self._faults:
            raise WeightsError(self._faults[0])
        if unseen:
            raise WeightsError(f"{unseen[0]} was published and is nowhere in vLLM's model")

    def _unseen(self) -> list[str]:
        """Published tensors that no process of this engine holds; those of experts are not looked for."""
        names = sorted(self._published)
        seen = torch.tensor([name in self._found or ".experts." in name for name in names], dtype=torch.int32)
        if self.parallel_config.world_size > 1:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX, get_world_group().cpu_group)
        return [name for name, held in zip(names, seen.tolist(), strict=True) if not held]

    def _compared_first(self, process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def compare_and_process(layer: nn.Module) -> None:
            self._compare(self._names[id(layer)], layer)
            process(layer)

        return compare_and_process

    def _compare(self, name: str, layer: nn.Module) -> None:
        """Every tensor of ``layer`` that is not packed away must hold the published bits, or its part of them."""
        for own, parameter in layer.named_parameters(recurse=False):
            full, sources = f"{name}.{own}", self._sources(f"{name}.{own}")
            if not sources or not parameter.numel():
                continue
            self._found.update(sources)
            if _equal(parameter, self._expected(layer, own, sources)):
                continue
            if parameter.dim() == 2 and _equal(parameter, self._expected(layer, own, sources, turned=True)):
                self._turned.add(full)
            else:
                self._fault(
                    f"{full} in vLLM is not what was published: it was damaged, or vLLM lays out this kind of model "
                    "in a way that is not known here"
                )

    def _probe(self, name: str, layer: nn.Module) -> None:
        """A packed matrix must still multiply like the published one, or its part of it."""
        full, sources = f"{name}.weight", self._sources(f"{name}.weight")
        if not hasattr(layer, "cpu_linear") or not sources:
            return
        matrix = self._expected(layer, "weight", sources, turned=full in self._turned)
        if matrix is None:
            return  # ``_compare`` has told
        matrix = matrix.to(self.model_config.dtype).contiguous()
        probe = torch.randn(PROBES, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix.dtype)
        expected = torch.nn.functional.linear(probe, matrix).float()
        multiply: Any = layer.cpu_linear
        product = multiply(probe, layer.weight, None)[:, : len(matrix)].float()
        allowed = TOLERANCE[matrix.dtype] * float(expected.abs().max())
        if product.shape != expected.shape or not bool(((product - expected).abs() <= allowed).all()):
            self._fault(f"{name} in vLLM does not multiply like what was published")

    def _fault(self, told: str) -> None:
        """Raised by ``compare_all``, once the other processes of a parallel engine need this one no more."""
        config = self.parallel_config
        self._faults.append(told if config.world_size == 1 else f"process {config.rank} of {config.world_size}: {told}")

    def _expected(self, layer: nn.Module, own: str, sources: list[str], *, turned: bool = False) -> Tensor | None:
        """What ``layer.<own>`` must hold, from matrices kept turned if so; None if they are not of its size."""
        tensors = [self._published[source] for source in sources]
        try:
            return shard(layer, own, [tensor.T for tensor in tensors] if turned else tensors)
        except ValueError:
            return None

    def _sources(self, name: str) -> list[str]:
        """Published tensors that vLLM's tensor ``name`` is made of, in order; none if it has no published source."""
        if name in self._published:
            return [name]
        if name == "lm_head.weight":  # tied
            return [other for other in self._published if other.endswith("embed_tokens.weight")]
        for fused, parts in getattr(self.model, "packed_modules_mapping", {}).items():
            sources = [name.replace(f".{fused}.", f".{part}.") for part in parts]
            if f".{fused}." in name and all(source in self._published for source in sources):
                return sources
        return []


def _equal(parameter: Tensor, expected: Tensor | None) -> bool:
    """Bit for bit; a vocabulary is padded with rows that no token has."""
    if expected is None or parameter.shape[1:] != expected.shape[1:]:
        return False
    return torch.equal(parameter[: len(expected)], expected.to(parameter))


def repack_tied_head(model: nn.Module) -> None:
    """Pack a tied output layer again: vLLM 0.32 reloads it through the embedding, and its packed copy stays old."""
    head: Any = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)


parent = multiprocessing.parent_process()
if parent is not None and parent.pid is not None:
    follow_parent(parent.pid)  # also where the worker's program was not the first to be imported
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)
