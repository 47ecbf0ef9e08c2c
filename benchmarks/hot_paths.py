"""Each hot path as a share of its limit, on one core: how far it is from what this machine can do.

Compute: the limit is the matrix products of the very same run (same shapes, same library), timed alone; those inside
PyTorch's fused attention, which the module's pass uses, are not seen. Copies: the limit is copying as many bytes within
memory. Both are measured in the same run. Training is measured twice, in turns: with the module's own forward pass and
with the fused one, on a batch of the quickstart's shape (16 groups of 8 answers to chains of sums, 70 % of them worked
out). CPU time for compute, wall time for copies.

    python -m benchmarks.hot_paths --out hot_paths.json
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.engine import build_model, summary
from benchmarks.origin import origin, write_result
from benchmarks.products import record
from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.data.prompts import Prompt
from dapo_async.demo.sums import ALPHABET, draw_chain, terse_answer, worked_answer
from dapo_async.learner.update import Update
from dapo_async.model.cpu.proof import prove
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.system.malloc import keep_freed_memory
from dapo_async.transport.curve import DialerKeys, ListenerKeys, new_pair
from dapo_async.transport.messages import Completion, Group
from dapo_async.transport.sockets import Dialer, Listener
from dapo_async.weight_sync.encoding import decode_weights, encode_weights
from workers.engine import Request
from workers.torch.engine import TorchEngine

GROUPS, GROUP, WORKED = 16, 8, 0.7
ROWS = (32, 64, 128)
STEPS, PROMPT, ANSWER = 32, 12, 64
COPIED_BYTES = 64 << 20
BUDGETS = {"module": 2048, "fused": 4096}  # where each is fastest (docs/log.md)
END = len(ALPHABET)  # the token that ends an answer


def ids(text: str) -> np.ndarray:
    """Tokens of a chain or an answer, int32."""
    return np.array([ALPHABET.index(character) for character in text], dtype=np.int32)


def settings(forward: str) -> Config:
    """The quickstart's, as far as a batch depends on them."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": "random", "device": "cpu", "forward": forward},
        "data": {"train": "random", "max_prompt_tokens": 16},
        "sampling": {"group_size": GROUP, "max_tokens": ANSWER},
        "schedule": {"groups_per_batch": GROUPS},
        "optimizer": {"lr": 3e-4},
        "learner": {"microbatch_tokens": BUDGETS[forward]},
    }
    return build_config(tables, "")


def batch(seed: int) -> list[RolloutGroup]:
    """Answers as a policy half way gives them: some terse, most worked out, one in two right."""
    rng, found = random.Random(seed), []
    for lease in range(GROUPS):
        chain = draw_chain(rng, 3, 7)
        texts = [worked_answer(chain) if rng.random() < WORKED else terse_answer(chain) for _ in range(GROUP)]
        tokens = [np.append(ids(text), END).astype(np.int32) for text in texts]
        completions = [
            Completion(num_tokens=len(t), spans=[(0, len(t))], finish="stop", correct=index % 2 == 0)
            for index, t in enumerate(tokens)
        ]
        logprobs = np.full(sum(map(len, tokens)), -2.5, dtype=np.float32)
        group = Group(
            lease=lease, incarnation="", completions=completions, token_ids=np.concatenate(tokens), logprobs=logprobs
        )
        found.append(RolloutGroup(lease, lease, Prompt(str(lease), ids(chain), "", ""), group, "w0"))
    return found


def make_update(forward: str) -> Update:
    """The learner's arithmetic on the quickstart's architecture. Raises ``ConfigError`` if the pass is not usable."""
    config, model = settings(forward), build_model()
    accelerator = make_accelerator(config.model)
    forward_pass = prove(resolve_forward_pass(config, hardware_of(accelerator.device), model.config), model)
    optimizer = make_optimizer(model, config.optimizer, accelerator)
    return Update(config, model, optimizer, accelerator, forward_pass)


def against_products(tokens: int, run: Callable[[], object], times: list[float], repeats: int) -> dict[str, Any]:
    """``times`` are the CPU seconds of ``run``, which handles ``tokens`` tokens."""
    products = record(run)
    limit, best = products.seconds(repeats), min(times)
    return {
        "tokens_per_s": summary([tokens / seconds for seconds in times]),
        "limit_tokens_per_s": round(tokens / limit, 1),
        "limit_gflops": round(products.flops / limit / 1e9, 1),
        "share_of_limit": round(limit / best, 3),
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of this thread."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def training(repeats: int) -> dict[str, dict[str, Any]]:
    """Training steps and log-probs of both forward passes, in turns."""
    answers = batch(0)
    tokens = sum(int(sum(answer.lengths)) for answer in answers)
    updates = {forward: make_update(forward) for forward in ("module", "fused")}
    runs: dict[str, Callable[[], object]] = {}
    for forward, update in updates.items():
        runs[f"training step, {forward}"] = lambda update=update: update.train(answers, 0, lambda: None)
        runs[f"log-probs, {forward}"] = lambda update=update: update.logprobs(answers)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):  # turn -1 warms up and does not count
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            times[name] += [seconds] if repeat >= 0 else []
    results = {name: against_products(tokens, run, times[name], repeats) for name, run in runs.items()}
    ratios = [a / b for a, b in zip(times["training step, module"], times["training step, fused"], strict=True)]
    results["training step, fused"]["speedup_over_module"] = summary(ratios)
    return results


def fill(engine: TorchEngine, rows: int) -> None:
    """Give ``engine`` as many completions as it has rows, none of which ends soon."""
    rng = np.random.default_rng(rows)
    for key in range(rows // GROUP):
        engine.add(Request(key, rng.integers(0, END, PROMPT).astype(np.int32), GROUP, key, ANSWER))


def decoding(rows: int, repeats: int) -> dict[str, dict[str, Any]]:
    """A decode step at ``rows`` running completions, in the middle of their answers; and reading their prompts."""
    engine = TorchEngine(build_model(), slots=rows, max_len=PROMPT + ANSWER, stop_token_ids=[])

    def steps() -> None:
        for _ in range(STEPS):
            engine.step()

    reading, times = [], []
    for _ in range(repeats + 1):
        fill(engine, rows)
        reading.append(cpu_seconds(engine.step))
        times.append(cpu_seconds(steps))
        for key in range(rows // GROUP):
            engine.cancel(key)
    fill(engine, rows)
    prefill = against_products(rows // GROUP * PROMPT, engine.step, reading[1:], repeats)
    decode = against_products(rows * STEPS, steps, times[1:], repeats)
    return {f"decode step, {rows} rows": decode, f"prefill, {rows // GROUP} prompts": prefill}


def copies(repeats: int) -> dict[str, dict[str, Any]]:
    """Bytes through a pair of sockets, plain and encrypted, and a set of weights encoded and decoded, against copying
    them in memory."""
    tensor = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(tensor)
    weights = {"weight": tensor.view(torch.float32)}
    limit = COPIED_BYTES << 1
    ours, theirs = new_pair(), new_pair()
    listener = Listener("tcp://127.0.0.1:*", max_message_bytes=limit)
    dialer = Dialer(listener.address, max_message_bytes=limit)
    guarded = Listener("tcp://127.0.0.1:*", max_message_bytes=limit, keys=ListenerKeys(ours, lambda _key: True))
    knowing = Dialer(guarded.address, max_message_bytes=limit, keys=DialerKeys(theirs, ours.public))

    def through(sender: Dialer, receiver: Listener) -> None:
        assert sender.send([tensor.numpy().data], 30.0)
        started = time.monotonic()
        while receiver.receive(1.0) is None:  # a newcomer's key wakes it once
            assert time.monotonic() - started < 30.0

    def through_codec() -> None:
        push, frames = encode_weights(0, weights, "")
        decode_weights(push, [memoryview(bytearray(frame)) for frame in frames])

    runs: dict[str, Callable[[], object]] = {
        "memory": lambda: target.copy_(tensor),
        "sockets": lambda: through(dialer, listener),
        "sockets, encrypted": lambda: through(knowing, guarded),
        "weights codec": through_codec,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for repeat in range(-1, repeats):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name] += [time.perf_counter() - started] if repeat >= 0 else []
    finally:
        for channel in (dialer, listener, knowing, guarded):
            channel.close()
    best = {name: COPIED_BYTES / min(found) / 1e9 for name, found in seconds.items()}
    return {
        f"copy, {name}": {
            "gb_per_s": round(best[name], 2),
            "median_gb_per_s": round(COPIED_BYTES / statistics.median(seconds[name]) / 1e9, 2),
            "limit_gb_per_s": round(best["memory"], 2),
            "share_of_limit": round(best[name] / best["memory"], 3),
        }
        for name in runs
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(title="hot paths, one core")
    for column in ("path", "speed", "limit", "share", "limit's speed"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for name, found in results.items():
        if "gb_per_s" in found:
            speed, limit, note = f"{found['gb_per_s']} GB/s", f"{found['limit_gb_per_s']} GB/s", "copy in memory"
        else:
            speed, limit = f"{found['tokens_per_s']['median']:,.0f} tok/s", f"{found['limit_tokens_per_s']:,.0f} tok/s"
            note = f"{found['limit_gflops']} GFLOP/s"
        table.add_row(name, speed, limit, f"{100 * found['share_of_limit']:.0f} %", note)
    Console(width=110).print(table)
    ratio = results["training step, fused"]["speedup_over_module"]
    print(f"training: fused {ratio['median']} times the module's speed ({ratio['min']} to {ratio['max']})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the learner does
    results = training(arguments.repeats)
    for rows in ROWS:
        results |= decoding(rows, arguments.repeats)
    results |= copies(arguments.repeats)
    show(results)
    if arguments.out:
        write_result(arguments.out, {"paths": results, "origin": origin(seeds=[0, *ROWS], repeats=arguments.repeats)})


if __name__ == "__main__":
    main()
