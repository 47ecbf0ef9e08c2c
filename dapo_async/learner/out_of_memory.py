"""Turns "out of memory" of the learner into one sentence that names the settings to lower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dapo_async.config.settings import Config
from dapo_async.errors import DapoError

# Besides PyTorch's own class: what its CPU allocator and CUDA's libraries raise as plain RuntimeErrors.
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(DapoError):
    """The learner's memory does not suffice for a batch."""


@contextmanager
def explained(config: Config, what: str, then: Callable[[], str]) -> Iterator[None]:
    """While ``what`` is done, running out of memory raises ``OutOfMemory``, with ``then()`` as the last words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{sentence(config, what, error)}; {then()}") from error


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory, of the GPU or of the machine, is what was missing."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(sign in str(error) for sign in SIGNS)


def sentence(config: Config, what: str, error: RuntimeError | MemoryError) -> str:
    """What happened, and which settings would be right."""
    learner = config.learner
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    checkpointing = "" if config.model.gradient_checkpointing else ", or set model.gradient_checkpointing = true"
    return (
        f"{what} ran out of memory ({reason.rstrip('.')}): lower learner.microbatch_tokens = "
        f"{learner.microbatch_tokens} (it must hold the longest sequence, {config.longest_sequence_tokens}) or "
        f"learner.logprob_chunk_tokens = {learner.logprob_chunk_tokens}{checkpointing}, and go on with --resume"
    )
