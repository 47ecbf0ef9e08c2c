"""What vLLM is started with: its environment, its arguments, and room for its KV cache.

Imports no vLLM: its environment must be set before anybody does.
"""

import os
from typing import Any

import torch

from dapo_async.config.settings import Vllm
from dapo_async.errors import ConfigError
from dapo_async.model.kv_cache import kv_shape, vllm_cpu_bytes


def set_environment(threads: int) -> None:
    """Environment of vLLM and its child processes; what the user has set stays, but for the threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if torch.version.cuda is None:
        # Compiling the sampler's helpers takes 5 to 30 s and gains nothing here.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        # One busy process instead of two: the executor otherwise spins on a queue.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def engine_arguments(
    model: str, architecture: Any, *, slots: int, max_len: int, dtype: torch.dtype, settings: Vllm
) -> dict[str, Any]:
    """Arguments of vLLM's engine; ``architecture`` is the model's transformers configuration.

    Raises ``ConfigError`` if ``settings.engine_args`` names one that is set here.
    """
    on_cpu = torch.version.cuda is None
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,  # token ids in and out
        "generation_config": "vllm",  # no defaults from the model's folder
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_len,
        "max_num_seqs": slots,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "enforce_eager": settings.enforce_eager or on_cpu,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
    }
    if settings.kv_cache_gib:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    elif on_cpu:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(architecture, slots, max_len, dtype)
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    taken = sorted({*arguments, "worker_extension_cls", "weight_transfer_config"} & settings.engine_args.keys())
    if taken:
        raise ConfigError(f"vllm.engine_args.{taken[0]} is set by dapo-async; see [workers], [weights] and [vllm]")
    return arguments | settings.engine_args


def kv_cache_bytes(architecture: Any, slots: int, max_len: int, dtype: torch.dtype) -> int:
    """KV cache for ``slots`` sequences of ``max_len`` tokens of that architecture, in bytes; on CPU."""
    return vllm_cpu_bytes(kv_shape(architecture), slots, max_len, dtype.itemsize)
