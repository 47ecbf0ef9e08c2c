"""What a run needs in memory, from the sizes of its model and its settings: arithmetic only.

Owned here: every formula of the estimate that ``dapo-async check`` prints, itemised. Not owned: reading the model's
sizes and the machine's memory (``memory_check``). The formulas count what PyTorch keeps alive at the peak of a
training step; they were read off the code of the Llama family (Llama, Qwen2, Qwen3) and other architectures are
estimated as if they belonged to it. Not counted: fragmentation of the allocator, kernels' work space, the prompts.
``docs/log.md`` compares the estimate with measurements.

P = parameters, N = tokens of a microbatch, C = tokens of a logits chunk, V = vocabulary, D = hidden size, F = size
inside the MLP, Q = query heads x head size, K = KV heads x head size, H = query heads, L = longest sequence.
"""

from typing import NamedTuple

from dapo_async.config.settings import Config
from dapo_async.model.forward_pass import ForwardPass
from dapo_async.model.kv_cache import PREFILL_TOKENS, READ_AHEAD, KvShape, slot_cache_bytes, vllm_cpu_bytes
from dapo_async.model.prompt_sharing import MOST_PLACES

GIB = 1 << 30
FLOAT32, BFLOAT16 = 4, 2  # bytes of a number
# Resident memory of a process before it has a model (Python, PyTorch, transformers): 375 MiB measured, and room for
# kernels loaded at first use and malloc's idle blocks.
PROCESS_BYTES = 500 << 20
# Measured on CPU: two processes of 601 and 1,077 MiB, of which 256 MiB are KV cache, with a model of 0.6 M parameters.
VLLM_PROCESS_BYTES = 1420 << 20
# Not measured: what a CUDA context and its libraries take on the device.
CUDA_CONTEXT_BYTES = 600 << 20


class Item(NamedTuple):
    """One part of a process's memory."""

    what: str
    num_bytes: int
    advice: str = ""  # what makes it smaller; empty: only another model does


class ModelShape(NamedTuple):
    """The sizes of a model that its memory depends on."""

    num_parameters: int  # P; tied embeddings once
    linear_parameters: int  # of the linear layers below the output layer
    largest_tensor: int  # numbers in it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    head_norms: bool  # Qwen3 normalises queries and keys
    kv: KvShape

    @property
    def query_size(self) -> int:
        """Q."""
        return self.heads * self.kv.head_dim

    @property
    def kv_size(self) -> int:
        """K."""
        return self.kv.kv_heads * self.kv.head_dim


def serving_itemsize(config: Config) -> int:
    """Bytes of a number in the precision that workers serve."""
    return FLOAT32 if config.serving_dtype == "float32" else BFLOAT16


# --- the learner -----------------------------------------------------------------------------------------


def learner_device(shape: ModelShape, config: Config, forward_pass: ForwardPass) -> list[Item]:
    """The learner at the peak of a training step, on the device where it computes.

    Weights, gradients and two AdamW moments are float32: 4, 4 and 8 bytes x P; a KL penalty's reference model 4 x P.
    Gradients stand beside activations because every microbatch after the first adds to them. bfloat16 is autocast:
    a copy of every linear layer, 2 bytes x its parameters. The output layer: 4 x V x D for its gradient, one product
    of that size, and in bfloat16 a copy of its weight.
    """
    parameters, bf16 = shape.num_parameters, config.model.precision == "bfloat16"
    compute = BFLOAT16 if bf16 else FLOAT32
    head = shape.vocab_size * shape.hidden_size
    tokens = microbatch_tokens(config)
    chunk = min(config.learner.logprob_chunk_tokens, tokens)
    cheaper = "set model.gradient_checkpointing = true"
    if forward_pass.fused:  # it keeps more than the module's pass
        cheaper = f'set model.forward = "module", or {cheaper.removeprefix("set ")}'
    fewer_tokens = "lower learner.microbatch_tokens (and what bounds it below: the longest sequence)"
    items = [
        Item("weights", FLOAT32 * parameters),
        Item("gradients", FLOAT32 * parameters),
        Item("AdamW moments", 2 * FLOAT32 * parameters),
        Item("reference model", FLOAT32 * parameters * bool(config.objective.kl_coef), "set objective.kl_coef = 0"),
        Item("bfloat16 copies of weights", BFLOAT16 * shape.linear_parameters * bf16),
        Item(
            f"activations of {tokens} tokens",
            tokens * activation_token_bytes(shape, config, forward_pass),
            fewer_tokens if config.model.gradient_checkpointing else cheaper,
        ),
        Item("one layer's gradients", _layer_gradient_bytes(shape, tokens, compute), fewer_tokens),
        Item("gradient of the output layer", (FLOAT32 + compute + BFLOAT16 * bf16) * head),
        Item(
            f"logits of {chunk} tokens",
            chunk * logits_token_bytes(shape, config),
            "lower learner.logprob_chunk_tokens",
        ),
        Item("CUDA context", CUDA_CONTEXT_BYTES * (forward_pass.device_type == "cuda")),
    ]
    return [item for item in items if item.num_bytes]


def learner_host(shape: ModelShape, config: Config, *, cuda: bool) -> list[Item]:
    """The learner in the machine's memory, beyond ``learner_device`` where that is the same memory.

    Two sets of serving weights: one that workers fetch while the next is copied. They may be shared with workers of
    this machine. Not counted: a third one while a worker is late, and deltas (see ``publisher``). On CUDA also a
    checkpoint on its way: resuming reads weights and moments whole, 12 bytes x P (saving copies only 8).
    """
    items = [
        Item("process", PROCESS_BYTES),
        Item("two sets of published weights", 2 * serving_itemsize(config) * shape.num_parameters),
        Item("a checkpoint on its way", 3 * FLOAT32 * shape.num_parameters * cuda),
    ]
    return [item for item in items if item.num_bytes]


def microbatch_tokens(config: Config) -> int:
    """N: tokens of the largest forward pass, padding included: the budget, or all of a small minibatch."""
    groups = config.schedule.groups_per_batch // config.learner.minibatches
    whole = groups * config.sampling.group_size * config.longest_sequence_tokens
    return min(config.learner.microbatch_tokens, whole)


def activation_token_bytes(shape: ModelShape, config: Config, forward_pass: ForwardPass) -> int:
    """What autograd keeps for one token of a microbatch, in bytes, over all layers.

    With gradient checkpointing the input of each layer, 4 x D, and all of one layer, which is computed again.
    Above the layers: the last norm, the rows that predict tokens, and their gradient, 5 x 4 x D. Beside them, in the
    fused forward pass: indices of rows and places for every head, and the angles.
    """
    if forward_pass.fused:
        indices = 8 * (shape.heads + shape.kv.kv_heads) * (MOST_PLACES + 2) + 2 * FLOAT32 * shape.query_size
        return int(indices) + fused_token_bytes(shape, config) * shape.kv.layers + 5 * FLOAT32 * shape.hidden_size
    layer = layer_token_bytes(shape, config, forward_pass)
    if config.model.gradient_checkpointing:
        layers = FLOAT32 * shape.hidden_size * shape.kv.layers + layer
    else:
        layers = layer * shape.kv.layers
    return layers + 5 * FLOAT32 * shape.hidden_size


def layer_token_bytes(shape: ModelShape, config: Config, forward_pass: ForwardPass) -> int:
    """What autograd keeps of one token in one layer, in bytes; c = 2 in bfloat16, else 4.

    norms            4 x 4 D                 input and normalised input of both, float32 always
    linear inputs    2 x 4 D                 in float32: one for query, key and value, one for gate and up
                     5 x 2 D                 in bfloat16: autocast makes a copy for each of the five
    query, key norm  (4 + c) (Q + K)         Qwen3
    attention        c (Q + 2 K) + c Q + 4 H operands, output, log-sum; eager, and float32 on CUDA: c 3 Q operands
    scores           (4 + c) H L or 4 H L    eager, and float32 on CUDA, where grouped heads have no fused kernel
    MLP              4 c F                   gate, its activation, up, their product
    """
    bf16 = config.model.precision == "bfloat16"
    compute = BFLOAT16 if bf16 else FLOAT32
    hidden, query, key = shape.hidden_size, shape.query_size, shape.kv_size
    attention, cuda = forward_pass.attention, forward_pass.device_type == "cuda"
    plain = attention == "eager" or (attention == "sdpa" and cuda and not bf16)
    total = 4 * FLOAT32 * hidden + (5 * BFLOAT16 if bf16 else 2 * FLOAT32) * hidden
    total += (FLOAT32 + compute) * (query + key) * shape.head_norms
    total += compute * (3 * query if plain else query + 2 * key) + compute * query + FLOAT32 * shape.heads
    total += (FLOAT32 + BFLOAT16 * bf16) * shape.heads * config.longest_sequence_tokens * plain
    return total + 4 * compute * shape.intermediate_size


def fused_token_bytes(shape: ModelShape, config: Config) -> int:
    """What one token keeps in one layer of the fused forward pass (``fused_forward``), in bytes, always float32.

    norms            4 x 4 D                 normalised input of both, before and after their weights
    query, key norm  4 (Q + K)               Qwen3
    attention        4 Q + 2 (4 Q + 8 K + 4 H L)   output; operands and weights at up to ``MOST_PLACES`` places
    MLP              4 x 4 F                 gate, its activation, up, their product
    """
    hidden, query, key = shape.hidden_size, shape.query_size, shape.kv_size
    place = query + 2 * key + shape.heads * config.longest_sequence_tokens
    numbers = 4 * hidden + (query + key) * shape.head_norms + query + MOST_PLACES * place + 4 * shape.intermediate_size
    return int(FLOAT32 * numbers)


def logits_token_bytes(shape: ModelShape, config: Config) -> int:
    """What one token of a logits chunk needs at the peak of ``logprobs``, in bytes.

    Two float32 tensors over the vocabulary, a third for the gradient of an entropy bonus, a bfloat16 copy of the
    gradient.
    """
    numbers = 2 * FLOAT32 + FLOAT32 * bool(config.objective.entropy_coef)
    return shape.vocab_size * (numbers + BFLOAT16 * (config.model.precision == "bfloat16"))


def _layer_gradient_bytes(shape: ModelShape, tokens: int, compute: int) -> int:
    """Three MLP-wide and four hidden-wide gradients of a layer, and the largest weight's before it is added."""
    of_tokens = 3 * compute * shape.intermediate_size + 4 * FLOAT32 * shape.hidden_size
    return tokens * of_tokens + FLOAT32 * shape.hidden_size * shape.intermediate_size


# --- a worker --------------------------------------------------------------------------------------------


def worker_device(shape: ModelShape, config: Config, *, cuda: bool, gpu_bytes: int = 0) -> list[Item]:
    """One worker, on each device where it computes; ``gpu_bytes`` is the memory of one GPU.

    torch: weights, the slot cache, and the larger of sampling and reading prompts. vLLM on CPU: weights and the KV
    cache it is given. vLLM on CUDA takes its share of the GPU whatever the model, or weights and
    ``vllm.kv_cache_gib``; never less than weights and one longest sequence.
    """
    size = serving_itemsize(config)
    slots, longest = config.workers.slots, config.longest_sequence_tokens
    context = Item("CUDA context", CUDA_CONTEXT_BYTES * cuda)
    weights = Item("weights", size * shape.num_parameters)
    if config.workers.engine == "torch":
        kv = slot_cache_bytes(shape.kv, slots, longest, size)
        items = [
            weights,
            Item("KV cache", kv, "lower workers.slots"),
            Item("one step", _step_bytes(shape, config, size), "lower workers.slots"),
            context,
        ]
    elif not cuda:
        given = int(config.vllm.kv_cache_gib * GIB)
        kv = given or vllm_cpu_bytes(shape.kv, slots, longest, size)
        items = [weights, Item("KV cache", kv, "lower vllm.kv_cache_gib" if given else "lower workers.slots")]
    else:
        weights = weights._replace(num_bytes=vllm_weights_bytes(shape, config))
        given = int(config.vllm.kv_cache_gib * GIB)
        advice = "lower vllm.kv_cache_gib" if given else "lower vllm.gpu_memory_utilization"
        room = given or int(config.vllm.gpu_memory_utilization * gpu_bytes) - weights.num_bytes
        items = [weights, Item("KV cache and the rest of vLLM's share", max(0, room), advice)]
        items += [context] if given else []  # a share includes it
    return [item for item in items if item.num_bytes]


def worker_host(shape: ModelShape, config: Config) -> list[Item]:
    """One worker in the machine's memory, beyond ``worker_device`` where that is the same memory.

    Two sets of weights, one being taken over, or kept as the base of a delta, while the next arrives. A worker that
    can map the learner's memory needs neither, but that is not known before it has tried, so they are counted. vLLM
    reads weights from a file in memory.
    """
    size, vllm = serving_itemsize(config), config.workers.engine == "vllm"
    return [
        Item("process", VLLM_PROCESS_BYTES if vllm else PROCESS_BYTES),
        Item("two sets of arriving weights", 2 * size * shape.num_parameters),
        *([Item("weights as a file in memory", size * shape.num_parameters)] if vllm else []),
    ]


def vllm_weights_bytes(shape: ModelShape, config: Config) -> int:
    """vLLM's weights on each of its GPUs."""
    gpus = config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size
    return -(-serving_itemsize(config) * shape.num_parameters // gpus)


def vllm_sequence_bytes(shape: ModelShape, config: Config) -> int:
    """KV cache of one longest sequence on each of vLLM's GPUs."""
    gpus = config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size
    return -(-config.longest_sequence_tokens * shape.kv.token_bytes(serving_itemsize(config)) // gpus)


def _step_bytes(shape: ModelShape, config: Config, size: int) -> int:
    """The torch engine's temporaries: those of sampling, or those of reading prompts and attending.

    Sampling holds four float32 and one float64 tensor of [slots, V], with a nucleus (evaluation) four more. Attention
    holds bias, scores and their softmax in full.
    """
    narrow = size if size < FLOAT32 else 0
    sampling = config.workers.slots * shape.vocab_size * (24 + narrow + 18 * (config.evaluation.top_p < 1.0))
    scores = shape.heads * (2 * size + FLOAT32 + narrow)
    longest, prompt = config.longest_sequence_tokens, config.data.max_prompt_tokens
    prompts = (-(-config.workers.slots // config.sampling.group_size) + READ_AHEAD) * prompt
    tokens, seen = min(prompts, max(PREFILL_TOKENS, prompt)), prompt
    if config.workers.kv_cache == "recompute":
        tokens, seen = min(config.workers.slots * longest, max(PREFILL_TOKENS, longest)), longest
    layer = size * (4 * shape.intermediate_size + 4 * shape.hidden_size + 3 * shape.query_size)
    reading = tokens * (scores * seen + layer + 2 * shape.kv.token_bytes(size))
    held = min(READ_AHEAD * prompt, PREFILL_TOKENS) * shape.kv.token_bytes(size)  # of prompts read ahead
    return max(sampling, reading, config.workers.slots * scores * longest) + held
