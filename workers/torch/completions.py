"""What the torch engine remembers of its completions. Owned here: a request that waits, a completion that runs and
its version spans, and the per-slot facts in arrays. Not owned: any decision.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from workers.engine import Request


@dataclass(eq=False)
class Waiting:
    """A request with completions still to start, and its prompt's prefill once computed."""

    request: Request
    keys: np.ndarray  # uint64 [num_samples]
    started: int = 0
    prefix: Tensor | None = None  # [layers, 2, kv_heads, bucket, head_dim]
    logits: Tensor | None = None  # float32 [vocab]

    def own(self) -> None:
        """Keep what was read of it, and not the whole pass that it was read in."""
        assert self.prefix is not None
        assert self.logits is not None
        self.prefix, self.logits = self.prefix.clone(), self.logits.clone()


@dataclass(eq=False)
class Running:
    """A completion in a slot. Spans cover the tokens of versions already replaced."""

    request: Request
    index: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    def close_span(self, version: int, tokens: int) -> None:
        """All tokens up to ``tokens`` that no span covers yet are of ``version``."""
        new = tokens - sum(count for _, count in self.spans)
        if new and self.spans and self.spans[-1][0] == version:
            new += self.spans.pop()[1]
        if new:
            self.spans.append((version, new))


class Rows:
    """What is known of every slot, on the host: one array per fact, so that a step is a few vector operations."""

    def __init__(self, slots: int, max_len: int) -> None:
        self.ids = np.zeros((slots, max_len), dtype=np.int32)  # prompt and completion
        self.logprobs = np.zeros((slots, max_len), dtype=np.float32)  # by position in the sequence
        self.length = np.zeros(slots, dtype=np.int64)  # prompt and completion so far
        self.prompt = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)  # longest sequence allowed
        self.key = np.zeros(slots, dtype=np.uint64)
        self.temperature = np.ones(slots, dtype=np.float32)
        self.top_p = np.ones(slots, dtype=np.float32)

    def start(self, rows: slice, request: Request, keys: np.ndarray) -> None:
        """Put completions of ``request`` with stream ``keys`` into ``rows``."""
        length = len(request.prompt_ids)
        self.ids[rows, :length] = request.prompt_ids
        self.length[rows] = self.prompt[rows] = length
        self.limit[rows] = length + request.max_tokens
        self.key[rows] = keys
        self.temperature[rows] = request.temperature
        self.top_p[rows] = request.top_p

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy every fact of rows ``source`` over rows ``target``."""
        for array in vars(self).values():
            array[target] = array[source]
