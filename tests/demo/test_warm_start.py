"""The supervised run and its optimizer: right loss, any split, and it learns."""

import math
import random
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from dapo_async.config.settings import Demo
from dapo_async.demo import warm_start as module
from dapo_async.demo.demo import make_model, make_tokenizer, warm_start_examples
from dapo_async.demo.muon import Muon, orthogonalized
from dapo_async.demo.warm_start import (
    Example,
    answer_loss_sum,
    backward,
    make_optimizers,
    microbatches,
    schedule,
    warm_start,
)

DEMO = msgspec.convert({"task": "sums", "hidden_size": 32, "layers": 1, "max_terms": 4}, Demo)


def tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return make_model(make_tokenizer(), DEMO)


def some_examples(number: int) -> list[Example]:
    stream = warm_start_examples(make_tokenizer(), DEMO, frozenset(), random.Random(0))
    return [next(stream) for _ in range(number)]


def gradients(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_is_that_of_the_answers_one_by_one() -> None:
    model, examples = tiny_model().double(), some_examples(7)
    assert {round(example.choice_weight, 3) for example in examples} == {
        round(DEMO.terse_share / 0.15, 3),
        round((1 - DEMO.terse_share) / 0.85, 3),
    }
    expected = 0.0
    for prompt_ids, answer_ids, choice_weight in examples:
        logits = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0]
        for at, token in enumerate(answer_ids):
            weight = 1.0 if at else choice_weight
            expected -= weight * functional.log_softmax(logits[len(prompt_ids) + at - 1], dim=-1)[token].item()
    assert answer_loss_sum(model, examples).item() == pytest.approx(expected, rel=1e-6)  # weights are float32


def test_gradient_does_not_depend_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split, examples = tiny_model().double(), tiny_model().double(), some_examples(12)
    one = backward(whole, examples)
    monkeypatch.setattr(module, "MICROBATCH_TOKENS", 40)
    assert len(list(microbatches(examples))) > 3
    assert backward(split, examples) == pytest.approx(one, rel=1e-12)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], gradient, rtol=1e-9, atol=1e-12)


def test_microbatches_hold_every_example_once_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MICROBATCH_TOKENS", 60)
    examples = some_examples(40)
    parts = list(microbatches(examples))
    assert sorted(e for part in parts for e in part) == sorted(examples)
    assert all(len(part) * max(e.num_tokens for e in part) <= 60 for part in parts)
    monkeypatch.setattr(module, "MICROBATCH_TOKENS", 1)
    assert [len(part) for part in microbatches(examples)] == [1] * 40


def test_learning_rate_rises_and_falls() -> None:
    factors = [schedule(i, 100) for i in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.001
    assert [schedule(0, 1), schedule(0, 2), schedule(1, 2)] == pytest.approx([1.0, 1.0, 0.5])


def test_a_short_warm_start_lowers_the_loss_and_tells_of_it() -> None:
    told: list[tuple[Any, ...]] = []
    stream = warm_start_examples(make_tokenizer(), DEMO, frozenset(), random.Random(0))
    losses = warm_start(tiny_model(), stream, 40, 16, 3e-2, lambda *words: told.append(words))
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(18), abs=0.2)  # a new model knows nothing: uniform over the vocabulary
    assert sum(losses[-5:]) / 5 < 1.8  # 1.3 to 1.5 over seeds
    assert told[0][:2] == (1, 40)
    assert told[-1] == (40, 40, "warm start")


def test_every_parameter_has_one_optimizer() -> None:
    model = tiny_model()
    optimizers = make_optimizers(model, 1e-3)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    assert isinstance(optimizers[0], Muon)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalized_keeps_the_singular_vectors_and_moves_the_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    result = orthogonalized(matrices)
    assert torch.linalg.svdvals(result).min() > 0.3
    assert torch.linalg.svdvals(result).max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.transpose(1, 2) @ result @ vh.transpose(1, 2)
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)


def test_muon_steps_by_hand_and_by_the_rms_of_adamw() -> None:
    matrices = [torch.nn.Parameter(torch.randn(16, 24)) for _ in range(2)]
    before = [m.detach().clone() for m in matrices]
    grads = [[torch.randn(16, 24) for _ in range(2)] for _ in range(2)]
    optimizer = Muon(matrices, lr=0.01, momentum=0.9)
    for step in grads:
        for matrix, grad in zip(matrices, step, strict=True):
            matrix.grad = grad.clone()
        optimizer.step()
    for matrix, start, first, second in zip(matrices, before, *grads, strict=True):
        buffer = 0.1 * first
        expected = start - 0.01 * 0.2 * 24**0.5 * orthogonalized((0.1 * first + 0.9 * buffer)[None])[0]
        buffer = 0.9 * buffer + 0.1 * second
        expected -= 0.01 * 0.2 * 24**0.5 * orthogonalized((0.1 * second + 0.9 * buffer)[None])[0]
        torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-6)
        assert 0.1 * 0.01 < (matrix.detach() - start).square().mean().sqrt() / 2 < 0.3 * 0.01
