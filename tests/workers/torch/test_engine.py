"""The embedded engine: exact log-probs, batch invariance to the bit, seeds, versions, swaps, and slot bookkeeping."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from dapo_async.errors import ConfigError, WeightsError
from dapo_async.model.kv_cache import slot_cells
from workers.engine import CompletionOutput, Request
from workers.sampling import completion_keys, sample, uniforms
from workers.torch import engine as torch_engine
from workers.torch import slot_cache
from workers.torch.decoders import ModuleDecoder, build_decoder
from workers.torch.engine import TorchEngine
from workers.torch.fused_decoder import FusedDecoder
from workers.torch.slot_cache import SlotCache, attend, causal_bias, spread_bias

VOCAB = 20
STOP = 3
MAX_LEN = 72

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": STOP,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**GROUPED, attention_bias=True, tie_word_embeddings=False),
    "gpt2": GPT2Config(**SHAPE),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose logits spread enough for tokens, positions and weights to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def engine_of(kind: str = "qwen3", *, slots: int = 8, stops: tuple[int, ...] = (), **more) -> TorchEngine:
    return TorchEngine(model_of(kind), slots=slots, max_len=MAX_LEN, stop_token_ids=stops, **more)


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).astype(np.int32)


def request_of(key: object, length: int = 7, samples: int = 1, max_tokens: int = 20, **more) -> Request:
    seed = more.pop("seed", 11)
    return Request(key, prompt_of(length), samples, seed, max_tokens, **more)


def drain(engine: TorchEngine) -> dict[tuple, CompletionOutput]:
    done = {}
    while engine.running or engine.waiting:
        done.update({(f.key, f.index): f for f in engine.step()})
    return done


def same_bits(one: CompletionOutput, other: CompletionOutput) -> bool:
    return one.token_ids.tobytes() == other.token_ids.tobytes() and one.logprobs.tobytes() == other.logprobs.tobytes()


@torch.no_grad()
def reference(model: PreTrainedModel, request: Request, token_ids: np.ndarray) -> np.ndarray:
    """Log-probs of ``token_ids`` by one full eager forward and a float64 nucleus written out token by token."""
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(np.concatenate((request.prompt_ids, token_ids)).astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, len(request.prompt_ids) - 1 : -1].double() / request.temperature
    result = []
    for row, token in zip(logits.log_softmax(-1).exp().tolist(), token_ids, strict=True):
        kept, mass = [], 0.0
        for index in sorted(range(VOCAB), key=lambda i, row=row: -row[i]):
            if mass < request.top_p or request.top_p == 1.0:
                kept.append(index)
                mass += row[index]
        assert token in kept
        result.append(np.log(row[token] / sum(row[i] for i in kept)))
    return np.array(result)


# --- log-probs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.6)])
def test_logprobs_equal_a_full_forward(kind: str, temperature: float, top_p: float) -> None:
    engine = engine_of(kind)
    requests = [request_of(n, n, 2, 30, temperature=temperature, top_p=top_p) for n in (1, 5, 16, 33)]
    for request in requests:
        engine.add(request)
    done = drain(engine)
    plain = model_of(kind)
    for request in requests:
        for index in range(2):
            found = done[request.key, index]
            assert len(found.token_ids) == 30
            np.testing.assert_allclose(
                found.logprobs, reference(plain, request, found.token_ids), atol=1e-5, rtol=0, err_msg=str(request.key)
            )


def test_low_temperature_follows_the_likeliest_token() -> None:
    engine, request = engine_of(), request_of("a", max_tokens=15, temperature=1e-3)
    engine.add(request)
    found = drain(engine)["a", 0]
    model = model_of("qwen3")
    ids = request.prompt_ids.astype(np.int64).tolist()
    for token in found.token_ids.tolist():
        with torch.no_grad():
            assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


# --- batch invariance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap_bytes", [0, slot_cache.GAP_BYTES])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_completion_does_not_depend_on_its_neighbours(
    kind: str, gap_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_cache, "GAP_BYTES", gap_bytes)  # 0: as few cells are viewed as can be
    probes = [request_of("x", 9, 3, 40), request_of("y", 17, 1, 25, top_p=0.9)]
    probes.append(request_of("z", 1, 2, 12, temperature=0.6))
    alone = {}
    for probe in probes:
        engine = engine_of(kind, slots=1)
        engine.add(probe)
        alone.update(drain(engine))
    crowd, rng = engine_of(kind, slots=24), np.random.default_rng(5)
    waiting = [request_of(n, int(rng.integers(1, 30)), 1, int(rng.integers(1, 40)), seed=n) for n in range(60)]
    for place, probe in zip((10, 25, 50), probes, strict=True):
        waiting.insert(place, probe)
    done: dict[tuple, CompletionOutput] = {}
    while waiting or crowd.running or crowd.waiting:
        for _ in range(int(rng.integers(0, 4))):
            if waiting:
                crowd.add(waiting.pop(0))
        done.update({(f.key, f.index): f for f in crowd.step()})
    assert len(done) == 66
    for name, expected in alone.items():
        assert same_bits(done[name], expected), name


def test_a_cell_beyond_a_row_s_own_length_changes_no_bit() -> None:
    first = engine_of(slots=8)
    first.add(request_of("a", max_tokens=30))
    expected = drain(first)["a", 0]
    other = engine_of(slots=8)
    other._cache.kv.fill_(1e4)
    other.add(request_of("a", max_tokens=30))
    assert same_bits(drain(other)["a", 0], expected)


def test_a_step_views_all_cells_where_it_could_leave_out_only_a_few() -> None:
    small = SlotCache((1, 1, 32), 8, 80, torch.float32, torch.device("cpu"))
    assert [small.view_length(length) for length in (1, 40, 47, 49, 56, 80)] == [16, 48, 48, 80, 80, 80]
    large = SlotCache((1, 1, 32), 8, 4000, torch.float32, torch.device("cpu"))
    assert [large.view_length(length) for length in (48, 3000, 3968, 3969)] == [48, 3008, 3968, 4000]


def test_prompts_that_start_next_are_read_in_the_same_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for several of them; not beyond the budget, and not again unless the weights change."""
    engine, passes = engine_of(slots=4), []
    forward = engine._forward

    def watched(rows: int, unread: list[Any]) -> torch.Tensor:
        passes.append([item.request.key for item in unread])
        return forward(rows, unread)

    monkeypatch.setattr(engine, "_forward", watched)
    for key in range(4):
        engine.add(request_of(key, samples=6 if key == 0 else 4, max_tokens=3))
    engine.step()
    for item in list(engine._waiting)[1:]:
        for kept in (item.prefix, item.logits):
            assert kept.untyped_storage().nbytes() == kept.nbytes, "it keeps the whole pass alive"
    engine.swap(1, weights_of(model_of("qwen3")))
    done = drain(engine)
    assert [keys for keys in passes if keys] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    alone = engine_of(slots=4)
    alone.swap(1, weights_of(model_of("qwen3")))
    alone.add(request_of(2, samples=4, max_tokens=3))
    assert all(same_bits(done[name], found) for name, found in drain(alone).items())
    monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", 13)
    passes.clear()
    for key in range(4):
        engine.add(request_of(key, 6, samples=4, max_tokens=3))
    drain(engine)
    assert [keys for keys in passes if keys] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("group", "dim"), [(1, 8), (2, 16), (4, 32), (7, 64)])
def test_attention_is_exact_and_blind_to_masked_keys_and_other_rows(group: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(8, n, dim, generator=generator) for n in (group, 640, 640))
    for own in (3, 100, 130, 200, 390):
        shortest = slot_cells(own, dim)

        def mixed(rows: int, length: int, own: int = own) -> torch.Tensor:
            bias = spread_bias(causal_bias(torch.full((rows, 1), own - 1), length, torch.float32), 1, group)
            return attend(query[:rows], keys[:rows, :length], values[:rows, :length], bias, 0.3)

        expected = mixed(8, shortest)
        scores = (query.double() @ keys[:, :own].double().transpose(1, 2) * 0.3).softmax(-1)
        torch.testing.assert_close(expected.double(), scores @ values[:, :own].double(), atol=1e-5, rtol=0)
        for length in {*(slot_cells(longer, dim) for longer in range(shortest, 640, 48)), 640}:  # the last: all cells
            assert torch.equal(mixed(8, length), expected), (own, length)
            assert torch.equal(mixed(2, length), expected[:2]), (own, length)


def test_long_sequences_equal_a_full_forward_and_ignore_short_neighbours() -> None:
    config = LlamaConfig(**{**GROUPED, "num_key_value_heads": 1, "max_position_embeddings": 320, "head_dim": 16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = [request_of(length, length, 1, 12) for length in (3, 120, 190, 300)]
    alone, together = {}, TorchEngine(copy.deepcopy(model), slots=8, max_len=312, stop_token_ids=[])
    for request in requests:
        engine = TorchEngine(copy.deepcopy(model), slots=1, max_len=312, stop_token_ids=[])
        engine.add(request)
        together.add(request)
        alone.update(drain(engine))
    for (key, index), found in drain(together).items():
        assert same_bits(found, alone[key, index])
    for request in requests:
        found = alone[request.key, 0]
        np.testing.assert_allclose(found.logprobs, reference(model, request, found.token_ids), atol=1e-5, rtol=0)


def test_shared_prefill_equals_separate_prefill() -> None:
    together, narrow = engine_of(slots=8), engine_of(slots=2)
    for engine in (together, narrow):
        engine.add(request_of("a", samples=8))
    one, other = drain(together), drain(narrow)
    assert all(same_bits(one[name], other[name]) for name in one)


def test_a_small_prefill_budget_delays_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for budget in (8192, 12):
        monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", budget)
        engine = engine_of(slots=12, kv_cache="recompute")
        for key in range(5):
            engine.add(request_of(key, 6 + key, 3, 15))
        engine.step()
        assert engine.running == (12 if budget == 8192 else 3)
        for _ in range(4):
            engine.step()
        engine._stale = True  # the same weights: reading everything again must not be seen
        results.append(drain(engine))
    for name, found in results[0].items():
        assert found.token_ids.tolist() == results[1][name].token_ids.tolist()
        np.testing.assert_allclose(found.logprobs, results[1][name].logprobs, atol=1e-5, rtol=0)


# --- seeds -------------------------------------------------------------------------------------------------


def test_same_seed_same_tokens_other_seed_or_index_other_tokens() -> None:
    engine = engine_of()
    for key, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine.add(request_of(key, samples=2, seed=seed))
    done = drain(engine)
    assert same_bits(done["a", 0], done["b", 0])
    assert same_bits(done["a", 1], done["b", 1])
    texts = {done[name].token_ids.tobytes() for name in (("a", 0), ("a", 1), ("c", 0), ("c", 1))}
    assert len(texts) == 4


def test_first_tokens_follow_the_probabilities() -> None:
    draws, engine, request = 4000, engine_of(slots=256), request_of("a", samples=4000, max_tokens=1)
    engine.add(request)
    counts = np.bincount([f.token_ids[0] for f in drain(engine).values()], minlength=VOCAB)
    model = model_of("qwen3")
    with torch.no_grad():
        ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        expected = model(input_ids=ids).logits[0, -1].softmax(-1).numpy() * draws
    likely = expected > 5
    statistic = (((counts - expected) ** 2 / expected)[likely]).sum()
    # Five standard deviations of chi-square above its mean.
    assert statistic < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_uniforms_are_even_and_independent_of_their_batch() -> None:
    keys, counters = np.repeat(completion_keys(7, 0, 64), 500), np.tile(np.arange(500), 64)
    drawn = uniforms(keys, counters)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 320) ** 2 / 320).sum() < 99 + 5 * np.sqrt(198)
    grid = drawn.reshape(64, 500)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert uniforms(keys[1234:1235], counters[1234:1235])[0] == drawn[1234]
    assert completion_keys(7, 5, 3).tolist() == completion_keys(7, 0, 8)[5:].tolist()


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, top_p: float | None) -> None:
    logits = torch.full((3, 6), -torch.inf)
    logits[0, 2] = logits[1, 1] = logits[1, 4] = logits[2, 5] = 1.0
    nucleus = None if top_p is None else torch.full((3,), top_p)
    tokens, logprobs = sample(logits, torch.ones(3), nucleus, torch.full((3,), uniform, dtype=torch.float64))
    assert tokens.tolist() == [2, 1 if uniform < 0.5 else 4, 5]
    np.testing.assert_allclose(logprobs, [0.0, np.log(0.5), 0.0], atol=1e-6)


def test_nucleus_keeps_the_fewest_tokens_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().repeat(3, 1)
    top_p = torch.tensor([0.5, 0.7, 1.0])
    tokens, logprobs = sample(logits, torch.ones(3), top_p, torch.full((3,), 0.999, dtype=torch.float64))
    assert tokens.tolist() == [0, 2, 2]
    np.testing.assert_allclose(logprobs, np.log([1.0, 0.3 / 0.8, 0.3]), atol=1e-6)


# --- life of a completion ----------------------------------------------------------------------------------


def test_stop_token_ends_a_completion_and_is_part_of_it() -> None:
    free, engine = engine_of(slots=16), engine_of(slots=16, stops=(STOP, 5))
    for each in (free, engine):
        each.add(request_of("a", samples=16, max_tokens=40))
    unstopped, done = drain(free), drain(engine)
    assert {f.finish for f in done.values()} == {"stop", "length"}
    for name, found in done.items():
        whole = unstopped[name].token_ids
        hits = np.flatnonzero((whole == STOP) | (whole == 5))
        assert len(found.token_ids) == (hits[0] + 1 if len(hits) else 40)
        assert found.finish == ("stop" if len(hits) else "length")
        assert found.token_ids.tolist() == whole[: len(found.token_ids)].tolist()
        assert (found.token_ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)


def test_more_work_than_slots_all_finishes_in_order_of_arrival() -> None:
    engine = engine_of(slots=5)
    for n in range(30):
        engine.add(request_of(n, 1 + n % 20, 1 + n % 3, 1 + n % 11))
    total = sum(1 + n % 3 for n in range(30))
    assert (engine.running, engine.waiting) == (0, total)
    first_seen: list[int] = []
    done = {}
    while engine.running or engine.waiting:
        done.update({(f.key, f.index): f for f in engine.step()})
        first_seen += sorted({item.request.key for item in engine._running} - set(first_seen))
        assert engine.running <= 5
        assert engine.running + engine.waiting + len(done) == total
    assert len(done) == total
    assert first_seen == sorted(first_seen)
    assert all(len(found.token_ids) == 1 + key % 11 for (key, _), found in done.items())
    assert engine.step() == []
    assert engine.prefill_s > 0


def test_cancel_drops_running_and_waiting_and_leaves_the_rest_alone() -> None:
    quiet = engine_of(slots=4)
    quiet.add(request_of("keep", 8, 2, 30))
    expected = drain(quiet)
    engine = engine_of(slots=4)
    for key, samples in (("gone", 3), ("keep", 2), ("late", 2)):
        engine.add(request_of(key, 8, samples, 30))
    for _ in range(5):
        engine.step()
    for key in ("gone", "late", "unknown"):
        engine.cancel(key)
    assert (engine.running, engine.waiting) == (1, 1)
    done = drain(engine)
    assert set(done) == set(expected)
    assert all(same_bits(done[name], expected[name]) for name in expected)


def test_impossible_requests_are_refused() -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match=r"prompt \(50 tokens\) and max_tokens \(23\) of a exceed .* \(72 tokens\)"):
        engine.add(request_of("a", 50, max_tokens=23))
    engine.add(request_of("a", 50, max_tokens=22))
    with pytest.raises(ValueError, match="key a is still in the engine"):
        engine.add(request_of("a"))
    for bad in ({"temperature": 0.0}, {"top_p": 0.0}, {"samples": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="needs num_samples and max_tokens"):
            engine.add(request_of("b", **bad))
    for ids in ([], [VOCAB], [-1]):
        with pytest.raises(ValueError, match=r"must be token ids in 0 \.\. 19"):
            engine.add(Request("c", np.array(ids, dtype=np.int32), 1, 0, 5))


# --- weights -----------------------------------------------------------------------------------------------


def run_across_swap(
    kv_cache: str, kind: str = "qwen3", fused: bool = True
) -> tuple[Request, dict[tuple, CompletionOutput]]:
    engine = engine_of(kind, slots=4, kv_cache=kv_cache, fused=fused)
    engine.swap(5, weights_of(model_of(kind, 0)))
    request = request_of("a", 9, 6, 24)
    engine.add(request)
    for _ in range(10):
        engine.step()
    engine.swap(6, weights_of(model_of(kind, 1)))
    return request, drain(engine)


@pytest.mark.parametrize(("kind", "fused"), [("qwen3", True), ("qwen3", False), ("gpt2", False)])
def test_recompute_continues_as_if_the_new_weights_had_read_it_all(kind: str, fused: bool) -> None:
    request, done = run_across_swap("recompute", kind, fused)
    old, new = model_of(kind, 0), model_of(kind, 1)
    for index in range(4):
        found = done["a", index]
        assert found.spans == [(5, 10), (6, 14)]
        np.testing.assert_allclose(found.logprobs[:10], reference(old, request, found.token_ids)[:10], atol=1e-5)
        np.testing.assert_allclose(found.logprobs[10:], reference(new, request, found.token_ids)[10:], atol=1e-5)


def test_keep_continues_on_the_old_cells_and_starts_new_ones_fresh() -> None:
    request, done = run_across_swap("keep")
    old, new = model_of("qwen3", 0), model_of("qwen3", 1)
    for index in range(4):
        found = done["a", index]
        assert found.spans == [(5, 10), (6, 14)]
        np.testing.assert_allclose(found.logprobs[:10], reference(old, request, found.token_ids)[:10], atol=1e-5)
        assert np.abs(found.logprobs[10:] - reference(new, request, found.token_ids)[10:]).max() > 1e-2
    for index in (4, 5):  # had no slot before the swap: the shared prefill of the old weights must not serve them
        found = done["a", index]
        assert found.spans == [(6, 24)]
        np.testing.assert_allclose(found.logprobs, reference(new, request, found.token_ids), atol=1e-5)


def test_spans_count_swaps_before_between_and_without_tokens() -> None:
    engine, weights = engine_of(slots=2), weights_of(model_of("qwen3"))
    engine.add(request_of("a", max_tokens=7))
    assert engine.version == -1
    for version, steps in ((0, 0), (1, 2), (2, 0), (3, 1), (3, 1)):
        engine.swap(version, weights)
        for _ in range(steps):
            engine.step()
    engine.swap(9, weights)
    assert drain(engine)["a", 0].spans == [(1, 2), (3, 2), (9, 3)]
    assert engine.version == 9


def test_a_version_cannot_fall_under_running_completions() -> None:
    engine, weights = engine_of(), weights_of(model_of("qwen3"))
    engine.swap(4, weights)
    engine.add(request_of("a"))
    engine.step()
    with pytest.raises(WeightsError, match="version 3 cannot follow 4"):
        engine.swap(3, weights)
    engine.cancel("a")
    engine.swap(3, weights)
    assert engine.version == 3


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_refused_weights_leave_the_old_ones_serving(kind: str) -> None:
    calm, engine = engine_of(kind), engine_of(kind)
    for each in (calm, engine):
        each.add(request_of("a", samples=3))
    good = weights_of(model_of(kind, 1))
    first, last = next(iter(good)), list(good)[-1]
    broken = [
        ({name: tensor for name, tensor in good.items() if name != last}, f"lack {last}"),
        (good | {"model.extra": torch.zeros(2)}, "no tensor model.extra"),
        (good | {last: torch.zeros(3, 3, 3)}, rf"{last} must be torch.float32 \[.*\], got .* \[3, 3, 3\]"),
        (good | {last: good[last].bfloat16()}, f"{last} must be torch.float32"),
        (good | {last: torch.full_like(good[last], torch.nan)}, f"{last} holds values that are not finite"),
        (good | {first: torch.full_like(good[first], torch.inf)}, f"{first} holds values that are not finite"),
    ]
    if kind == "qwen3":
        broken.append((good | {"lm_head.weight": good[first] + 1}, "one tied tensor in the model"))
    for weights, message in broken:
        engine.step()
        calm.step()
        with pytest.raises(WeightsError, match=message):
            engine.swap(7, weights)
    assert engine.version == -1
    expected, found = drain(calm), drain(engine)
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_may_come_under_either_name(name: str) -> None:
    engine, weights = engine_of(), weights_of(model_of("qwen3", 1))
    weights[name] = weights.pop("model.embed_tokens.weight")
    engine.swap(0, weights)
    request = request_of("a")
    engine.add(request)
    found = drain(engine)["a", 0]
    np.testing.assert_allclose(found.logprobs, reference(model_of("qwen3", 1), request, found.token_ids), atol=1e-5)


def test_weights_that_overflow_are_named() -> None:
    engine = engine_of()
    weights = weights_of(model_of("qwen3"))
    weights["model.norm.weight"].fill_(3e38)
    engine.swap(2, weights)
    engine.add(request_of("a"))
    with pytest.raises(WeightsError, match="version 2 give log-probs that are not finite"):
        engine.step()


# --- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_fused_decoder_equals_the_module(kind: str) -> None:
    fused, plain = build_decoder(model_of(kind), MAX_LEN), build_decoder(model_of(kind), MAX_LEN, fused=False)
    assert isinstance(fused, FusedDecoder)
    assert isinstance(plain, ModuleDecoder)
    assert fused.kv_shape == plain.kv_shape
    prompts = [prompt_of(length, 3) for length in (1, 5, 16, 17, 33, 7, 2, 20)]
    tokens = torch.from_numpy(np.stack([prompt[0] for prompt in prompts])).long()
    positions, none = torch.tensor([len(prompt) for prompt in prompts]), torch.zeros(0, dtype=torch.int64)
    results = []
    with torch.inference_mode():
        for decoder in (fused, plain):
            cache = SlotCache(decoder.kv_shape, 8, 48, torch.float32, torch.device("cpu"))
            read, prefixes = decoder.run(none, none, cache, 0, prompts)
            for row, prefix in enumerate(prefixes):
                cache.share(row, row + 1, prefix)
            apart, _ = decoder.run(tokens, positions, cache, 48, [])
            mixed, again = decoder.run(tokens, positions, cache, 48, prompts)
            assert torch.equal(mixed, torch.cat((apart, read)))
            assert all(torch.equal(one, other) for one, other in zip(prefixes, again, strict=True))
            true = [prefix[:, :, :, : len(prompt)] for prefix, prompt in zip(prefixes, prompts, strict=True)]
            results.append((mixed, *true))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_a_model_folder_is_enough(tmp_path) -> None:
    model_of("llama", 1).save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, slots=2, max_len=MAX_LEN, stop_token_ids=[STOP])
    engine.swap(0, weights_of(model_of("llama", 1)))
    request = request_of("a", max_tokens=10)
    engine.add(request)
    found = drain(engine)["a", 0]
    np.testing.assert_allclose(found.logprobs, reference(model_of("llama", 1), request, found.token_ids), atol=1e-5)
    engine.close()


def test_what_cannot_be_served_is_refused_in_a_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no causal language model can be built from"):
        TorchEngine(tmp_path / "absent", slots=2, max_len=8, stop_token_ids=[])
    for wrong in ({"kv_cache": "drop"}, {"slots": 0}):
        with pytest.raises(ConfigError, match='kv_cache must be "keep" or "recompute", slots at least 1'):
            engine_of(**wrong)
    with pytest.raises(ConfigError, match=r"stop_token_ids \[20\] must lie in the vocabulary of 20 tokens"):
        engine_of(stops=(VOCAB,))
    with pytest.raises(ConfigError, match="200 tokens exceed the 128 positions of gpt2"):
        TorchEngine(model_of("gpt2"), slots=2, max_len=200, stop_token_ids=[])
    with pytest.raises(ConfigError, match="sliding window of 16 tokens"):
        TorchEngine(small("mistral", sliding_window=16), slots=2, max_len=MAX_LEN, stop_token_ids=[])
    with pytest.raises(ConfigError, match="bloom cannot run on the torch engine"):
        TorchEngine(small("bloom"), slots=2, max_len=MAX_LEN, stop_token_ids=[])
    with pytest.raises(ConfigError, match="serves full attention; mamba also has linear_attention"):
        TorchEngine(small("mamba"), slots=2, max_len=MAX_LEN, stop_token_ids=[])


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = model_of("gpt2")
    attention = model.transformer.h[0].attn

    def louder(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        return (output[0] * (1.0 if module.config._attn_implementation == "eager" else 1.1), *output[1:])

    attention.register_forward_hook(louder)
    with pytest.raises(ConfigError, match=r"gpt2 computes attention in a way .* \(its logits differ by"):
        TorchEngine(model, slots=2, max_len=MAX_LEN, stop_token_ids=[])
    with pytest.raises(ConfigError, match="uses softcap, which the torch engine does not compute"):
        TorchEngine(small("gemma2", head_dim=16), slots=2, max_len=MAX_LEN, stop_token_ids=[])


def small(kind: str, **more) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "mistral": GROUPED,
        "gemma2": GROUPED,
        "bloom": {**SHAPE, "n_layer": 2, "n_head": 4},
        "mamba": {"vocab_size": VOCAB},
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes[kind], **more))
