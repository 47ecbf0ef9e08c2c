"""Useful tokens per second of the embedded engine against transformers' ``generate``, at 1, 8 and 64 sequences.

Both sides run the quickstart's architecture with random weights in float32 on the same number of threads, answer the
same prompts at temperature 1 with the log-prob of every token, and take turns in one process. Every sequence has a
length of its own (short and long answers mixed). ``generate`` takes batches of that many sequences and its scores;
the engine keeps that many slots filled. Only the tokens asked for count. A second table has equal lengths, where
continuous batching gains nothing and only the cost of a step is compared.

    python -m benchmarks.engine --out engine.json [--repeats 5]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from workers.engine import Request
from workers.torch.engine import TorchEngine

VOCAB, LONGEST_PROMPT, LONGEST_ANSWER = 18, 14, 64
SEQUENCES = {1: 12, 8: 96, 64: 512}  # concurrency: sequences of one measurement


class Job(NamedTuple):
    """One sequence to generate."""

    prompt: np.ndarray
    num_tokens: int


def build_model() -> PreTrainedModel:
    """The quickstart's architecture with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config).eval()


def draw_jobs(count: int, seed: int, *, ragged: bool) -> list[Job]:
    """Prompts of 6-14 tokens; answers of 3-5 or 20-45 tokens with equal chance, or all of 32."""
    rng = np.random.default_rng(seed)
    jobs = []
    for _ in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(6, LONGEST_PROMPT + 1)).astype(np.int32)
        short = rng.random() < 0.5
        answer = int(rng.integers(3, 6) if short else rng.integers(20, 46))
        jobs.append(Job(prompt, answer if ragged else 32))
    return jobs


def run_engine(engine: TorchEngine, jobs: list[Job], seed: int) -> int:
    """Useful tokens generated: all of them."""
    for index, job in enumerate(jobs):
        engine.add(Request(index, job.prompt, 1, seed + index, job.num_tokens))
    tokens = 0
    while engine.running or engine.waiting:
        tokens += sum(len(finished.logprobs) for finished in engine.step())
    return tokens


@torch.inference_mode()
def run_generate(model: PreTrainedModel, jobs: list[Job], batch: int, seed: int) -> int:
    """Useful tokens generated, in batches of ``batch`` in the order given."""
    torch.manual_seed(seed)
    tokens = 0
    for start in range(0, len(jobs), batch):
        chosen = jobs[start : start + batch]
        logprobs = _generate(model, chosen)
        tokens += sum(len(row[: job.num_tokens]) for row, job in zip(logprobs, chosen, strict=True))
    return tokens


def _generate(model: Any, jobs: list[Job]) -> Tensor:
    """Log-probs [batch, new tokens] of one ``generate`` call, as long as its longest job."""
    width = max(len(job.prompt) for job in jobs)
    ids, mask = torch.zeros(len(jobs), width, dtype=torch.int64), torch.zeros(len(jobs), width, dtype=torch.int64)
    for row, job in enumerate(jobs):
        ids[row, width - len(job.prompt) :] = torch.from_numpy(job.prompt)
        mask[row, width - len(job.prompt) :] = 1
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=max(job.num_tokens for job in jobs),
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = torch.stack(output.scores, 1).float().log_softmax(-1)
    return scores.gather(2, output.sequences[:, width:, None])[:, :, 0]


def compare(concurrency: int, repeats: int, *, ragged: bool) -> dict[str, Any]:
    """Tokens per wall second of both sides over ``repeats`` turns, and the median ratio of a turn."""
    jobs = draw_jobs(SEQUENCES[concurrency], concurrency, ragged=ragged)
    model, longest = build_model(), LONGEST_PROMPT + LONGEST_ANSWER
    engine = TorchEngine(build_model(), slots=concurrency, max_len=longest, stop_token_ids=[])
    sides: dict[str, Callable[[int], int]] = {
        "engine": lambda seed: run_engine(engine, jobs, seed),
        "generate": lambda seed: run_generate(model, jobs, concurrency, seed),
    }
    speeds: dict[str, list[float]] = {"engine": [], "generate": []}
    for repeat in range(-1, repeats):  # turn -1 warms both up and does not count
        for name, side in sides.items():
            started = time.perf_counter()
            tokens = side(repeat + 1)
            speed = tokens / (time.perf_counter() - started)
            assert tokens == sum(job.num_tokens for job in jobs)
            if repeat >= 0:
                speeds[name].append(speed)
    ratios = [one / other for one, other in zip(speeds["engine"], speeds["generate"], strict=True)]
    return {
        "speedup": round(statistics.median(ratios), 3),
        "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "engine_tokens_per_s": summary(speeds["engine"]),
        "generate_tokens_per_s": summary(speeds["generate"]),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {name: round(pick(values), 1) for name, pick in (("median", statistics.median), ("min", min), ("max", max))}


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(title=title)
    for name in ("sequences", "engine tokens/s", "generate tokens/s", "ratio", "range"):
        table.add_column(name, justify="right")
    for concurrency, result in results.items():
        engine, generate = result["engine_tokens_per_s"], result["generate_tokens_per_s"]
        low, high = result["speedup_range"]
        table.add_row(
            concurrency,
            f"{engine['median']:,.0f} ({engine['min']:,.0f} - {engine['max']:,.0f})",
            f"{generate['median']:,.0f} ({generate['min']:,.0f} - {generate['max']:,.0f})",
            f"{result['speedup']:.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, the same for both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ragged = {str(n): compare(n, arguments.repeats, ragged=True) for n in SEQUENCES}
    show("useful tokens/s, ragged lengths: median (min - max)", ragged)
    equal = {str(n): compare(n, arguments.repeats, ragged=False) for n in SEQUENCES}
    show("useful tokens/s, all answers of 32 tokens: median (min - max)", equal)
    if arguments.out:
        result = {
            "speedup_vs_generate": {n: found["speedup"] for n, found in ragged.items()},
            "ragged": ragged,
            "equal": equal,
            "origin": origin(seeds=[0, *SEQUENCES], repeats=arguments.repeats),
        }
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
