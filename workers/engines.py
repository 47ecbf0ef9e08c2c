"""Makes what a configuration names: the engine with its share of the settings, and the decoder of its answers."""

from typing import Any

import torch

from dapo_async.config.settings import Config
from dapo_async.errors import ConfigError
from dapo_async.model.tokenizer import TextDecoder, load_tokenizer
from workers.engine import Engine
from workers.torch.engine import TorchEngine
from workers.vllm.engine import VllmEngine


def make_engine(config: Config) -> Engine:
    """The engine of ``config.workers``, without weights in service. Raises ``ConfigError`` if it cannot run here."""
    shared: dict[str, Any] = {
        "slots": config.workers.slots,
        "max_len": config.longest_sequence_tokens,
        "stop_token_ids": config.sampling.stop_token_ids,
        "kv_cache": config.workers.kv_cache,
        "dtype": getattr(torch, config.serving_dtype),
    }
    device = config.workers.device
    if config.workers.engine == "vllm":
        build = "cpu" if torch.version.cuda is None else "cuda"
        if device not in ("auto", build):
            raise ConfigError(f'workers.device = "{device}", but the PyTorch that vLLM would use here is for {build}')
        stages = config.vllm.pipeline_parallel_size
        if build == "cpu" and stages > 1:
            raise ConfigError(
                f"vllm.pipeline_parallel_size = {stages}: vLLM 0.32 starts its stages on CPU, but fails at the first "
                "token (its second stage has no place for what the first one sends); use tensor_parallel_size"
            )
        return VllmEngine(config.model.path, threads=config.workers.threads, settings=config.vllm, **shared)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trusted = config.model.trust_remote_code
    return TorchEngine(config.model.path, device=device, trust_remote_code=trusted, **shared)


def make_decoder(config: Config) -> TextDecoder:
    """A decoder with the model's tokenizer. Raises ``ConfigError`` if there is none on this machine."""
    return TextDecoder(load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code))
