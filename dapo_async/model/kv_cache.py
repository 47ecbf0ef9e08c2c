"""How large a KV cache is. The engines allocate by this arithmetic, and ``memory`` estimates by it.

Owned here: the sizes of cells, rows and blocks that both must agree on. Knows no tensor and no engine.
"""

from typing import Any, NamedTuple

KEYS_AND_VALUES = 2
ROWS = 8  # torch engine: rows come in multiples; a matrix product's bits depend on their number only below this many
BUCKET = 16  # key lengths are rounded up to this: whole vectors in the softmax, so masked tails change no bit
SMALL_PRODUCT = 400  # PyTorch multiplies matrices of fewer multiplications by another kernel, with other roundings
READ_AHEAD = 8  # torch engine: waiting requests whose prompts may be read before they have a slot
PREFILL_TOKENS = 8192  # torch engine: prompt tokens read in one pass, one prompt at least; bounds memory and time
VLLM_BLOCK = 128  # cells of a KV block of vLLM on CPU; a sequence takes whole blocks
VLLM_MIN_BYTES = 64 << 20


class KvShape(NamedTuple):
    """What one token leaves in the cache: keys and values of every KV head in every layer."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token with numbers of ``itemsize`` bytes."""
        return KEYS_AND_VALUES * self.layers * self.kv_heads * self.head_dim * itemsize


def kv_shape(architecture: Any) -> KvShape:
    """Of a model's transformers configuration (its text part)."""
    heads = getattr(architecture, "num_key_value_heads", None) or architecture.num_attention_heads
    size = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    return KvShape(architecture.num_hidden_layers, heads, size)


def round_up(number: int, unit: int) -> int:
    """``number``, rounded up to a whole number of ``unit``."""
    return -(-number // unit) * unit


def slot_cells(max_len: int, head_dim: int) -> int:
    """Cells that a slot of the torch engine needs so that ``max_len`` tokens can be seen.

    Whole units, so that the last block of keys is never a small product.
    """
    unit = BUCKET
    while unit * head_dim < SMALL_PRODUCT:
        unit *= 2
    return round_up(max_len, unit)


def slot_cache_bytes(shape: KvShape, slots: int, max_len: int, itemsize: int) -> int:
    """The torch engine's cache, allocated once for all slots at full length."""
    return round_up(slots, ROWS) * slot_cells(max_len, shape.head_dim) * shape.token_bytes(itemsize)


def vllm_cpu_bytes(shape: KvShape, slots: int, max_len: int, itemsize: int) -> int:
    """What vLLM is given on CPU: ``slots`` sequences of ``max_len`` tokens, with one block each to spare."""
    blocks = slots * (-(-max_len // VLLM_BLOCK) + 1)
    return max(VLLM_MIN_BYTES, blocks * VLLM_BLOCK * shape.token_bytes(itemsize))
