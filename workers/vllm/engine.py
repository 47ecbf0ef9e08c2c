"""vLLM as the sampler of a worker: in-process ``AsyncLLM``, token ids in and out. Implements ``workers.engine.Engine``.

One vLLM request per completion, at most ``slots`` at a time, so that nothing waits inside vLLM and every request starts
under the version it was submitted for. The prefix cache is salted with the version: a prompt read under old weights is
never served to a request of newer ones. A swap pauses decoding between two steps (vLLM's ``keep``), loads through
vLLM's weight-transfer API (``extension``, in vLLM's own process), and resumes; vLLM counts which version sampled
which token. ``AsyncLLM`` lives on an event loop in a thread of its own; everything here but the coroutines runs in the
caller's. The same code is meant for the CPU and the CUDA build; it has run on the CPU build only.
"""

import asyncio
import contextlib
import functools
import itertools
import multiprocessing
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dapo_async.config.settings import Vllm
from dapo_async.errors import ConfigError, DapoError, WeightsError
from dapo_async.system.vllm_release import check_vllm
from workers.engine import CompletionOutput, Request, check_request
from workers.sampling import completion_keys
from workers.serving_weights import check_weights
from workers.vllm.event_loop import EventLoop
from workers.vllm.setup import engine_arguments, set_environment
from workers.vllm.weights_file import sweep, write_set

STEP_S = 0.02  # how long a step waits for a completion to end
START_S, SWAP_S = 1800.0, 600.0  # what loading a large model may take
CLOSE_S, REAP_S = 20.0, 5.0
COLDEST = 0.01  # vLLM takes this for anything below
BACKEND = "dapo_async_file"  # of vLLM's weight transfer; see ``extension``
EXTENSION = "workers.vllm.extension.Extension"


class Place(NamedTuple):
    """A completion handed to vLLM."""

    request: Request
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    seed: int


class VllmEngine:
    """See the module. Not thread-safe."""

    def __init__(
        self,
        model: str,
        *,
        slots: int,
        max_len: int,
        stop_token_ids: Iterable[int],
        kv_cache: str,
        dtype: torch.dtype,
        threads: int,
        settings: Vllm,
    ) -> None:
        """``max_len``: longest prompt plus completion, in tokens. Raises ``ConfigError`` if vLLM cannot serve this."""
        check_vllm()
        self.slots, self.max_len = slots, max_len
        self.on_wait: Callable[[], None] = lambda: None
        self.version, self.prefill_s = -1, 0.0  # vLLM mixes prefill and decoding in one step: its time is decode time
        self.swap_s: list[float] = []  # pause, load, resume of the latest swap, in seconds
        self._recompute, self._stops = kv_cache == "recompute", list(stop_token_ids)
        architecture = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            self._shapes = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        self._vocab = int(architecture.get_text_config().vocab_size)
        self._waiting: deque[Place] = deque()
        self._running: dict[int, Place] = {}
        self._serial = itertools.count()
        self._ended: queue.SimpleQueue[tuple[int, CompletionOutput | Exception]] = queue.SimpleQueue()
        self._service, self._num_swaps = "", 0  # "version.swap": a learner's next life may repeat versions
        self.cached_tokens = 0  # prompt tokens that the prefix cache saved
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._llm: Any = None
        self._others = set(multiprocessing.active_children())
        self._loop = EventLoop("vLLM")
        set_environment(threads)
        sweep()
        shape = architecture.get_text_config()
        arguments = engine_arguments(model, shape, slots=slots, max_len=max_len, dtype=dtype, settings=settings)
        try:
            self._loop.call(self._open(arguments), START_S, "start", self._on_wait)
        except Exception as error:  # whatever vLLM raises, the user needs the reason
            self.close()
            if isinstance(error, DapoError):
                raise
            told = f'workers.engine = "vllm": vLLM could not start with "{model}": {_reason(error)}'
            raise ConfigError(told) from error

    # --- what the worker calls ----------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Completions being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """See ``Engine.add``."""
        if request.temperature < COLDEST:
            raise ValueError(f"vLLM samples no colder than temperature {COLDEST}, {request.key} asks for less")
        keys = {place.request.key for place in [*self._waiting, *self._running.values()]}
        check_request(request, keys, vocab_size=self._vocab, max_len=self.max_len)
        seeds = completion_keys(request.seed, 0, request.num_samples)
        self._waiting.extend(Place(request, index, int(seed) >> 1) for index, seed in enumerate(seeds))

    def step(self) -> list[CompletionOutput]:
        """See ``Engine.step``. Waits up to ``STEP_S`` for completions to end. Raises ``DapoError`` if vLLM fails."""
        self._loop.check()
        self._submit()
        finished, deadline = [], time.monotonic() + STEP_S
        while self._running:
            try:
                serial, outcome = self._ended.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if self._running.pop(serial, None) is None:
                continue  # cancelled meanwhile
            if isinstance(outcome, Exception):
                raise DapoError(f"vLLM failed: {_reason(outcome)}") from outcome
            finished.append(outcome)
            deadline = 0.0  # take what else is there, and no more
        self._submit()
        return finished

    def cancel(self, key: Hashable) -> None:
        """See ``Engine.cancel``."""
        self._waiting = deque(place for place in self._waiting if place.request.key != key)
        gone = [serial for serial, place in self._running.items() if place.request.key == key]
        for serial in gone:
            del self._running[serial]
        self._loop.soon(self._abort, gone)

    def swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See ``Engine.swap``. Decoding pauses only for the load itself.

        Raises ``DapoError`` if vLLM fails half-way or serves other bits than these: it must not serve any longer.
        """
        if version < self.version and self._running:
            raise WeightsError(f"version {version} cannot follow {self.version} while completions are being decoded")
        check_weights(self._shapes, tensors)
        try:
            self._loop.call(self._swap(version, tensors), SWAP_S, f"take weights {version}", self._on_wait)
        except Exception as error:
            raise DapoError(f"vLLM could not take weights {version}: {_reason(error)}") from error
        self.version = version

    def close(self) -> None:
        """See ``Engine.close``."""
        self._waiting, self._running = deque(), {}
        if not self._loop.loop.is_closed():
            with contextlib.suppress(Exception):  # it may have died before
                self._loop.call(self._shut(), CLOSE_S, "end")
            self._loop.close(CLOSE_S)
        for process in set(multiprocessing.active_children()) - self._others:
            process.join(REAP_S)  # vLLM kills what does not end by itself, and leaves the dead

    # --- between the two threads --------------------------------------------------------------------------

    def _on_wait(self) -> None:
        self.on_wait()
        if self._llm is not None and self._llm.errored:  # it leaves calls to a process that has died unanswered
            raise DapoError("vLLM's engine process has died")

    def _submit(self) -> None:
        """Hand waiting completions to vLLM as long as there are slots."""
        starting = {}
        while self._waiting and len(self._running) < self.slots:
            serial = next(self._serial)
            starting[serial] = self._running[serial] = self._waiting.popleft()
        if starting:
            self._loop.soon(self._begin, starting)

    # --- on the event loop --------------------------------------------------------------------------------

    def _begin(self, places: dict[int, Place]) -> None:
        for serial, place in places.items():
            task = self._tasks[serial] = asyncio.create_task(self._answer(serial, place))
            task.add_done_callback(functools.partial(self._forget, serial))

    def _abort(self, serials: list[int]) -> None:
        for serial in serials:
            if task := self._tasks.get(serial):
                task.cancel()  # vLLM aborts a request whose reader is cancelled

    def _forget(self, serial: int, _: "asyncio.Task[None]") -> None:
        del self._tasks[serial]

    async def _open(self, arguments: dict[str, Any]) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.model_executor.models import registry
        from vllm.v1.engine.async_llm import AsyncLLM

        if torch.version.cuda is None:
            # vLLM looks at the model's class in a process of its own, to keep CUDA out of this one. That process would
            # not hide PyTorch's broken companions (see dapo_async/__init__), and there is no CUDA to keep out.
            registry._run_in_subprocess = lambda inspect: inspect()
        # vLLM's worker process imports the extension, and that registers the backend.
        arguments["worker_extension_cls"] = EXTENSION
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=BACKEND)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    async def _answer(self, serial: int, place: Place) -> None:
        try:
            self._ended.put((serial, await self._complete(serial, place)))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - reported by step, in the worker's thread
            self._ended.put((serial, error))

    async def _complete(self, serial: int, place: Place) -> CompletionOutput:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request = place.request
        parameters = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            seed=place.seed,
            stop_token_ids=self._stops,
            ignore_eos=True,  # only what the configuration names stops
            logprobs=0,  # the sampled token's
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = request.prompt_ids.tolist()
        for attempt in itertools.count():
            service = self._service
            prompt = {"prompt_token_ids": ids, "cache_salt": service}
            async for output in self._llm.generate(prompt, parameters, f"{serial}.{attempt}"):
                done = output.outputs[0]
            # A swap overtook the request on its way into vLLM: it may have read a prefix of the version before.
            if done.weight_versions[0].version == service:
                break
        self.cached_tokens += output.num_cached_tokens or 0
        if len(done.logprobs.logprobs) != len(done.token_ids):
            raise DapoError(f"{len(done.logprobs.logprobs)} log-probs came for {len(done.token_ids)} tokens")
        return CompletionOutput(
            request.key,
            place.index,
            np.array(done.token_ids, dtype=np.int32),
            np.array(done.logprobs.logprobs, dtype=np.float32),
            [(int(span.version.partition(".")[0]), span.end - span.start) for span in done.weight_versions],
            "stop" if done.finish_reason == "stop" else "length",
        )

    async def _swap(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._num_swaps += 1
        service = f"{version}.{self._num_swaps}"
        with contextlib.ExitStack() as cleanup:
            with ThreadPoolExecutor(1, "weights file") as pool:  # decoding goes on meanwhile
                path, found = await self._loop.loop.run_in_executor(pool, write_set, tensors, cleanup)
            times = [time.perf_counter()]
            await self._llm.pause_generation(mode="keep", clear_cache=self._recompute)
            times.append(time.perf_counter())
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest({"path": path, "digests": found}))
            await self._llm.finish_weight_update(weight_version=service)
            self._service = service
            times.append(time.perf_counter())
            await self._llm.resume_generation()
            times.append(time.perf_counter())
        self.swap_s = [end - start for start, end in itertools.pairwise(times)]

    async def _shut(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        if self._llm is not None:
            self._llm.shutdown()
        await asyncio.sleep(0)


def _reason(error: BaseException) -> str:
    """What it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'it says nothing'}"
