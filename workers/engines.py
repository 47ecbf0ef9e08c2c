"""Chooses the engine a configuration names and gives it its share of the settings."""

import torch

from dapo_async.config import Config
from workers.engine import Engine
from workers.torch_engine import TorchEngine


def make_engine(config: Config) -> Engine:
    """The engine of ``config.workers``, without weights in service. Raises ``ConfigError`` if it cannot run here."""
    dtype = config.model.precision if config.weights.dtype == "auto" else config.weights.dtype
    device = config.workers.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchEngine(
        config.model.path,
        slots=config.workers.slots,
        max_len=config.longest_sequence_tokens,
        stop_token_ids=config.sampling.stop_token_ids,
        kv_cache=config.workers.kv_cache,
        device=device,
        dtype=getattr(torch, dtype),
    )
