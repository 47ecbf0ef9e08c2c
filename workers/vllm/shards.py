"""Which part of the published tensors one process of a parallel vLLM holds, read off the layers' own attributes.

Column-parallel layers hold rows of each fused matrix (whole attention heads; few KV heads are held by several
processes), row-parallel ones columns, embeddings and output layer a range of the vocabulary; everything else is whole.
The mirror image of the layers' ``weight_loader`` of vLLM 0.32, written again so that it can contradict it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


def shard(layer: nn.Module, own: str, sources: Sequence[Tensor]) -> Tensor:
    """What ``layer.<own>`` holds in this process of the published ``sources``, which it fuses in this order.

    Sources are oriented as vLLM keeps them: outputs first. Raises ``ValueError`` if their sizes are not the layer's.
    """
    if isinstance(layer, VocabParallelEmbedding):
        own_rows = layer.shard_indices
        (whole,) = sources
        return whole[own_rows.org_vocab_start_index : own_rows.org_vocab_end_index]
    if isinstance(layer, RowParallelLinear):
        (whole,) = sources
        # A bias is added to the sum of all shards' products: by one process, and held by each.
        return whole if own == "bias" else _part(whole, layer.input_size, layer.tp_rank, layer.tp_size, dim=1)
    if not isinstance(layer, ColumnParallelLinear):
        return _joined(sources)
    pieces = _pieces(layer)
    if len(sources) != len(pieces):  # the checkpoint fuses them otherwise
        rows, whole = [size for size, _, _ in pieces], _joined(sources)
        if sum(rows) != len(whole):
            raise ValueError(f"{len(whole)} rows are not {rows}")
        sources = whole.split(rows)
    return _joined([_part(source, *piece) for source, piece in zip(sources, pieces, strict=True)])


def _pieces(layer: ColumnParallelLinear) -> list[tuple[int, int, int]]:
    """Rows of each fused matrix as published, which of its equal parts is held here, and of how many."""
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear):
        replicas = layer.num_kv_head_replicas
        kv = rank // replicas, size // replicas
        return [
            (layer.total_num_heads * layer.head_size, rank, size),
            (layer.total_num_kv_heads * layer.head_size, *kv),
            (layer.total_num_kv_heads * layer.v_head_size, *kv),
        ]
    outputs = layer.output_sizes if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]
    return [(rows, rank, size) for rows in outputs]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other."""
    if any(tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
        raise ValueError(f"{[list(tensor.shape) for tensor in tensors]} are not of one width")
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _part(whole: Tensor, expected: int, index: int, count: int, dim: int = 0) -> Tensor:
    """Part ``index`` of ``count`` equal ones along ``dim``, which must have ``expected`` entries."""
    if whole.shape[dim] != expected or expected % count:
        raise ValueError(f"{list(whole.shape)} is not {expected} in {count} parts along dimension {dim}")
    return whole.narrow(dim, index * (expected // count), expected // count)
