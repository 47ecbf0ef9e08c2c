"""What the vLLM worker's engine costs over vLLM itself: the same requests, ragged, in one call, in turn.

* engine: this project's ``VllmEngine``, one request per completion, log-probs and versions collected;
* generate: plain ``AsyncLLM.generate``, one request per completion, all at once;
* generate_n: the same with n completions per request, which then ends when its last completion does.

Both use one vLLM engine in one process, the same seeds and the same sampling settings; useful tokens per second. The
model is random, of the quickstart's shape, so that its answers never stop by themselves and lengths are as given.

    python benchmarks/vllm_engine.py --out vllm_engine.json [--repeats 5]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

import dapo_async  # noqa: F401, I001  # first of all: it hides companions of torch that cannot be imported
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.origin import origin, write_result
from dapo_async.config.settings import Vllm
from dapo_async.weight_sync.encoding import serving_tensors
from workers.engine import Request
from workers.vllm.engine import VllmEngine

VOCABULARY, PROMPT, GROUP = 100, 16, 8
SLOTS, GROUPS = 64, 24
MEAN_LENGTH, MAX_LENGTH = 80, 256


def make_requests() -> list[Request]:
    """Groups of ragged lengths, equal within a group: vLLM's n shares one limit."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.exponential(MEAN_LENGTH, GROUPS), 8, MAX_LENGTH).astype(int)
    return [
        Request(("train", i), rng.integers(2, VOCABULARY, PROMPT).astype(np.int32), GROUP, i, int(length))
        for i, length in enumerate(lengths)
    ]


def by_engine(engine: VllmEngine, requests: list[Request]) -> int:
    """Tokens generated."""
    for number, request in enumerate(requests):
        engine.add(request._replace(key=("train", number)))
    tokens = 0
    while engine.running or engine.waiting:
        tokens += sum(len(done.token_ids) for done in engine.step())
    return tokens


def by_generate(engine: VllmEngine, requests: list[Request], n: int) -> int:
    """Tokens generated, by vLLM's own interface on the engine's own event loop."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def answer(name: str, request: Request, seed: int) -> int:
        parameters = SamplingParams(
            n=n, temperature=1.0, max_tokens=request.max_tokens, seed=seed, ignore_eos=True, logprobs=0,
            flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        async for output in engine._llm.generate({"prompt_token_ids": request.prompt_ids.tolist()}, parameters, name):
            done = output
        return sum(len(completion.token_ids) for completion in done.outputs)

    async def everything() -> int:
        stamp = time.monotonic_ns()
        every = [
            answer(f"{stamp}.{i}.{j}", request, 100 * i + j)
            for i, request in enumerate(requests)
            for j in range(GROUP // n)
        ]
        return sum(await asyncio.gather(*every))

    return engine._loop.call(everything(), 600, "answer")


def make_engine(folder: str) -> VllmEngine:
    """vLLM on a random model of the quickstart's shape, in float32."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        max_position_embeddings=512,
    )  # fmt: skip
    model = Qwen3ForCausalLM(shape)
    model.save_pretrained(folder)
    engine = VllmEngine(
        folder, slots=SLOTS, max_len=PROMPT + MAX_LENGTH, stop_token_ids=[], kv_cache="keep", dtype=torch.float32,
        threads=1, settings=Vllm(),
    )  # fmt: skip
    engine.swap(0, serving_tensors(model, torch.float32))
    return engine


def measure(engine: VllmEngine, repeats: int) -> dict[str, list[float]]:
    """Useful tokens per second of each way, in turn."""
    requests = make_requests()
    ways = {
        "engine": lambda: by_engine(engine, requests),
        "generate": lambda: by_generate(engine, requests, 1),
        "generate_n": lambda: by_generate(engine, requests, GROUP),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            rate = way() / (time.perf_counter() - started)
            if repeat:  # the first round warms up
                rates[name].append(rate)
                print(f"round {repeat}: {name:<10} {rate:8.0f} tokens/s", flush=True)
    return rates


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title="useful tokens per second")
    for name in ("way", "median", "range", "engine is"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, rates in result["tokens_per_s"].items():
        share = "" if name == "engine" else f"{result['share_of_' + name]:.1%} of it"
        table.add_row(name, f"{statistics.median(rates):.0f}", f"{min(rates):.0f} - {max(rates):.0f}", share)
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all three ways")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-engine-") as folder:
        engine = make_engine(folder)
        try:
            rates = measure(engine, arguments.repeats)
        finally:
            engine.close()
    result: dict[str, Any] = {"tokens_per_s": rates}
    for rival in ("generate", "generate_n"):
        ratios = [a / b for a, b in zip(rates["engine"], rates[rival], strict=True)]
        result[f"share_of_{rival}"] = statistics.median(ratios)
        result[f"share_of_{rival}_range"] = [min(ratios), max(ratios)]
    show(result)
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=arguments.repeats)})


if __name__ == "__main__":
    main()
