"""The embedded sampler: continuous batching of any transformers causal LM. Owned here: requests, slots, versions and
the life of a completion. Not owned: forward passes (``decoders``), cells (``slot_cache``), draws (``sampling``).

A completion's tokens and log-prob bits depend on its prompt, its ``(seed, index)``, its settings and the weights,
never on its slot, its arrival or its neighbours (dense models, same machine and thread count; experts that gather
rows are an exception). Rows in use are always the first ones, so a step touches no idle slot. On CUDA it runs as well
(``tests/whole_run/test_gpu.py``), a step of 32 rows as slow as one of 128; that its bits keep there has not been shown.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dapo_async.errors import ConfigError, WeightsError
from dapo_async.model.kv_cache import PREFILL_TOKENS, READ_AHEAD, ROWS, round_up
from workers.engine import CompletionOutput, Request, check_request
from workers.sampling import completion_keys, sample, uniforms
from workers.serving_weights import put_weights
from workers.torch.completions import Rows, Running, Waiting
from workers.torch.decoders import build_decoder, load_module
from workers.torch.slot_cache import SlotCache, bucket


class TorchEngine:
    """Implements ``workers.engine.Engine`` in this process. Not thread-safe."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        slots: int,
        max_len: int,
        stop_token_ids: Iterable[int],
        kv_cache: str = "keep",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        """``max_len``: longest prompt plus completion, in tokens. A module given is taken over, its weights too.

        ``fused=False`` keeps to the module's own forward. Raises ``ConfigError`` for a model or a setting that cannot
        be served.
        """
        if kv_cache not in ("keep", "recompute") or slots < 1 or max_len < 2:
            raise ConfigError(
                f'kv_cache must be "keep" or "recompute", slots at least 1 and max_len at least 2; '
                f'got "{kv_cache}", {slots} and {max_len}'
            )
        self.slots, self.max_len = slots, max_len
        self.version, self.prefill_s = -1, 0.0
        self.on_wait: Callable[[], None] = lambda: None
        self._device = torch.device(device)
        self._module = load_module(model, dtype, self._device, trust_remote_code=trust_remote_code)
        self._recompute, self._stale = kv_cache == "recompute", False
        self._decoder = build_decoder(self._module, max_len, fused=fused)
        padded = round_up(slots, ROWS)
        self._cache = SlotCache(self._decoder.kv_shape, padded, max_len, dtype, self._device)
        self._rows = Rows(padded, max_len)
        self._running: list[Running] = []
        self._waiting: deque[Waiting] = deque()
        self._vocab = int(self._module.config.vocab_size)
        stops = list(stop_token_ids)
        if any(not 0 <= token < self._vocab for token in stops):
            raise ConfigError(f"stop_token_ids {stops} must lie in the vocabulary of {self._vocab} tokens")
        self._stops = np.zeros(self._vocab, dtype=bool)
        self._stops[stops] = True

    @property
    def running(self) -> int:
        """Completions being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return sum(item.request.num_samples - item.started for item in self._waiting)

    def add(self, request: Request) -> None:
        """See ``Engine.add``. Also raises ``ValueError`` for a prompt, key or setting that cannot be served."""
        items: list[Waiting | Running] = [*self._waiting, *self._running]
        live = {item.request.key for item in items}
        check_request(request, live, vocab_size=self._vocab, max_len=self.max_len)
        self._waiting.append(Waiting(request, completion_keys(request.seed, 0, request.num_samples)))

    @torch.inference_mode()
    def step(self) -> list[CompletionOutput]:
        """See ``Engine.step``. Raises ``WeightsError`` where the weights give log-probs that are not finite."""
        if self._stale:
            self._rebuild()
        before, starting = len(self._running), self._choose()
        unread = self._unread([item for item, _ in starting])
        logits = [self._forward(before, unread)] if before or unread else []
        logits += [self._start(item, count) for item, count in starting]
        for item in unread:
            if not item.started:
                item.own()
        if not logits:
            return []
        tokens, logprobs = self._sample(torch.cat(logits))
        return self._record(tokens, logprobs)

    def cancel(self, key: Hashable) -> None:
        """See ``Engine.cancel``."""
        self._waiting = deque(item for item in self._waiting if item.request.key != key)
        self._free(np.array([item.request.key == key for item in self._running], dtype=bool))

    def swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See ``Engine.swap``. Completions in flight keep their tokens; a lower version than theirs is refused."""
        if version < self.version and self._running:
            raise WeightsError(f"version {version} cannot follow {self.version} while completions are being decoded")
        put_weights(self._module, tensors)
        self._decoder.refresh()
        for row, item in enumerate(self._running):
            item.close_span(self.version, int(self._rows.length[row] - self._rows.prompt[row]))
        for waiting in self._waiting:
            waiting.prefix = waiting.logits = None
        self.version = version
        self._stale = self._recompute and bool(self._running)

    def close(self) -> None:
        """See ``Engine.close``. The engine must not be used afterwards."""
        self._running, self._waiting = [], deque()
        del self._cache, self._decoder, self._module

    def _choose(self) -> list[tuple[Waiting, int]]:
        """Waiting requests, and how many of their completions start now: what slots and ``PREFILL_TOKENS`` allow."""
        free, reading = self.slots - len(self._running), 0
        starting: list[tuple[Waiting, int]] = []
        while free and self._waiting:
            item = self._waiting[0]
            reading += len(item.request.prompt_ids) if item.prefix is None else 0
            if starting and reading > PREFILL_TOKENS:
                break
            count = min(free, item.request.num_samples - item.started)
            starting.append((item, count))
            free -= count
            if item.started + count == item.request.num_samples:
                self._waiting.popleft()
        return starting

    def _unread(self, starting: list[Waiting]) -> list[Waiting]:
        """Requests whose prompts are read in this pass: those that start, and, if any, some of those that start next.

        Where prompts are read together, one more costs far less than the pass that it would else need.
        """
        unread = [item for item in starting if item.prefix is None]
        ahead = READ_AHEAD if unread and self._decoder.reads_together else 0
        reading = sum(len(item.request.prompt_ids) for item in unread)
        for item in itertools.islice(self._waiting, ahead):
            if item.prefix is None and item not in unread:
                reading += len(item.request.prompt_ids)
                if reading > PREFILL_TOKENS:
                    break
                unread.append(item)
        return unread

    def _start(self, item: Waiting, count: int) -> Tensor:
        assert item.prefix is not None
        assert item.logits is not None
        first = len(self._running)
        indices = range(item.started, item.started + count)
        self._rows.start(slice(first, first + count), item.request, item.keys[indices.start : indices.stop])
        self._cache.share(first, first + count, item.prefix)
        self._running.extend(Running(item.request, index) for index in indices)
        item.started += count
        return item.logits.expand(count, -1)

    def _forward(self, rows: int, unread: list[Waiting]) -> Tensor:
        """One pass: feeds the first ``rows`` slots their newest tokens and reads the prompts of ``unread``.

        Returns the next-token logits [rows, vocab] of the slots; the prompts' stay with their requests.
        """
        started, padded = time.perf_counter(), round_up(rows, ROWS)
        positions = np.zeros(padded, dtype=np.int64)
        positions[:rows] = self._rows.length[:rows] - 1
        tokens = self._rows.ids[np.arange(padded), positions].astype(np.int64)
        length = self._cache.view_length(int(positions.max(initial=0)) + 1)
        prompts = [item.request.prompt_ids for item in unread]
        logits, prefixes = self._decoder.run(self._put(tokens), self._put(positions), self._cache, length, prompts)
        for item, prefix, row in zip(unread, prefixes, logits[padded:], strict=True):
            item.prefix, item.logits = prefix, row
        read = sum(len(prompt) for prompt in prompts)
        # Prompts and running rows share the pass; its time is split by their numbers of tokens.
        self.prefill_s += (time.perf_counter() - started) * read / (read + padded)
        return logits[:rows]

    def _rebuild(self) -> None:
        """Recompute the cached keys and values of every running completion under the weights now in service."""
        started, none = time.perf_counter(), self._put(np.zeros(0, dtype=np.int64))
        # The newest token is not in the cache yet: the next pass feeds it.
        lengths = (self._rows.length[: len(self._running)] - 1).tolist()
        chunks: list[list[int]] = [[]]
        for row in (row for row, length in enumerate(lengths) if length):
            if chunks[-1] and sum(lengths[other] for other in chunks[-1]) + lengths[row] > PREFILL_TOKENS:
                chunks.append([])
            chunks[-1].append(row)
        for chunk in filter(None, chunks):
            cached = [self._rows.ids[row, : lengths[row]] for row in chunk]
            _, prefixes = self._decoder.run(none, none, self._cache, 0, cached)
            for row, prefix in zip(chunk, prefixes, strict=True):
                self._cache.share(row, row + 1, prefix)
        self._stale = False
        self.prefill_s += time.perf_counter() - started

    def _sample(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        rows, count = self._rows, len(self._running)
        top_p = rows.top_p[:count]
        uniform = uniforms(rows.key[:count], rows.length[:count] - rows.prompt[:count])
        tokens, logprobs = sample(
            logits,
            self._put(rows.temperature[:count]),
            self._put(top_p) if (top_p < 1).any() else None,
            self._put(uniform),
        )
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _record(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[CompletionOutput]:
        """Append one token to every row; the completions that thereby ended, whose slots are freed."""
        if not np.isfinite(logprobs).all():
            raise WeightsError(f"weights of version {self.version} give log-probs that are not finite")
        rows, every = self._rows, np.arange(len(self._running))
        rows.ids[every, rows.length[every]] = tokens
        rows.logprobs[every, rows.length[every]] = logprobs
        rows.length[every] += 1
        stopped = self._stops[tokens]
        ended = stopped | (rows.length[every] == rows.limit[every])
        finished = [self._finish(row, bool(stopped[row])) for row in np.flatnonzero(ended).tolist()]
        if finished:
            self._free(ended)
        return finished

    def _finish(self, row: int, stopped: bool) -> CompletionOutput:
        item, (start, end) = self._running[row], (self._rows.prompt[row], self._rows.length[row])
        item.close_span(self.version, int(end - start))
        return CompletionOutput(
            item.request.key,
            item.index,
            self._rows.ids[row, start:end].copy(),
            self._rows.logprobs[row, start:end].copy(),
            item.spans,
            "stop" if stopped else "length",
        )

    def _free(self, ended: np.ndarray) -> None:
        """Drop the rows marked in ``ended`` [running] and close the gaps with the last rows that stay."""
        stay = int(len(ended) - ended.sum())
        gaps = np.flatnonzero(ended[:stay])
        movers = stay + np.flatnonzero(~ended[stay:])
        if len(gaps):
            self._cache.move(movers, gaps, bucket(int(self._rows.length[movers].max())))
            self._rows.move(movers, gaps)
            for mover, gap in zip(movers, gaps, strict=True):
                self._running[gap] = self._running[mover]
        del self._running[stay:]

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
