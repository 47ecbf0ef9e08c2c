"""What the rollout loop needs of an engine. An engine decodes; it knows no sockets, prompts' truths or rewards.

One thread calls everything: ``swap`` first, as there are no weights to serve before it, then ``add``, ``step`` and
``swap`` in any order. ``step`` advances every running completion by one token (or more) and returns those that ended.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch


class Request(NamedTuple):
    """One prompt to be answered ``num_samples`` times. Completion ``i`` samples with ``(seed, i)`` and nothing else."""

    key: Hashable
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    num_samples: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class CompletionOutput(NamedTuple):
    """One ended completion of a request."""

    key: Hashable
    index: int  # type: ignore[assignment]  # 0 .. num_samples - 1; hides tuple.index, which nobody calls
    token_ids: np.ndarray  # int32 [num_tokens], stop token included
    logprobs: np.ndarray  # float32 [num_tokens], nats, of the distribution sampled from
    spans: list[tuple[int, int]]  # (version, num_tokens), rising versions
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """A continuously batching sampler."""

    version: int  # of the weights it serves; -1 before the first swap
    slots: int  # completions it can decode at the same time
    prefill_s: float  # wall seconds spent in prefill since the start
    on_wait: Callable[[], None]  # called every second or so while a swap takes long; the worker stays alive by it

    @property
    def running(self) -> int:
        """Completions being decoded."""

    @property
    def waiting(self) -> int:
        """Completions accepted by ``add`` that have no slot yet."""

    def add(self, request: Request) -> None:
        """Queue a request; its completions start as slots become free, in the order of ``add``.

        Raises ``ValueError`` if prompt and ``max_tokens`` exceed the engine's longest sequence.
        """

    def step(self) -> Sequence[CompletionOutput]:
        """Start what fits, advance every running completion, return those that ended."""

    def cancel(self, key: Hashable) -> None:
        """Drop every completion of this request, running or waiting. Unknown keys are ignored."""

    def swap(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve these weights from the next token on. All or nothing.

        Raises ``WeightsError`` if names, shapes or values do not fit; the old weights then stay in service.
        """

    def close(self) -> None:
        """Free everything. Running completions are lost."""


def check_request(request: Request, live: Collection[Hashable], *, vocab_size: int, max_len: int) -> None:
    """Raise ``ValueError`` if no engine could serve this; ``live`` are the keys of the requests it has already."""
    key, prompt = request.key, request.prompt_ids
    if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"prompt_ids of {key} must be token ids in 0 .. {vocab_size - 1}, at least one")
    if len(prompt) + request.max_tokens > max_len:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) and max_tokens ({request.max_tokens}) of {key} "
            f"exceed the engine's longest sequence ({max_len} tokens)"
        )
    if request.num_samples < 1 or request.max_tokens < 1 or request.temperature <= 0 or not 0 < request.top_p <= 1:
        raise ValueError(
            f"{key} needs num_samples and max_tokens of at least 1, temperature above 0 and top_p in (0, 1]"
        )
    if key in live:
        raise ValueError(f"a request with key {key} is still in the engine")
