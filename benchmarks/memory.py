"""The memory estimate of ``dapo-async check`` against the peak that a process really reaches, on CPU.

Every case runs in a process of its own: it builds a random Qwen3, notes its resident memory, then trains two batches of
the longest sequences (or decodes full slots), and reports by how much its peak exceeded what it had before the model.
That difference is compared with the items of ``memory.learner_device`` (``memory.worker_device``): once as it is, and
once with malloc told to return memory at once ("tight"), which leaves out what lies idle between blocks.

    python -m benchmarks.memory --out memory.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.origin import origin, write_result
from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.data.prompts import Prompt
from dapo_async.learner.update import Update
from dapo_async.model.cpu.proof import prove
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.run.memory import Item, learner_device, worker_device
from dapo_async.run.memory_check import shape_of
from dapo_async.transport.messages import Completion, Group
from workers.engine import Request
from workers.torch.engine import TorchEngine

TIMEOUT_S = 900.0
# glibc otherwise keeps freed blocks of up to 32 MiB.
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
GROUP = 4


class Case(NamedTuple):
    """A model, and settings beside it."""

    vocab: int
    hidden: int
    layers: int
    prompt: int
    answer: int
    settings: dict[str, dict[str, Any]]


CASES = {
    "0.6 M": Case(18, 128, 3, 16, 64, {"learner": {"microbatch_tokens": 2048}, "workers": {"slots": 128}}),
    "28 M": Case(8192, 512, 6, 64, 192, {"learner": {"microbatch_tokens": 2048}}),
    "28 M, bfloat16": Case(
        8192, 512, 6, 64, 192, {"learner": {"microbatch_tokens": 2048}, "model": {"precision": "bfloat16"}}
    ),
    "28 M, checkpointed": Case(
        8192, 512, 6, 64, 192, {"learner": {"microbatch_tokens": 2048}, "model": {"gradient_checkpointing": True}}
    ),
    "28 M, chunks of 512": Case(
        8192, 512, 6, 64, 192, {"learner": {"microbatch_tokens": 2048, "logprob_chunk_tokens": 512}}
    ),
    "120 M": Case(32000, 768, 12, 64, 192, {"learner": {"microbatch_tokens": 1024}}),
}


def config_of(case: Case) -> Config:
    """Two microbatches or more per optimizer step, on CPU."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "random", "device": "cpu"},
        "data": {"train": "random", "max_prompt_tokens": case.prompt},
        "sampling": {"group_size": GROUP, "max_tokens": case.answer},
        "schedule": {"groups_per_batch": 4 if case.hidden > 128 else 16},
        "workers": {"slots": 16},
    }
    return build_config(
        {name: base.get(name, {}) | case.settings.get(name, {}) for name in {*base, *case.settings}}, ""
    )


def build_model(case: Case) -> PreTrainedModel:
    """A random Qwen3 of the quickstart's proportions."""
    heads = case.hidden // 64 if case.hidden > 128 else 4
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=case.vocab,
            hidden_size=case.hidden,
            intermediate_size=3 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64 if case.hidden > 128 else 32,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def answers(case: Case, config: Config) -> list[RolloutGroup]:
    """A batch of the longest sequences, half of them right."""
    rng, found = np.random.default_rng(0), []
    for lease in range(config.schedule.groups_per_batch):
        completions = [
            Completion(num_tokens=case.answer, spans=[(0, case.answer)], finish="length", correct=index % 2 == 0)
            for index in range(GROUP)
        ]
        count = GROUP * case.answer
        ids, logprobs = rng.integers(0, case.vocab, count).astype(np.int32), -np.ones(count, dtype=np.float32)
        group = Group(lease=lease, incarnation="", completions=completions, token_ids=ids, logprobs=logprobs)
        prompt = Prompt(str(lease), rng.integers(0, case.vocab, case.prompt).astype(np.int32), "", "")
        found.append(RolloutGroup(lease, lease, prompt, group, "w0"))
    return found


def learn(case: Case, config: Config) -> list[Item]:
    """Train two batches. Returns the estimate."""
    accelerator = make_accelerator(config.model)
    model = build_model(case)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(config.model.gradient_checkpointing)
    forward_pass = prove(resolve_forward_pass(config, hardware_of(accelerator.device), model.config), model)
    optimizer = make_optimizer(model, config.optimizer, accelerator)
    update = Update(config, model, optimizer, accelerator, forward_pass)
    for number in range(2):
        update.train(answers(case, config), number, lambda: None)
    return learner_device(shape_of(model), config, forward_pass)


def work(case: Case, config: Config) -> list[Item]:
    """Decode as many longest completions as there are slots. Returns the estimate."""
    model = build_model(case)
    slots, longest = config.workers.slots, config.longest_sequence_tokens
    engine = TorchEngine(model, slots=slots, max_len=longest, stop_token_ids=[])
    rng = np.random.default_rng(0)
    for index in range(slots // GROUP):
        prompt = rng.integers(0, case.vocab, case.prompt).astype(np.int32)
        engine.add(Request(index, prompt, GROUP, index, case.answer))
    with torch.inference_mode():
        while engine.running or engine.waiting:
            engine.step()
    return worker_device(shape_of(model), config, cuda=False)


def resident_bytes() -> int:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, side: str) -> dict[str, Any]:
    """In this process, which must be fresh."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case, before = CASES[name], resident_bytes()
    config = config_of(case)
    items = learn(case, config) if side == "learner" else work(case, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    estimate = sum(item.num_bytes for item in items)
    return {
        "estimate_mib": round(estimate / 2**20, 1),
        "measured_mib": round((peak - before) / 2**20, 1),
        "ratio": round(estimate / (peak - before), 2),
        "process_mib": round(before / 2**20),
    }


def both(name: str, side: str) -> dict[str, Any]:
    """The case in two fresh processes, with and without idle memory."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", name, side]
    found = []
    for changes in ({}, TIGHT):
        env = os.environ | changes
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    plain, tight = found
    return plain | {"tight_mib": tight["measured_mib"], "tight_ratio": tight["ratio"]}


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print one table."""
    table = Table(title="peak memory beyond the process itself, MiB")
    for column in ("model", "side", "estimate", "measured", "ratio", "process", "tight", "tight ratio"):
        table.add_column(column, justify="left" if column in ("model", "side") else "right")
    for name, sides in results.items():
        for side, found in sides.items():
            table.add_row(name, side, *(str(found[key]) for key in found))
    Console(width=100).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SIDE"), help="measure one case in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in CASES:
        for side in ("learner", "worker") if "," not in name else ("learner",):
            results.setdefault(name, {})[side] = both(name, side)
    show(results)
    if arguments.out:
        write_result(arguments.out, {"cases": results, "origin": origin(seeds=[0], repeats=1)})


if __name__ == "__main__":
    main()
