"""Training one batch, on a real tiny model: what the update does to weights, and what leaves them alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.data.prompts import Prompt
from dapo_async.learner.update import TrainResult, Update
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.transport.messages import Completion, Group

VOCABULARY = 23


def settings(**tables: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "unused", "device": "cpu"},
        "data": {"train": "unused", "max_prompt_tokens": 8},
        "sampling": {"group_size": 4, "max_tokens": 12},
        "schedule": {"groups_per_batch": 4},
        "optimizer": {"lr": 1e-2, "warmup_batches": 0, "weight_decay": 0.0},
        "learner": {"microbatch_tokens": 64},
    }
    return build_config({name: base.get(name, {}) | tables.get(name, {}) for name in {*base, *tables}}, "test")


def make_model(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def make_update(config: Config, **parts: Any) -> Update:
    model = parts.pop("model", None) or make_model()
    accelerator = make_accelerator(config.model)
    optimizer = make_optimizer(model, config.optimizer, accelerator)
    forward_pass = parts.pop("forward_pass", PLAIN)
    return Update(config, model, optimizer, accelerator, forward_pass, **parts)


def answers(num_groups: int = 4, *, correct: str = "mixed", finish: str = "stop") -> list[RolloutGroup]:
    """Random groups of four completions of 1 to 12 tokens."""
    rng = np.random.default_rng(0)
    result = []
    for lease in range(num_groups):
        lengths = rng.integers(1, 13, 4)
        verdicts = {"mixed": [True, False, False, True], "wrong": [False] * 4}[correct]
        completions = [
            Completion(num_tokens=int(n), spans=[(0, int(n))], finish=finish, correct=c)  # type: ignore[arg-type]
            for n, c in zip(lengths, verdicts, strict=True)
        ]
        total = int(lengths.sum())
        group = Group(
            lease=lease,
            incarnation="",
            completions=completions,
            token_ids=rng.integers(0, VOCABULARY, total).astype(np.int32),
            logprobs=-rng.random(total).astype(np.float32) * 4,
        )
        prompt = Prompt(str(lease), rng.integers(0, VOCABULARY, int(rng.integers(1, 8))).astype(np.int32), "", "")
        result.append(RolloutGroup(lease, lease, prompt, group, "w0"))
    return result


def weights(update: Update) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in update.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], update: Update) -> bool:
    return any(not torch.equal(tensor, update.model.state_dict()[name]) for name, tensor in before.items())


def test_a_batch_moves_the_weights_and_says_how() -> None:
    update = make_update(settings())
    before = weights(update)
    trained = update.train(answers(), 0, lambda: None)
    assert changed(before, update)
    assert (trained.steps, trained.skipped) == (1, 0)
    assert trained.metrics["accuracy/trained"] == 0.5
    assert trained.metrics["batch/tokens"] == sum(sum(answer.lengths) for answer in answers())
    assert trained.metrics["batch/microbatches"] > 1
    assert trained.metrics["optimizer/grad_norm"] > 0
    assert all(math.isfinite(value) for value in trained.metrics.values())


def test_right_answers_become_more_likely() -> None:
    update = make_update(settings())
    batch = answers()

    def gap() -> float:
        """Mean log-prob of right completions minus that of wrong ones."""
        sums = {True: 0.0, False: 0.0}
        for answer in batch:
            end = np.cumsum(answer.lengths)
            for i, completion in enumerate(answer.group.completions):
                own = answer.group.token_ids[end[i] - completion.num_tokens : end[i]]
                ids = torch.tensor(np.concatenate([answer.prompt.ids, own]), dtype=torch.long)
                with torch.no_grad():
                    logp = update.model(ids[None]).logits[0].log_softmax(-1)
                place = torch.arange(len(answer.prompt.ids) - 1, len(ids) - 1)
                sums[completion.correct] += float(logp[place, ids[place + 1]].sum())
        return sums[True] - sums[False]

    before = gap()
    for number in range(3):
        update.train(batch, number, lambda: None)
    assert gap() > before


def gradients(update: Update, batch: list[RolloutGroup]) -> tuple[TrainResult, list[dict[str, torch.Tensor]]]:
    """The gradient of each optimizer step of the batch. The steps are not taken."""
    found: list[dict[str, torch.Tensor]] = []
    update.optimizer.step = lambda: found.append(  # type: ignore[method-assign]
        {name: parameter.grad.clone() for name, parameter in update.model.named_parameters()}
    )
    return update.train(batch, 0, lambda: None), found


def test_each_optimizer_step_is_of_its_own_groups_only() -> None:
    """Every second group each: the second step's gradient is that of a batch of just these groups."""
    batch = answers()
    two = settings(learner={"minibatches": 2}, optimizer={"grad_clip": 0.0})
    one = settings(schedule={"groups_per_batch": 2}, optimizer={"grad_clip": 0.0})
    _, (_, second) = gradients(make_update(two, model=make_model(torch.float64)), batch)
    _, (alone,) = gradients(make_update(one, model=make_model(torch.float64)), batch[1::2])
    for name, gradient in second.items():
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-9)


def test_the_gradient_is_that_of_the_papers_formula() -> None:
    """DAPO's objective (Eq. 8) written out token by token, one sequence at a time, for the whole batch."""
    update = make_update(settings(optimizer={"grad_clip": 0.0}), model=make_model(torch.float64))
    batch = answers()
    model = make_model(torch.float64)
    total = sum(sum(answer.lengths) for answer in batch)
    loss = torch.zeros((), dtype=torch.float64)
    for answer in batch:
        rewards = np.array([1.0 if right else -1.0 for right in answer.correct])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        end = np.cumsum(answer.lengths)
        for i, advantage in enumerate(advantages):
            own = slice(end[i] - answer.lengths[i], end[i])
            ids = torch.tensor(np.concatenate([answer.prompt.ids, answer.group.token_ids[own]]), dtype=torch.long)
            logp = model(ids[None]).logits[0].log_softmax(-1)[len(answer.prompt.ids) - 1 : -1]
            chosen = logp.gather(1, ids[len(answer.prompt.ids) :, None])[:, 0]
            ratio = torch.exp(chosen - torch.tensor(answer.group.logprobs[own], dtype=torch.float64))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            if advantage < 0:
                surrogate = torch.maximum(surrogate, torch.tensor(10.0 * advantage))
            loss = loss - surrogate.sum() / total
    loss.backward()

    trained, (stepped,) = gradients(update, batch)
    assert trained.metrics["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stepped[name], parameter.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_the_microbatch_budget_does_not_matter(minibatches: int) -> None:
    """float64, so that what is left of a difference is rounding: loss and weights agree to 1e-9."""
    ends = []
    for budget in (20, 64, 4096):
        config = settings(learner={"microbatch_tokens": budget, "minibatches": minibatches})
        update = make_update(config, model=make_model(torch.float64))
        trained = update.train(answers(), 0, lambda: None)
        assert trained.steps == minibatches
        ends.append((trained.metrics["policy/loss"], weights(update)))
    for loss, tensors in ends[1:]:
        assert loss == pytest.approx(ends[0][0], abs=1e-7)  # weights and advantages travel as float32
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, ends[0][1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        {"clip_high": 0.2, "dual_clip": 0.0, "aggregation": "seq-mean-token-mean", "kl_coef": 0.05},  # GRPO
        {"advantage_std": False, "aggregation": "seq-mean-token-sum-norm"},  # Dr. GRPO
        {"ratio_against": "proximal", "correction": "full"},  # decoupled PPO
        {"ratio_against": "proximal", "correction": "truncate"},  # TIS
        {"ratio_against": "proximal", "correction": "mask"},  # IcePop
        {"ratio_against": "proximal", "correction": "m2po"},
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean"},  # GSPO
        {"surrogate": "cispo"},
        {"entropy_coef": 0.01},
    ],
    ids=["grpo", "dr_grpo", "decoupled", "tis", "icepop", "m2po", "gspo", "cispo", "entropy"],
)
def test_every_objective_trains(objective: dict[str, Any]) -> None:
    config = settings(objective=objective, learner={"microbatch_tokens": 64, "minibatches": 2})
    reference = make_model().requires_grad_(False) if "kl_coef" in objective else None
    update = make_update(config, reference=reference)
    before = weights(update)
    trained = update.train(answers(), 0, lambda: None)
    assert changed(before, update)
    assert trained.steps == 2
    assert ("policy/kl_reference" in trained.metrics) == (reference is not None)


def test_the_kl_penalty_pulls_towards_the_reference() -> None:
    """Nothing to learn from rewards (all wrong, equal lengths do not matter): the penalty is the whole loss."""
    config = settings(objective={"kl_coef": 1.0}, schedule={"groups_per_batch": 4, "filter": False})
    reference = make_model().requires_grad_(False)
    update = make_update(config, reference=reference)
    with torch.no_grad():
        for parameter in update.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    distances = [
        update.train(answers(correct="wrong"), n, lambda: None).metrics["policy/kl_reference"] for n in range(8)
    ]
    assert distances[-1] < 0.7 * distances[0]


def test_a_group_without_spread_changes_nothing() -> None:
    update = make_update(settings(schedule={"groups_per_batch": 4, "filter": False}))
    before = weights(update)
    trained = update.train(answers(correct="wrong"), 0, lambda: None)
    assert trained.metrics["optimizer/grad_norm"] == 0.0
    assert not changed(before, update)


def test_the_overlong_filter_masks_truncated_completions() -> None:
    update = make_update(settings(reward={"overlong_filter": True}))
    before = weights(update)
    trained = update.train(answers(finish="length"), 0, lambda: None)
    assert trained.metrics["policy/loss"] == 0.0
    assert trained.metrics["length/truncated_share"] == 1.0
    assert not changed(before, update)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_counted_and_forgotten(poison: float) -> None:
    update = make_update(settings())
    hook = update.model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: output * poison)
    before = weights(update)
    trained = update.train(answers(), 0, lambda: None)
    assert (trained.steps, trained.skipped) == (0, 1)
    assert not changed(before, update)
    hook.remove()
    trained = update.train(answers(), 1, lambda: None)
    assert (trained.steps, trained.skipped) == (1, 0)
    assert all(torch.isfinite(tensor).all() for tensor in weights(update).values())


def test_an_interrupted_batch_leaves_the_model_as_it_was_and_can_be_trained_again() -> None:
    class Enough(Exception):
        pass

    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Enough

    update, untouched = make_update(settings()), make_update(settings())
    with pytest.raises(Enough):
        update.train(answers(), 0, tick)
    assert not changed(weights(untouched), update)
    update.train(answers(), 0, lambda: None)
    untouched.train(answers(), 0, lambda: None)
    assert not changed(weights(untouched), update)


def test_warm_up_by_batches() -> None:
    update = make_update(settings(optimizer={"lr": 1e-2, "warmup_batches": 4, "weight_decay": 0.0}))
    rates = [update.train(answers(), number, lambda: None).metrics["optimizer/lr"] for number in range(6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
