"""The slot KV cache and the attention over it. Owned here: where keys and values lie, which cells a row may see,
and attention arithmetic whose bits do not depend on the other rows. Not owned: who occupies which slot.

Dimension key: N = rows decoded together, A = KV heads, G = query heads per KV head, Q = query positions,
L = key positions, D = head dimension.
"""

import numpy as np
import torch
from torch import Tensor

from dapo_async.model.kv_cache import BUCKET, round_up, slot_cells

KEY_BLOCK = 128  # values are summed in blocks of this many keys, lest the library's own blocks depend on the length
GAP_BYTES = 4096  # what a view may leave out of each head's cells and still cost more than viewing all (docs/log.md)


def bucket(length: int) -> int:
    """``length`` rounded up to a whole number of buckets."""
    return round_up(length, BUCKET)


def causal_bias(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[N, Q, L]: 0 where a query at ``positions`` [N, Q] may see the key, -inf where the key is later."""
    later = torch.arange(length, device=positions.device) > positions[:, :, None]
    return torch.where(later, -torch.inf, 0.0).to(dtype)


def spread_bias(bias: Tensor, kv_heads: int, group: int) -> Tensor:
    """[N, Q, L] repeated over heads to the [N·A, G·Q, L] that ``attend`` adds."""
    rows, queries, length = bias.shape
    spread = bias[:, None, None].expand(rows, kv_heads, group, queries, length)
    return spread.reshape(rows * kv_heads, group * queries, length)


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + bias) v for [N·A, G·Q, D] queries against [N·A, L, D] keys and values.

    One plain matrix product per row and head: unlike fused attention kernels its result does not depend on N, nor on
    masked keys beyond a row's own. Masked cells must be finite: their weight is 0, and 0 times NaN is NaN.
    """
    scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    if values.shape[1] <= KEY_BLOCK:
        return torch.bmm(weights, values)
    mixed = torch.bmm(weights[:, :, :KEY_BLOCK], values[:, :KEY_BLOCK])
    for start in range(KEY_BLOCK, values.shape[1], KEY_BLOCK):
        block = slice(start, start + KEY_BLOCK)
        mixed.baddbmm_(weights[:, :, block], values[:, block])
    return mixed


class SlotCache:
    """Keys and values of every slot, allocated once: ``kv`` is [layers, 2, slots, A, max_len, D].

    Rows in use are kept a prefix of the slots by the engine, so a step reads views and copies nothing.
    """

    def __init__(
        self, shape: tuple[int, int, int], slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers, self.kv_heads, head_dim = shape
        self._head_dim = head_dim
        self._max_len = max_len = slot_cells(max_len, self._head_dim)
        self._itemsize = dtype.itemsize
        # Zeros, not garbage: a masked NaN would still poison the weighted sum.
        self.kv = torch.zeros(layers, 2, slots, self.kv_heads, max_len, head_dim, dtype=dtype, device=device)
        self._flat = [[half.view(-1, head_dim) for half in layer] for layer in self.kv]
        self._stacked = [[half.view(-1, max_len, head_dim) for half in layer] for layer in self.kv]
        self._head_starts = torch.arange(slots * self.kv_heads, device=device).view(slots, self.kv_heads) * max_len
        self._cells = torch.empty(0)
        self._window = (0, 0)
        self._views: list[list[Tensor]] = []

    def view_length(self, length: int) -> int:
        """Cells a step views so that ``length`` are seen and the arithmetic is that of any other length.

        Whole units, so that the last block of keys is never a small product either; and all cells where little is
        left out.
        """
        cells = slot_cells(length, self._head_dim)
        gap_bytes = (self._max_len - cells) * self._head_dim * self._itemsize
        return self._max_len if gap_bytes < GAP_BYTES else cells

    def share(self, first: int, last: int, prefix: Tensor) -> None:
        """Give rows ``first .. last - 1`` a copy of one ``prefix`` [layers, 2, A, L, D]."""
        self.kv[:, :, first:last, :, : prefix.shape[3]] = prefix[:, :, None]

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """Copy the first ``length`` cells of rows ``source`` over rows ``target``."""
        self.kv[:, :, torch.from_numpy(target), :, :length] = self.kv[:, :, torch.from_numpy(source), :, :length]

    def begin(self, positions: Tensor, length: int) -> None:
        """Prepare a step in which row j writes cell ``positions[j]`` and reads the first ``length`` cells."""
        rows = positions.shape[0]
        self._cells = (self._head_starts[:rows] + positions[:, None]).view(-1)
        if self._window != (rows, length):
            self._window = (rows, length)
            self._views = [[half[: rows * self.kv_heads, :length] for half in layer] for layer in self._stacked]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's [N·A, D] key and value; returns the [N·A, L, D] views to attend to."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, self._cells, key)
        values.index_copy_(0, self._cells, value)
        seen_keys, seen_values = self._views[layer]
        return seen_keys, seen_values
