"""A vLLM extension that damages what one process of a parallel engine loads, after its digest has been checked.

The file that DAMAGE names, if it exists, holds "RANK TENSOR ROW COLUMN": that process loads one bit of it flipped.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from workers.vllm.extension import Extension, FileTransfer, FileUpdate

__all__ = ["Extension"]
receive = FileTransfer.receive_weights


def flipped(tensor: Tensor, row: int, column: int) -> Tensor:
    damaged = tensor.clone()
    damaged.view(torch.int32)[row, column] ^= 1
    return damaged


def receive_damaged(self: FileTransfer, update_info: FileUpdate) -> None:
    order = Path(os.environ["DAMAGE"])
    rank, name, row, column = order.read_text().split() if order.exists() else ("-1", "", "0", "0")
    load = self.model.load_weights

    def load_damaged(pairs: Iterable[tuple[str, Tensor]]) -> object:
        return load((own, flipped(x, int(row), int(column)) if own == name else x) for own, x in pairs)

    if self.parallel_config.rank == int(rank):
        self.model.load_weights = load_damaged
    try:
        receive(self, update_info)
    finally:
        self.model.load_weights = load


FileTransfer.receive_weights = receive_damaged
