"""The memory estimate: its formulas against what PyTorch keeps and allocates, and the published models by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dapo_async.config.settings import Config
from dapo_async.config.toml import load_config
from dapo_async.errors import ConfigError
from dapo_async.learner.update import Update
from dapo_async.model.batching import TrainSequence, build_shared
from dapo_async.model.cpu.fused_forward import FusedForward
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.kv_cache import slot_cache_bytes
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.model.prompt_sharing import MOST_PLACES
from dapo_async.rl.logprobs import selected_logprobs
from dapo_async.run.memory import (
    GIB,
    Item,
    activation_token_bytes,
    fused_token_bytes,
    learner_device,
    learner_host,
    microbatch_tokens,
    worker_device,
    worker_host,
)
from dapo_async.run.memory_check import Estimate, Machine, described_machine, estimate_memory, host_bytes, shape_of
from tests import ROOT
from tests.learner.test_update import answers, settings
from tests.model.model_cases import FUSED, tiny
from workers.torch.slot_cache import SlotCache

CONFIGS = ROOT / "configs"
QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
# As published in each model's config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dapo_qwen2.5_32b": QWEN2
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
    },
    "dapo_qwen2.5_math_7b": QWEN2
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "dapo_qwen3_1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
    },
}


def small(kind: str, *, attention: str = "sdpa", vocab: int = 500) -> PreTrainedModel:
    """Sizes that are all different, so that a formula that takes one for another fails."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attn_implementation": attention,
    }
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=48, tie_word_embeddings=True))


def saved_bytes(model: PreTrainedModel, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps after a forward pass below the output layer, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = forward()
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(kind: str, attention: str, precision: str) -> None:
    """3 %: the formula leaves out numbers per row and token, such as the norms' scales."""
    rows, length = 4, 96
    model, bf16 = small(kind, attention=attention).eval(), precision == "bfloat16"
    config = settings(
        model={"precision": precision},
        data={"max_prompt_tokens": 32},
        sampling={"max_tokens": length - 32},
        learner={"microbatch_tokens": 4096},
    )
    shape = shape_of(model)
    tokens = torch.randint(0, 500, (rows, length))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    kept = saved_bytes(model, forward)
    above = 3 * 4 * shape.hidden_size  # what the step from hidden states to log-probs adds
    per_token = activation_token_bytes(shape, config, PLAIN._replace(attention=attention)) - above
    copies = 2 * shape.linear_parameters if bf16 else 0
    assert rows * length * per_token + copies == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_activations_of_the_fused_pass_are_what_it_keeps(kind: str) -> None:
    """3 %, as above. Eight answers of 64 tokens to a prompt of 32 have more places than rows, but less than allowed."""
    prompt, answer = 32, 64
    model = small(kind).eval()
    config = settings(
        data={"max_prompt_tokens": prompt}, sampling={"max_tokens": answer}, learner={"microbatch_tokens": 4096}
    )
    ids, tokens = np.arange(prompt, dtype=np.int32), np.arange(answer, dtype=np.int32)
    batch = [TrainSequence(ids, tokens, -np.ones(answer, np.float32), advantage=1.0, group=0) for _ in range(8)]
    micro, shape = build_shared(batch, range(8)), shape_of(model)
    kept = saved_bytes(model, lambda: FusedForward(model)(micro))
    rows, places = prompt + 8 * (answer - 1), 8 * (prompt + answer - 1)
    assert rows < places < MOST_PLACES * rows
    of_place = 4 * (shape.query_size + 2 * shape.kv_size + shape.heads * (prompt + answer))
    layers = 3 * (rows * (fused_token_bytes(shape, config) - MOST_PLACES * of_place) + places * of_place)
    above = rows * (2 * 4 * shape.hidden_size + 2 * 4 * shape.query_size)  # the last norm and the angles
    assert layers + above == pytest.approx(kept, rel=0.03)
    assert rows * activation_token_bytes(shape, config, FUSED) > kept


def test_the_estimate_is_of_the_pass_that_will_run(tmp_path: Path) -> None:
    """On a CPU in float32 the fused one, unless the settings choose or need the module's."""

    def activations(**tables: dict[str, Any]) -> str:
        large = {"learner": {"microbatch_tokens": 8192}, "schedule": {"groups_per_batch": 200}}
        config = settings(**({"model": {"path": str(tmp_path), "device": "cpu"}} | large | tables))
        model = small("qwen3")
        model.config.save_pretrained(tmp_path)
        lines = estimate_memory(config, Machine([], 8 * GIB)).lines
        return next(line for line in lines if "memory of learner" in line).partition("activations")[2].split(",")[0]

    module = {"path": str(tmp_path), "device": "cpu", "forward": "module"}
    eager = {"path": str(tmp_path), "device": "cpu", "attention": "eager"}
    assert activations() == activations(model=module | {"forward": "fused"})
    assert activations() != activations(model=module) != activations(model=eager)


def test_a_described_gpu_is_taken_to_have_what_is_asked_for(tmp_path: Path) -> None:
    """flash-attn by its name, though this machine may lack it; like PyTorch's own it repeats no KV heads."""

    def activations(*overrides: str) -> str:
        lines = estimate("dapo_qwen3_1.7b", tmp_path, 79, *overrides).lines
        return next(line for line in lines if "memory of learner" in line).partition("activations")[2].split(",")[0]

    plain = "model.gradient_checkpointing=false"
    varlen, flash = (activations(plain, f"model.attention={name}") for name in ("varlen", "flash"))
    eager = activations(plain, "model.attention=eager")
    assert activations(plain) == varlen == flash != eager


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.attention=varlen", "model.precision=float32"], 'needs model.precision = "bfloat16", not "float32"'),
        (["model.forward=fused"], 'model.forward = "fused": the learner is on cuda'),
    ],
)
def test_what_cannot_be_computed_there_is_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        estimate("dapo_qwen3_1.7b", tmp_path, 80, *overrides)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    shape, plain = shape_of(small("qwen3")), settings()
    packed = settings(model={"gradient_checkpointing": True})
    layer = (activation_token_bytes(shape, plain, PLAIN) - 5 * 4 * 256) // 3
    kept = activation_token_bytes(shape, packed, PLAIN)
    assert kept == 3 * 4 * 256 + layer + 5 * 4 * 256


def peak_bytes(run: Callable[[], object]) -> int:
    """Most that PyTorch had allocated at one time, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.fixture
def _own_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first learner; this file has some of each."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_own_precision")
@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"model": {"forward": "fused"}},
        {"learner": {"microbatch_tokens": 209, "logprob_chunk_tokens": 40}},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"precision": "bfloat16"}},
        {"objective": {"entropy_coef": 0.01}},
    ],
    ids=["plain", "fused", "chunks", "checkpointed", "bfloat16", "entropy"],
)
def test_the_learners_estimate_is_the_peak_of_a_step(tables: dict[str, dict[str, Any]]) -> None:
    """0.97 to 1.25: what is counted is not all there at once (1.06 to 1.18 here); half the moments would give 0.92."""
    tables = {
        name: {"device": "cpu", "path": "x"} | table if name == "model" else table for name, table in tables.items()
    }
    config = settings(**({"learner": {"microbatch_tokens": 209}} | tables))
    items: list[Item] = []

    def run() -> None:
        model = small("qwen3", vocab=3000)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train(config.model.gradient_checkpointing)
        accelerator = make_accelerator(config.model)
        forward_pass = FUSED if config.model.forward == "fused" else PLAIN
        optimizer = make_optimizer(model, config.optimizer, accelerator)
        update = Update(config, model, optimizer, accelerator, forward_pass)
        for number in range(2):
            update.train(answers(16), number, lambda: None)
        items.extend(learner_device(shape_of(model), config, forward_pass))

    peak = peak_bytes(run)
    assert 0.97 <= sum(item.num_bytes for item in items) / peak <= 1.25, f"{items}, peak {peak}"


def test_chunks_of_logits_go_before_the_next_come() -> None:
    """Two tensors of [chunk, vocabulary]; the rest: the head's gradient and one product of its size."""
    rows, chunk, vocab, size = 64, 8, 20_000, 2
    hidden, head = torch.randn(rows, size, requires_grad=True), torch.randn(vocab, size, requires_grad=True)

    def run() -> None:
        logp, _ = selected_logprobs(hidden, head, torch.zeros(rows).long(), temperature=1.0, chunk_tokens=chunk)
        logp.sum().backward()

    run()  # gradients exist from here on
    assert peak_bytes(run) < 2.3 * chunk * vocab * 4 + 2 * vocab * size * 4


@pytest.mark.parametrize(("slots", "max_len"), [(1, 5), (13, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slot_cache_is_as_large_as_said(slots: int, max_len: int, dtype: torch.dtype) -> None:
    shape = shape_of(small("qwen3")).kv
    padded = -(-slots // 8) * 8
    real = SlotCache(shape, padded, max_len, dtype, torch.device("cpu")).kv.nbytes
    assert slot_cache_bytes(shape, slots, max_len, dtype.itemsize) == real


# --- the published models --------------------------------------------------------------------------------


def recipe(name: str, folder: Path, *overrides: str) -> Config:
    """A shipped recipe whose model is described by a config.json alone."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return load_config(CONFIGS / f"{name}.toml", [f"model.path={folder}", *overrides])


def estimate(name: str, folder: Path, gpu_gib: float, *overrides: str) -> Estimate:
    config = recipe(name, folder, *overrides)
    return estimate_memory(config, described_machine(config, gpu_gib))


# Embedding and head; per layer query and output, key and value, their biases, three MLP matrices, two norms; a norm.
QWEN32 = 2 * 152064 * 5120 + 5120
QWEN32 += 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 5120 + 2 * 1024 + 3 * 5120 * 27648 + 2 * 5120)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dapo_qwen2.5_32b", QWEN32),
        ("dapo_qwen2.5_math_7b", 7_615_616_512),  # as its model card's 7.61 B
        ("dapo_qwen3_1.7b", 1_720_574_976),  # 1.7 B; the tied embedding counts once
    ],
)
def test_parameters_are_counted_exactly(name: str, parameters: int, tmp_path: Path) -> None:
    assert f"a model of {parameters:,} parameters" in estimate(name, tmp_path, 80).lines[0]


@pytest.mark.parametrize("gpu_gib", [80, 140, 288])
def test_no_gpu_holds_the_learner_of_32_billion_parameters(gpu_gib: int, tmp_path: Path) -> None:
    refusal = estimate("dapo_qwen2.5_32b", tmp_path, gpu_gib).refusal
    assert refusal.startswith(f"GPU 0 has {gpu_gib}.0 GiB, but this run needs about 59")
    assert "learner: AdamW moments 244.1 GiB, learner: weights 122.1 GiB, learner: gradients 122.1 GiB" in refusal
    assert "the learner is one process: take a smaller model" in refusal


def test_seven_billion_parameters_need_a_gpu_of_140_gib(tmp_path: Path) -> None:
    assert not estimate("dapo_qwen2.5_math_7b", tmp_path, 140).refusal
    assert "take a smaller model" in estimate("dapo_qwen2.5_math_7b", tmp_path, 80).refusal
    longer = ["learner.microbatch_tokens=16384"]
    assert "lower learner.microbatch_tokens" in estimate("dapo_qwen2.5_math_7b", tmp_path, 140, *longer).refusal
    without = ["model.gradient_checkpointing=false"]
    assert (
        "set model.gradient_checkpointing = true" in estimate("dapo_qwen2.5_math_7b", tmp_path, 140, *without).refusal
    )


def test_worker_and_learner_share_a_gpu(tmp_path: Path) -> None:
    fits = estimate("dapo_qwen3_1.7b", tmp_path, 79)
    assert not fits.refusal
    learner = next(line for line in fits.lines if "learner on GPU 0" in line)
    assert "37.2 GiB" in learner
    assert "# memory of GPU 0: 60.9 GiB needed, 79.0 GiB there" in fits.lines  # 37.2 and 0.3 x 79
    greedy = estimate("dapo_qwen3_1.7b", tmp_path, 79, "vllm.gpu_memory_utilization=0.9").refusal
    assert "worker: KV cache and the rest of vLLM's share 67.9 GiB" in greedy
    assert greedy.endswith("lower vllm.gpu_memory_utilization")


def test_every_worker_of_this_machine_counts(tmp_path: Path) -> None:
    one = estimate("dapo_qwen3_1.7b", tmp_path, 79)
    two = estimate("dapo_qwen3_1.7b", tmp_path, 79, "workers.count=2")
    assert not one.refusal
    assert "2 workers: KV cache" in two.refusal
    assert "; lower workers.count, or " in two.refusal
    assert any("2 workers on GPU 0: 23.7 GiB each" in line for line in two.lines)


def test_vllm_needs_room_for_one_sequence(tmp_path: Path) -> None:
    refusal = estimate("dapo_qwen3_1.7b", tmp_path, 79, "vllm.gpu_memory_utilization=0.045").refusal
    assert refusal.startswith(
        "vllm.gpu_memory_utilization leaves 359 MiB for vLLM's KV cache beside weights of 3.2 GiB"
    )
    assert "one sequence of 5120 tokens needs 560 MiB" in refusal
    given = estimate("dapo_qwen3_1.7b", tmp_path, 79, "vllm.kv_cache_gib=0.5").refusal
    assert given.startswith("vllm.kv_cache_gib leaves 512 MiB")


def test_a_tensor_must_fit_into_a_frame(tmp_path: Path) -> None:
    refusal = estimate("dapo_qwen2.5_math_7b", tmp_path, 140, "network.max_message_mb=1024").refusal
    assert refusal == "network.max_message_mb = 1024 is too small for the weights: the largest tensor has 1040 MiB"


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    config = recipe("dapo_qwen3_1.7b", tmp_path, "vllm.tensor_parallel_size=2")
    with pytest.raises(ConfigError, match=r"a worker would need 2 GPUs here, and there are 1: lower vllm\.tensor_p"):
        estimate_memory(config, Machine([80 * GIB], 0))


def test_what_is_no_decoder_with_attention_is_refused(tmp_path: Path) -> None:
    config = recipe("dapo_qwen3_1.7b", tmp_path)
    shape = {"model_type": "mamba", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match="MambaForCausalLM has no num_attention_heads, which a decoder"):
        estimate_memory(config, Machine([], 0))


def test_other_decoders_are_estimated_too() -> None:
    shape = shape_of(tiny("gpt2"))
    assert (shape.hidden_size, shape.intermediate_size, shape.heads, shape.kv) == (32, 128, 4, (2, 4, 8))


def test_on_a_cpu_everything_is_in_one_memory(tmp_path: Path) -> None:
    config = recipe("dapo_qwen3_1.7b", tmp_path, "workers.engine=torch", "workers.slots=8")
    small_machine = estimate_memory(config, Machine([], 40 * GIB))
    assert small_machine.refusal.startswith("this machine has 40.0 GiB, but this run needs about ")
    assert not estimate_memory(config, Machine([], 400 * GIB)).refusal
    shape_items = [line for line in small_machine.lines if " on this machine: " in line]
    assert len(shape_items) == 2  # learner and worker


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8589934592\n", 8 * GIB), ("max\n", 16 * GIB), (f"{17 * GIB}\n", 16 * GIB), ("", 16 * GIB), (None, 16 * GIB)],
)
def test_a_container_has_what_it_is_allowed(tmp_path: Path, text: str | None, expected: int) -> None:
    limit = tmp_path / "memory.max"
    if text is not None:
        limit.write_text(text)
    assert host_bytes(16 * GIB, limit) == expected


def test_the_reference_model_and_checkpoints_count() -> None:
    shape = shape_of(small("qwen3"))
    weights = 4 * shape.num_parameters
    plain, kl = settings(), settings(objective={"kl_coef": 0.1})

    def total(items: list[Item]) -> int:
        return sum(item.num_bytes for item in items)

    sides = [total(learner_device(shape, config, PLAIN)) for config in (plain, kl)]
    assert sides[1] - sides[0] == weights
    hosts = [total(learner_host(shape, plain, cuda=cuda)) for cuda in (False, True)]
    assert hosts[1] - hosts[0] == 3 * weights  # weights and moments, read whole at a resume
    vllm = settings(workers={"engine": "vllm"}, weights={"dtype": "bfloat16"})
    names = {item.what: item.num_bytes for item in worker_host(shape, vllm)}
    assert names["weights as a file in memory"] == weights // 2
    assert names["two sets of arriving weights"] == weights
    assert worker_device(shape, vllm, cuda=False)[0].num_bytes == weights // 2


def test_a_small_minibatch_bounds_the_microbatch() -> None:
    whole = settings(learner={"microbatch_tokens": 4096})
    assert microbatch_tokens(whole) == 4 * 4 * 20
    assert microbatch_tokens(settings(learner={"microbatch_tokens": 4096, "minibatches": 4})) == 4 * 20
