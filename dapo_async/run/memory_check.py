"""Whether a run fits into memory: reads the model's sizes and the machine's memory, and adds up what shares a place.

Owned here: which process computes on which device, the lines that ``dapo-async check`` prints, and the refusal. Not
owned: the formulas (``memory``). Needs the model's configuration only, no weights.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from dapo_async.config.settings import Config
from dapo_async.demo.demo import make_model, make_tokenizer
from dapo_async.errors import ConfigError
from dapo_async.model.forward_pass import ForwardPass, Hardware, hardware_of, resolve_forward_pass
from dapo_async.model.kv_cache import kv_shape
from dapo_async.model.loading import empty_model
from dapo_async.run import memory
from dapo_async.run.memory import GIB, Item, ModelShape
from dapo_async.system.placement import describe, place_workers, wanted_gpus

LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a Linux container: bytes, or "max"
HOST = "this machine"
NAMED_ITEMS = 3  # largest parts that a refusal names


class Machine(NamedTuple):
    """Where a run would be. Sizes in bytes; 0: unknown, not judged."""

    gpus: Sequence[int]
    host: int
    gpu: Hardware = Hardware("cuda", packs=True)  # what a GPU of it can do, if it has one


class Demand(NamedTuple):
    """What one process needs in one place."""

    who: str
    place: str
    items: Sequence[Item]
    copies: int = 1  # processes like it

    @property
    def num_bytes(self) -> int:
        """Of all copies."""
        return self.copies * sum(item.num_bytes for item in self.items)


class Estimate(NamedTuple):
    """What ``check`` prints, and why it refuses (empty: it does not)."""

    lines: list[str]
    refusal: str


def this_machine() -> Machine:
    """Total memory of every visible GPU and of the machine, or what its container allows of that."""
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    host = host_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Machine(gpus, host, hardware_of(torch.device("cuda"))) if gpus else Machine(gpus, host)


def host_bytes(physical: int, limit: Path = LIMIT) -> int:
    """Bytes that this process and its children may use of the ``physical`` ones."""
    try:
        allowed = limit.read_text(encoding="ascii").strip()
        return physical if allowed == "max" else min(physical, int(allowed))
    except (OSError, ValueError):  # no such system, or one that says it in another way
        return physical


def described_machine(config: Config, gpu_gib: float) -> Machine:
    """As many GPUs of ``gpu_gib`` as the configuration asks for; its other memory is not judged.

    They have the kernels of today's, and flash-attn where the configuration asks for it by name.
    """
    gpu = Hardware("cuda", packs=True, flash_attn=config.model.attention == "flash")
    return Machine([int(gpu_gib * GIB)] * wanted_gpus(config), 0, gpu)


def check_memory(config: Config) -> None:
    """Refuse a run that this machine cannot hold, as ``dapo-async check`` does. Raises ``ConfigError``."""
    refusal = estimate_memory(config, this_machine()).refusal
    if refusal:
        raise ConfigError(refusal)


def estimate_memory(config: Config, machine: Machine) -> Estimate:
    """See the module. Raises ``ConfigError`` if ``model.path`` has no configuration of a causal LM.

    Also if the settings choose an attention or a forward pass that cannot be computed there.
    """
    model = _meta_model(config)
    shape = _shape_of(model, config.model.path)
    hardware = machine.gpu if machine.gpus and config.model.device != "cpu" else Hardware("cpu")
    forward_pass = resolve_forward_pass(config, hardware, model.config)
    demands = _demands(shape, forward_pass, config, machine)
    lines = [f"# memory, estimated: a model of {shape.num_parameters:,} parameters"]
    lines += [_line(demand) for demand in demands]
    if places := place_workers(config, len(machine.gpus), learner=True):
        lines.append(describe(places, config))
    capacities = {f"GPU {index}": size for index, size in enumerate(machine.gpus)} | {HOST: machine.host}
    if machine.gpus and not machine.host:  # described: workers elsewhere have the same GPUs
        capacities["its own GPU"] = machine.gpus[0]
    refusals = [_too_large(shape, config), _small_share(shape, config, machine)]
    for place, capacity in capacities.items():
        there = [demand for demand in demands if demand.place == place]
        total = sum(demand.num_bytes for demand in there)
        if there and capacity:
            lines.append(f"# memory of {place}: {human(total)} needed, {human(capacity)} there")
            refusals.append(_refusal(place, capacity, there) if total > capacity else "")
    return Estimate(lines, next(filter(None, refusals), ""))


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Sizes of ``model``; its tensors need no memory behind them."""
    parameters = [parameter.numel() for parameter in model.parameters()]  # tied ones come once
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return ModelShape(
        num_parameters=sum(parameters),
        linear_parameters=sum(linear),
        largest_tensor=max(parameters),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=text.num_attention_heads,
        head_norms=any(name.endswith(".q_norm.weight") for name, _ in model.named_parameters()),
        kv=kv_shape(text),
    )


def human(num_bytes: int) -> str:
    """In GiB, small ones in MiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.0f} MiB"


def _meta_model(config: Config) -> PreTrainedModel:
    """The configuration's model, or the one its demo would make, without memory for its weights."""
    if config.demo.task:
        with torch.device("meta"):
            return make_model(make_tokenizer(), config.demo)
    return empty_model(config.model.path, trust_remote_code=config.model.trust_remote_code)


def _shape_of(model: PreTrainedModel, path: str) -> ModelShape:
    """As ``shape_of``. Raises ``ConfigError`` for what is no decoder with attention."""
    try:
        return shape_of(model)
    except AttributeError as error:
        raise ConfigError(
            f'model.path = "{path}": {type(model).__name__} has no {error.name}, which a decoder with attention has'
        ) from None


def _demands(shape: ModelShape, forward_pass: ForwardPass, config: Config, machine: Machine) -> list[Demand]:
    """One entry per process and place; all workers of this machine as one."""
    learner_cuda = forward_pass.device_type == "cuda"
    worker_cuda = bool(machine.gpus) and config.workers.device != "cpu"
    gpu_bytes = machine.gpus[0] if machine.gpus else 0
    here = config.workers.count
    learner = memory.learner_device(shape, config, forward_pass)
    learner_host = memory.learner_host(shape, config, cuda=learner_cuda)
    worker = memory.worker_device(shape, config, cuda=worker_cuda, gpu_bytes=gpu_bytes)
    worker_host = memory.worker_host(shape, config)
    demands = [Demand("learner", "GPU 0", learner), Demand("learner", HOST, learner_host)]
    if not learner_cuda:
        demands = [Demand("learner", HOST, [*learner, *learner_host])]
    if not here:
        apart = [Demand("a worker", "its own GPU", worker), Demand("a worker", "its own machine", worker_host)]
        return demands + (apart if worker_cuda else [Demand("a worker", "its own machine", [*worker, *worker_host])])
    if not worker_cuda:
        return [*demands, Demand(_workers(here), HOST, [*worker, *worker_host], here)]
    on = Counter(gpu for place in place_workers(config, len(machine.gpus), learner=True) for gpu in place)
    demands += [Demand(_workers(count), f"GPU {gpu}", worker, count) for gpu, count in sorted(on.items())]
    return [*demands, Demand(_workers(here), HOST, worker_host, here)]


def _workers(count: int) -> str:
    return "worker" if count == 1 else f"{count} workers"


def _line(demand: Demand) -> str:
    each = " each" if demand.copies > 1 else ""
    total = demand.num_bytes // demand.copies
    parts = sorted((item for item in demand.items if item.num_bytes * 100 >= total), key=lambda item: -item.num_bytes)
    text = ", ".join(f"{item.what} {human(item.num_bytes)}" for item in parts)
    return f"# memory of {demand.who} on {demand.place}: {human(total)}{each}: {text}"


def _refusal(place: str, capacity: int, demands: Sequence[Demand]) -> str:
    """One sentence: how much is missing, the largest parts, and the setting that gives most."""
    parts = [
        (demand.copies * item.num_bytes, f"{demand.who}: {item.what}", item.advice)
        for demand in demands
        for item in demand.items
    ]
    parts.sort(reverse=True)
    total = sum(size for size, _, _ in parts)
    largest = ", ".join(f"{what} {human(size)}" for size, what, _ in parts[:NAMED_ITEMS])
    fixed = sum(size for size, _, advice in parts if not advice)
    advice = next((advice for _, _, advice in parts if advice), "")
    if fixed > capacity:
        advice = f"no setting lowers {human(fixed)} of that and the learner is one process: take a smaller model"
    if any(demand.copies > 1 for demand in demands):
        advice = f"lower workers.count, or {advice}"
    return f"{place} has {human(capacity)}, but this run needs about {human(total)} there: {largest}; {advice}"


def _too_large(shape: ModelShape, config: Config) -> str:
    """Refuses a tensor that the wire would not carry, which the run would find out only after loading the model."""
    limit, size = config.network.max_message_mb << 20, memory.serving_itemsize(config) * shape.largest_tensor
    if size <= limit:
        return ""
    return (
        f"network.max_message_mb = {config.network.max_message_mb} is too small for the weights: "
        f"the largest tensor has {-(-size >> 20)} MiB"
    )


def _small_share(shape: ModelShape, config: Config, machine: Machine) -> str:
    """Refuses a share of the GPU in which vLLM cannot hold its weights and one longest sequence."""
    if config.workers.engine != "vllm" or not machine.gpus or config.workers.device == "cpu":
        return ""
    weights, sequence = memory.vllm_weights_bytes(shape, config), memory.vllm_sequence_bytes(shape, config)
    setting, room = "vllm.kv_cache_gib", int(config.vllm.kv_cache_gib * GIB)
    if not room:
        setting = "vllm.gpu_memory_utilization"
        room = int(config.vllm.gpu_memory_utilization * machine.gpus[0]) - weights
    if room >= sequence:
        return ""
    return (
        f"{setting} leaves {human(max(0, room))} for vLLM's KV cache beside weights of {human(weights)}, but one "
        f"sequence of {config.longest_sequence_tokens} tokens needs {human(sequence)}: raise it"
    )
