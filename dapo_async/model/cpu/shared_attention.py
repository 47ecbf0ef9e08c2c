"""Causal attention of flat rows that share their prompts: gathers sequences into blocks, attends, takes rows back.

Owned here: the attention of ``prompt_sharing`` layouts, forward and backward, with grouped heads. Plain matrix
products: for short sequences they take two thirds of the time of PyTorch's fused kernel on CPU, but keep 4 bytes per
head and pair of positions for backward. Not owned: projections, norms and rotation (``fused_forward``).

Dimension key: N = flat rows, b = sequences of a block, L = its longest, H = query heads, K = KV heads, G = query heads
per KV head, D = head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_async.model.prompt_sharing import Block

LONGEST = 512  # tokens of a sequence; above, the weights kept for backward outgrow all else


class BlockIndex(NamedTuple):
    """``prompt_sharing.Block`` per head: rows of flat tensors seen as [N H, D] or [N K, D], and places in the block."""

    shape: tuple[int, int, int, int]  # b, K, G, L
    bias_QL: Tensor  # [G L, L]: 0 where a query sees a key, else -inf
    query: Tensor  # [b K G L] flat rows of the queries
    key: Tensor  # [b K L] flat rows of keys and values
    query_rows: Tensor  # flat rows whose queries this block computes, and their places
    query_places: Tensor
    key_rows: Tensor  # the same of keys and values
    key_places: Tensor
    copy_rows: Tensor  # flat rows that are here as further copies, and their places
    copy_places: Tensor


class SharedAttention(torch.autograd.Function):
    """``softmax(q k^T scale) v`` of query [N, H, D], key and value [N, K, D]; [N, H D]."""

    @staticmethod
    def forward(
        ctx: Any, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, blocks: Sequence[BlockIndex], scale: float
    ) -> Tensor:
        size = query_NHD.shape[-1]
        queries, keys, values = (x.reshape(-1, size) for x in (query_NHD, key_NKD, value_NKD))
        mixed = torch.empty_like(queries)
        kept: list[Tensor] = []
        for block in blocks:
            b, kv_heads, group, length = block.shape
            query = queries.index_select(0, block.query).view(b * kv_heads, group * length, size)
            key = keys.index_select(0, block.key).view(b * kv_heads, length, size)
            value = values.index_select(0, block.key).view(b * kv_heads, length, size)
            weights = torch.baddbmm(block.bias_QL, query, key.mT, alpha=scale).softmax(-1)
            of_block = torch.bmm(weights, value).view(-1, size).index_select(0, block.query_places)
            mixed.index_copy_(0, block.query_rows, of_block)
            kept += (query, key, value, weights)
        ctx.save_for_backward(*kept)
        ctx.blocks, ctx.scale, ctx.shapes = blocks, scale, (query_NHD.shape, key_NKD.shape)
        return mixed.view(len(query_NHD), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys = ctx.shapes
        size = queries[-1]
        grads = grad_N.reshape(-1, size)
        grad_query = torch.empty_like(grads)
        grad_key, grad_value = (grads.new_empty(keys[0] * keys[1], size) for _ in range(2))
        for number, block in enumerate(ctx.blocks):
            query, key, value, weights = ctx.saved_tensors[4 * number : 4 * number + 4]
            # Further copies of a prompt's queries were computed but not used: their gradient is 0.
            mixed = torch.zeros_like(query).view(-1, size)
            mixed.index_copy_(0, block.query_places, grads.index_select(0, block.query_rows))
            mixed = mixed.view_as(query)
            of_weights = torch.bmm(mixed, value.mT)
            scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            of_query = torch.bmm(scores, key).view(-1, size)
            grad_query.index_copy_(0, block.query_rows, of_query.index_select(0, block.query_places))
            _collect(grad_key, torch.bmm(scores.mT, query), block)
            _collect(grad_value, torch.bmm(weights.mT, mixed), block)
        return grad_query.view(queries), grad_key.view(keys), grad_value.view(keys), None, None


def _collect(total: Tensor, of_block: Tensor, block: BlockIndex) -> None:
    """Set the rows whose home is the block, then add what the copies of prompts got; homes come before copies."""
    places = of_block.view(-1, of_block.shape[-1])
    total.index_copy_(0, block.key_rows, places.index_select(0, block.key_places))
    if len(block.copy_rows):
        total.index_add_(0, block.copy_rows, places.index_select(0, block.copy_places))


def block_index(block: Block, *, heads: int, kv_heads: int, like: Tensor) -> BlockIndex:
    """The indices of one block, on the device of ``like`` and with a bias of its type."""
    rows, home_rows, homes, copy_rows, copies = (torch.from_numpy(array).to(like.device) for array in block)
    b, length = rows.shape
    group = heads // kv_heads
    causal = torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)
    return BlockIndex(
        shape=(b, kv_heads, group, length),
        bias_QL=causal.repeat(group, 1),
        query=_rows_of_heads(rows, heads).mT.flatten(),
        key=_rows_of_heads(rows, kv_heads).mT.flatten(),
        query_rows=_rows_of_heads(home_rows, heads).flatten(),
        query_places=_places_of_heads(homes, heads, length).flatten(),
        key_rows=_rows_of_heads(home_rows, kv_heads).flatten(),
        key_places=_places_of_heads(homes, kv_heads, length).flatten(),
        copy_rows=_rows_of_heads(copy_rows, kv_heads).flatten(),
        copy_places=_places_of_heads(copies, kv_heads, length).flatten(),
    )


def _rows_of_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows of [N, ...] to rows of [N heads, ...]: [..., heads]."""
    return rows[..., None] * heads + torch.arange(heads, device=rows.device)


def _places_of_heads(places: Tensor, heads: int, length: int) -> Tensor:
    """Places in [b, L] to places in [b, heads, L]: [places, heads]."""
    head = torch.arange(heads, device=places.device)
    return (places.div(length, rounding_mode="floor")[:, None] * heads + head) * length + (places % length)[:, None]
