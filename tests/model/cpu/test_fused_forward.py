"""The fused forward pass against the module's own: log-probs, loss and every gradient, and who may use it."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dapo_async.errors import ConfigError
from dapo_async.model.batching import MicroBatch, TrainSequence, build_microbatch, build_shared, plan_shared
from dapo_async.model.cpu.fused_forward import FusedForward
from dapo_async.model.cpu.proof import difference, prove
from dapo_async.model.forward_pass import PLAIN, ForwardPass
from dapo_async.model.policy import completion_logprobs
from tests.learner.test_update import answers, changed, gradients, make_model, make_update, settings, weights
from tests.model.model_cases import FUSED, HEADS, SMALL, VOCAB

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": False}),
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "qwen2_biases": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "llama_yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
}


def family(case: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A random model; norms and biases too, so that one which is forgotten shows."""
    torch.manual_seed(0)
    model_class, config_class, own = CASES[case]
    model: PreTrainedModel = model_class(config_class(**(SMALL | HEADS | own | changes)))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def ragged(groups: int = 3, size: int = 4, *, longest: int = 14) -> list[TrainSequence]:
    """Groups that share a prompt, with completions of 1 token and more."""
    rng, batch = np.random.default_rng(0), []
    for group in range(groups):
        prompt = rng.integers(VOCAB, size=rng.integers(1, 9)).astype(np.int32)
        for number in range(size):
            length = 1 if number == 1 else int(rng.integers(1, longest))
            batch.append(
                TrainSequence(
                    prompt,
                    rng.integers(VOCAB, size=length).astype(np.int32),
                    -rng.random(length).astype(np.float32),
                    advantage=float(rng.normal()),
                    group=group,
                )
            )
    return batch


def outcome(
    model: PreTrainedModel, batch: list[TrainSequence], parts: list[MicroBatch], *, fused: bool
) -> dict[str, torch.Tensor]:
    """Log-probs and entropies in batch order, the loss, and the gradient of every parameter, summed over ``parts``."""
    model.zero_grad()
    total = sum(len(sequence.token_ids) for sequence in batch)
    found = {name: torch.full((total,), torch.nan).double() for name in ("logp", "entropy")}
    loss = torch.zeros((), dtype=torch.float64)
    forward = FusedForward(model) if fused else None
    for micro in parts:
        logp, entropy = completion_logprobs(model, micro, temperature=0.8, chunk_tokens=16, forward=forward)
        assert entropy is not None
        part = ((logp - micro.behaviour_T).exp() * micro.advantage_T - 0.01 * entropy).sum()
        part.backward()
        loss += part.detach()
        found["logp"][micro.batch_T], found["entropy"][micro.batch_T] = (
            logp.detach().double(),
            entropy.detach().double(),
        )
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    return found | {"loss": loss} | gradient


def plain(model: PreTrainedModel, batch: list[TrainSequence]) -> dict[str, torch.Tensor]:
    """The module's own pass, one sequence at a time: no padding, nothing shared."""
    return outcome(model, batch, [build_microbatch(batch, [i], padded=True) for i in range(len(batch))], fused=False)


def shared(batch: list[TrainSequence], budget: int) -> list[MicroBatch]:
    return [build_shared(batch, indices) for indices in plan_shared(batch, budget)]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """``tolerance`` is relative to a tensor's largest number, or to 0.01 where all of them are rounding."""
    for name, tensor in expected.items():
        error = float((found[name] - tensor).abs().max())
        assert error <= tolerance * max(float(tensor.abs().max()), 1e-2), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [30, 70, 1000])
def test_it_equals_the_module_for_every_family_and_split(case: str, budget: int) -> None:
    """float64, but the module's own norms and angles are float32 whatever the type: 1e-6 leaves only that."""
    model, batch = family(case), ragged()
    parts = shared(batch, budget)
    assert (len(parts) > 1) == (budget < 1000)
    assert_equal(outcome(model, batch, parts, fused=True), plain(model, batch), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_module_in_the_precision_it_trains_in(case: str) -> None:
    """float32, through oneDNN. Sums of some hundred products of size one are off by 1e-5 of the result at most."""
    model, batch = family(case, torch.float32), ragged()
    assert_equal(outcome(model, batch, shared(batch, 70), fused=True), plain(model, batch), 1e-4)


def test_lengths_far_apart_and_equal_prompts_of_two_groups() -> None:
    """Blocks of many lengths, with prompts whose home is in another block."""
    model = family("qwen3")
    batch = ragged(3, 6, longest=60)
    batch += [sequence._replace(prompt_ids=batch[0].prompt_ids, group=3) for sequence in ragged(1, 3)]
    (micro,) = shared(batch, 2000)
    assert micro.blocks is not None
    assert len(micro.blocks) > 3
    assert sum(len(block.copy_E) for block in micro.blocks) > 0
    assert_equal(outcome(model, batch, [micro], fused=True), plain(model, batch), 1e-6)


def test_a_frozen_model_gets_no_gradient() -> None:
    """As a reference model."""
    model, batch = family("qwen3"), ragged()
    model.requires_grad_(False)
    logp, _ = completion_logprobs(
        model, shared(batch, 1000)[0], temperature=0.8, chunk_tokens=16, forward=FusedForward(model)
    )
    assert not logp.requires_grad


# --- in the update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_update_has_the_same_gradient_and_metrics(minibatches: int) -> None:
    config = settings(learner={"minibatches": minibatches}, optimizer={"grad_clip": 0.0})
    ends = [
        gradients(make_update(config, model=make_model(torch.float64), forward_pass=one), answers())
        for one in (FUSED, PLAIN)
    ]
    (ours, our_steps), (theirs, their_steps) = ends
    for mine, other in zip(our_steps, their_steps, strict=True):
        for name, gradient in other.items():
            torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-7)  # the module's norms are float32
    layout = {"batch/microbatches", "batch/padding_share", "batch/shared_share"}
    for name in theirs.metrics.keys() - layout:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], abs=1e-6), name
    assert ours.metrics["batch/padding_share"] == 0.0
    assert ours.metrics["batch/shared_share"] > 0.05
    assert theirs.metrics["batch/shared_share"] == 0.0


def test_the_budget_does_not_matter() -> None:
    """float64, so that what is left of a difference is rounding: loss and weights agree to 1e-9."""
    ends = []
    for budget in (20, 64, 4096):
        config = settings(learner={"microbatch_tokens": budget})
        update = make_update(config, model=make_model(torch.float64), forward_pass=FUSED)
        trained = update.train(answers(), 0, lambda: None)
        ends.append((trained.metrics["policy/loss"], weights(update)))
    for loss, tensors in ends[1:]:
        assert loss == pytest.approx(ends[0][0], abs=1e-7)  # weights and advantages travel as float32
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, ends[0][1][name], rtol=0, atol=1e-6)


def test_the_reference_model_has_its_own_pass() -> None:
    config = settings(objective={"kl_coef": 0.1})
    reference = make_model().requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    found = []
    for one in (FUSED, PLAIN):
        update = make_update(config, forward_pass=one, reference=reference)
        found.append(update.train(answers(), 0, lambda: None).metrics["policy/kl_reference"])
        assert changed(before, update)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] > 0


# --- who may use it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_whole_family_is_proved_and_nothing_is_left_behind(case: str) -> None:
    model = family(case, torch.float32)
    assert prove(FUSED, model) == FUSED
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_computes_something_else_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """Each change is one that names and shapes of the parameters do not show."""
    model = family("qwen3", torch.float32)
    model.model.norm.variance_epsilon = 0.3  # reads as the module does
    assert difference(model) == ""
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert "hidden states of the fused pass differs" in difference(model)
    with caplog.at_level(logging.WARNING):
        proved = prove(FUSED, model)
    assert (proved.fused, proved.layout) == (False, "padded")
    assert proved.obstacle == difference(model)
    assert "forward pass: the module's own: hidden states of the fused pass" in caplog.text
    with pytest.raises(ConfigError, match=r'model\.forward = "fused": hidden states .* use "auto"'):
        prove(FUSED._replace(wish="fused"), model)


def test_a_wrong_gradient_alone_is_found_out() -> None:
    model = family("qwen3", torch.float32)
    model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda _m, grads, _o: (2 * grads[0],))
    assert "the gradient of " in difference(model)


def test_adapters_are_left_to_the_module() -> None:
    class Adapter(nn.Linear):
        pass

    model = family("llama", torch.float32)
    model.model.layers[1].self_attn.v_proj = Adapter(32, 16, bias=False)
    with pytest.raises(ConfigError, match=r"layer 1 has a Adapter as self_attn\.v_proj"):
        prove(FUSED._replace(wish="fused"), model)


@pytest.mark.parametrize(
    ("chosen", "level"),
    [
        (PLAIN._replace(obstacle="it is told", wish="auto"), logging.WARNING),
        (PLAIN._replace(device_type="cuda", obstacle="it is told", wish="auto"), logging.INFO),
        (PLAIN, None),
    ],
    ids=["cpu", "cuda", "wished"],
)
def test_the_log_says_why_the_module_computes_unless_that_was_wished(
    chosen: ForwardPass, level: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert prove(chosen, family("llama")) == chosen
    said = [] if level is None else [(level, "forward pass: the module's own: it is told")]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == said
