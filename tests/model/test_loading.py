"""``model``: loading, device, precision and optimizer, and what is refused."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Gemma2Config, Gemma2ForCausalLM

from dapo_async.config import settings as config
from dapo_async.errors import ConfigError
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.policy import check_policy, load_policy, make_accelerator, make_optimizer
from dapo_async.model.tokenizer import load_tokenizer
from tests.model.model_cases import (
    CPU,
    HEADS,
    SMALL,
    batch_logprobs,
    make_batch,
    plain_logprobs,
    save,
    summed_gradient,
    tiny,
)

torch.set_num_threads(1)


def test_generation_settings_that_contradict_each_other_do_not_make_checkpoints_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers loads them with a word in its log, and then refuses to save the model."""
    settings = save(tiny("llama"), tmp_path / "model")
    contradicting = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1, "pad_token_id": -1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(contradicting))
    model = load_policy(settings, PLAIN, CPU)
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 1
    assert "temperature" not in kept
    assert "generation settings that contradict each other" in caplog.text


def test_loads_a_folder_in_float32_with_equal_logprobs(tmp_path: Path) -> None:
    original, batch = tiny("qwen3"), make_batch()
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = load_policy(save(copy.deepcopy(original).bfloat16(), tmp_path), PLAIN, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        logp, _ = batch_logprobs(model, batch, padded=True)
        want, _ = plain_logprobs(original, batch, 0.8)
    torch.testing.assert_close(logp, want.double(), rtol=0, atol=1e-5)


def test_gradient_checkpointing_recomputes_and_dropout_stays_off(tmp_path: Path) -> None:
    settings = save(tiny("gpt2"), tmp_path)  # GPT-2's default dropout is 0.1
    batch, gradients = make_batch(), []
    for checkpointing in (False, True):
        model = load_policy(config.Model(path=settings.path, gradient_checkpointing=checkpointing), PLAIN, CPU)
        calls: list[int] = []
        model.base_model.h[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients.append(summed_gradient(model, batch, 10_000, padded=True))
        assert len(calls) == 1 + checkpointing
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    model.train()
    assert torch.equal(batch_logprobs(model, batch, padded=True)[0], batch_logprobs(model, batch, padded=True)[0])


def test_refuses_folders_that_hold_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "abacus"}), encoding="utf-8")
    damaged = tmp_path / "damaged"
    save(tiny("llama"), damaged)
    (damaged / "model.safetensors").write_bytes(b"not a safetensors file")
    for path, words in [
        (str(empty), "is not a model folder: it has no config.json"),
        (str(tmp_path / "absent"), "no such folder, and not the form of a hub id"),
        ("owner/absent-model", "neither a folder nor a hub id reachable from here"),
        (str(unknown), "holds no model that transformers can load"),
        (str(damaged), "holds no model that transformers can load"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            load_policy(config.Model(path=path), PLAIN, CPU)
        assert f'model.path = "{path}"' in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(str(empty))


def test_refuses_missing_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"lack 3 weights, model\.layers\.1\.mlp\.down_proj\.weight among them"):
        load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)


def test_refuses_soft_capped_logits_however_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # A fresh model's logits are so small that capping at 30 hardly changes them.
    settings = save(Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=30.0)), tmp_path)
    with pytest.raises(ConfigError, match="logits of Gemma2ForCausalLM are not its output embedding times its hidden"):
        load_policy(settings, PLAIN, CPU)


def test_refuses_a_head_that_is_not_linear() -> None:
    settings = config.Model(path="somewhere")
    check_policy(tiny("gpt2"), settings, padded=True)
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no decoder with one linear output layer"):
        check_policy(model, settings, padded=True)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_accelerator_sets_precision_and_starts_no_process_group(precision: Any, dtype: torch.dtype) -> None:
    accelerator = make_accelerator(config.Model(precision=precision, device="cpu"))
    assert accelerator.device == CPU
    assert accelerator.num_processes == 1
    assert not torch.distributed.is_initialized()
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_accelerator_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'model.device = "cuda", but PyTorch finds no CUDA device'):
        make_accelerator(config.Model(device="cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2: the learner is one process"):
        make_accelerator(config.Model())


def test_optimizer_follows_the_adamw_formula_with_decay_on_every_weight() -> None:
    model = torch.nn.LayerNorm(3)
    model.bias.requires_grad_(False)
    settings = config.Optimizer(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.5)
    optimizer = make_optimizer(model, settings, make_accelerator(config.Model()))
    gradient = torch.tensor([1.0, -2.0, 0.5])
    model.weight.grad = gradient.clone()
    optimizer.step()
    # First step: bias-corrected moments are the gradient and its square.
    want = 1.0 * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(model.weight.detach(), want)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
