"""One GPU: training, publishing and sampling beside their limits.

    python -m benchmarks.gpu --out gpu.json [--parts training logprobs publishing sampling]

* training: a model of the size of Qwen3-0.6B (random weights) in bfloat16 on ragged answers. Model FLOPs are 6 per
  weight and token and causal attention's, without what is computed again; the limit is a product of 8192 x 8192
  matrices in bfloat16, timed in the same process. Variable-length attention on packed sequences against padded rows,
  in turns; with and without gradient checkpointing; peak memory beside the estimate of ``dapo-async check``.
* logprobs: seconds and peak memory in chunks and with all logits at once, forward and backward.
* publishing: that model's weights on their way to host memory while training goes on: on a stream of its own into
  pinned memory, and, as a rival, by PyTorch's plain copy; what it takes, and what the learner loses.
* sampling: tokens per second of the torch engine, of that model in bfloat16 and of the quickstart's in float32. It is
  for trying things out; vLLM is the sampler for GPUs and is not measured here.

Asynchronous against synchronous on one GPU: ``gpu_runs``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.engine import build_model
from benchmarks.origin import origin, write_result
from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.data.prompts import Prompt
from dapo_async.learner.update import Update
from dapo_async.model.forward_pass import ForwardPass, hardware_of, resolve_forward_pass
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.rl.logprobs import selected_logprobs
from dapo_async.run.memory import learner_device
from dapo_async.run.memory_check import shape_of
from dapo_async.transport.messages import Completion, Group
from dapo_async.weight_sync import snapshot
from dapo_async.weight_sync.encoding import live_tensors
from dapo_async.weight_sync.publisher import Publisher
from workers.engine import Request
from workers.torch.engine import TorchEngine

SIDE = 8192  # of the matrices whose product is the limit
GROUPS, GROUP, PROMPT, SHORTEST, LONGEST = 8, 16, 64, 64, 1024  # of the training batch; lengths are uniform
VOCAB = 151_936
ROWS, ANSWER = (32, 128), 128  # of sampling
PARTS = ("training", "logprobs", "publishing", "sampling")


def large_model(attention: str = "sdpa") -> PreTrainedModel:
    """Qwen3-0.6B's shape, random, float32, on the GPU."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.device("cuda"):
        return Qwen3ForCausalLM(shape)


def settings(**model: Any) -> Config:
    """bfloat16, on the GPU."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": "random", "device": "cuda", "precision": "bfloat16"} | model,
        "data": {"train": "random", "max_prompt_tokens": PROMPT},
        "sampling": {"group_size": GROUP, "max_tokens": LONGEST},
        "schedule": {"groups_per_batch": GROUPS},
        "optimizer": {"lr": 1e-6},
        "learner": {"microbatch_tokens": 16384, "logprob_chunk_tokens": 2048},
    }
    return build_config(tables, "")


def make_update(config: Config) -> tuple[Update, ForwardPass]:
    """The learner's arithmetic, and the forward pass that was chosen."""
    accelerator = make_accelerator(config.model)
    forward_pass = resolve_forward_pass(config, hardware_of(accelerator.device))
    model = large_model(forward_pass.attention)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(config.model.gradient_checkpointing)
    optimizer = make_optimizer(model, config.optimizer, accelerator)
    return Update(config, model, optimizer, accelerator, forward_pass), forward_pass


def batch() -> list[RolloutGroup]:
    """Groups of ragged answers of random tokens, half of them right."""
    rng, found = np.random.default_rng(0), []
    for lease in range(GROUPS):
        lengths = rng.integers(SHORTEST, LONGEST + 1, GROUP)
        completions = [
            Completion(num_tokens=int(n), spans=[(0, int(n))], finish="stop", correct=index % 2 == 0)
            for index, n in enumerate(lengths)
        ]
        total = int(lengths.sum())
        ids, logprobs = rng.integers(0, VOCAB, total).astype(np.int32), np.full(total, -11.9, dtype=np.float32)
        group = Group(lease=lease, incarnation="", completions=completions, token_ids=ids, logprobs=logprobs)
        prompt = Prompt(str(lease), rng.integers(0, VOCAB, PROMPT).astype(np.int32), "", "")
        found.append(RolloutGroup(lease, lease, prompt, group, "w0"))
    return found


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds until the GPU has done it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def product_tflops(repeats: int = 20) -> float:
    """What a large product reaches here, in TFLOP/s; the median."""
    one, other = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = [seconds_of(lambda: one @ other) for _ in range(repeats + 3)][3:]
    return 2 * SIDE**3 / statistics.median(found) / 1e12


def model_flops(answers: Sequence[RolloutGroup]) -> float:
    """Of one training step: forward once, backward twice as much; the head only where a token is predicted."""
    layers, hidden, query, kv, mlp = 28, 1024, 2048, 1024, 3072
    weights = layers * (hidden * (query + 2 * kv) + query * hidden + 3 * hidden * mlp)
    lengths = np.concatenate([answer.lengths for answer in answers]).astype(np.float64)
    inputs = lengths + PROMPT - 1
    attention = layers * 2 * 2 * query * (inputs * (inputs + 1) / 2).sum()
    return float(3 * (2 * weights * inputs.sum() + 2 * VOCAB * hidden * lengths.sum() + attention))


def training(repeats: int) -> dict[str, Any]:
    """A training step with each attention, in turns; then checkpointed."""
    answers, limit = batch(), product_tflops()
    tokens = sum(int(sum(answer.lengths)) for answer in answers)
    flops = model_flops(answers)
    results: dict[str, Any] = {"limit_tflops": limit, "answer_tokens": tokens}
    variants: dict[str, dict[str, Any]] = {
        "variable length": {"attention": "varlen"},
        "padded": {"attention": "sdpa"},
        "variable length, checkpointed": {"attention": "varlen", "gradient_checkpointing": True},
    }
    times: dict[str, list[float]] = {}
    for _ in range(2):  # rounds of all variants; one model at a time in memory
        for name, changes in variants.items():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            config = settings(**changes)
            update, forward_pass = make_update(config)
            run = lambda update=update: update.train(answers, 0, lambda: None)  # noqa: E731
            run()
            times.setdefault(name, []).extend(seconds_of(run) for _ in range(repeats))
            peak = torch.cuda.max_memory_allocated() - before
            if name not in results:
                items = learner_device(shape_of(update.model), config, forward_pass)
                estimate = sum(item.num_bytes for item in items if item.what != "CUDA context")
                results[name] = {"peak_gib": peak / 2**30, "estimate_gib": estimate / 2**30}
            del update, run
    for name, found in times.items():
        best = statistics.median(found)
        results[name] |= {
            "tokens_per_s": spread([tokens / seconds for seconds in found]),
            "model_tflops": flops / best / 1e12,
            "share_of_limit": flops / best / 1e12 / limit,
        }
    return results


def logprobs(repeats: int) -> dict[str, Any]:
    """16,384 rows of the large model's head in chunks of 2,048, and all at once."""
    rows, results = 16384, {}
    hidden = torch.randn(rows, 1024, device="cuda", requires_grad=True)
    head = (torch.randn(VOCAB, 1024, device="cuda") * 0.02).requires_grad_()
    target = torch.randint(VOCAB, (rows,), device="cuda")
    for name, chunk in (("chunks of 2,048", 2048), ("all at once", rows)):

        def run(chunk: int = chunk) -> None:
            hidden.grad = head.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                logp, _ = selected_logprobs(hidden, head, target, temperature=1.0, chunk_tokens=chunk)
            logp.sum().backward()

        run()
        torch.cuda.empty_cache()
        hidden.grad = head.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = [seconds_of(run) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated() - before
        results[name] = {"peak_gib": peak / 2**30, "seconds": spread(found)}
    return results


def copy_plainly(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], _ready: object) -> None:
    """On the stream of all."""
    for source, target in pairs:
        target.copy_(source)


def never_pinned(_memory: torch.Tensor, _owner: object, _device: torch.device) -> bool:
    """Memory as it is."""
    return False


def publishing(repeats: int) -> dict[str, Any]:
    """Both ways in turn, each publishing once per training step, and steps that publish nothing."""
    answers = batch()
    update, _ = make_update(settings())
    own = snapshot.copy_out, snapshot.pin
    ways: dict[str, Any] = {"own stream, pinned": own, "learner's stream, not pinned": (copy_plainly, never_pinned)}
    found: dict[str, list[dict[str, float]]] = {"nothing published": [], **{name: [] for name in ways}}
    publishers = {name: _publisher() for name in ways}
    version = 0
    try:
        for turn in range(-2, repeats):  # two turns touch and pin every buffer
            update.before_step = lambda: None
            plain = seconds_of(lambda: update.train(answers, 0, lambda: None))
            found["nothing published"] += [{"step_s": plain}] if turn >= 0 else []
            for name, functions in ways.items():
                snapshot.copy_out, snapshot.pin = functions
                publisher, version = publishers[name], version + 1
                update.before_step = lambda publisher=publisher: publisher.wait_copied(120.0)
                before = publisher.counts

                def step(publisher: Publisher = publisher, version: int = version) -> None:
                    publisher.publish(version, live_tensors(update.model), torch.bfloat16)
                    update.train(answers, 0, lambda: None)

                took = seconds_of(step)
                while publisher.published < version:
                    publisher.check()
                after = publisher.counts
                one = {"step_s": took, "copy_s": after.copy_s - before.copy_s}
                found[name] += [one | {"blocked_s": after.blocked_s - before.blocked_s}] if turn >= 0 else []
    finally:
        snapshot.copy_out, snapshot.pin = own
        for publisher in publishers.values():
            publisher.close()
    num_bytes = sum(2 * tensor.numel() for tensor in live_tensors(update.model).values())
    results: dict[str, Any] = {"set_bytes": num_bytes}
    for name, measured in found.items():
        results[name] = {key: spread([one[key] for one in measured]) for key in measured[0]}
        if name in ways:
            results[name]["gb_per_s"] = num_bytes / results[name]["copy_s"]["median"] / 1e9
    return results


def _publisher() -> Publisher:
    return Publisher("tcp://127.0.0.1:*", incarnation="life", max_message_bytes=2 << 30, heartbeat_s=1.0)


def sampling(repeats: int) -> dict[str, Any]:
    """Tokens per second with all slots filled, prompts included."""
    results = {}
    models = {
        "0.6 B, bfloat16": (large_model().to(torch.bfloat16), torch.bfloat16, VOCAB),
        "0.6 M, float32": (build_model(), torch.float32, 17),
    }
    for name, (model, dtype, vocab) in models.items():
        for rows in ROWS:
            engine = TorchEngine(
                model, slots=rows, max_len=PROMPT + ANSWER, stop_token_ids=[], device="cuda", dtype=dtype
            )

            def run(engine: TorchEngine = engine, rows: int = rows, vocab: int = vocab) -> None:
                rng = np.random.default_rng(0)
                for key in range(rows // GROUP):
                    prompt = rng.integers(0, vocab, PROMPT).astype(np.int32)
                    engine.add(Request(key, prompt, GROUP, key, ANSWER))
                while engine.running or engine.waiting:
                    engine.step()

            run()
            found = [rows * ANSWER / seconds_of(run) for _ in range(repeats)]
            results[f"{name}, {rows} rows"] = {"tokens_per_s": spread(found)}
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and PyTorch finds none here")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "training": lambda: training(arguments.repeats),
        "logprobs": lambda: logprobs(arguments.repeats),
        "publishing": lambda: publishing(arguments.repeats),
        "sampling": lambda: sampling(arguments.repeats),
    }
    results: dict[str, Any] = {}
    for part in arguments.parts:
        started = time.monotonic()
        results[part] = measures[part]()
        torch.cuda.empty_cache()
        print(f"{part} ({time.monotonic() - started:.0f} s): {json.dumps(results[part], default=str)}", flush=True)
        if arguments.out:  # after each part: a lease may end
            write_result(arguments.out, results | {"origin": origin(seeds=[0], repeats=arguments.repeats)})


if __name__ == "__main__":
    main()
