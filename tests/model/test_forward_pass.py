"""The decision how the forward pass is computed: attention, layout, and what speaks against the fused pass."""

import contextlib
import re
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from dapo_async.config.settings import Config
from dapo_async.errors import ConfigError
from dapo_async.model.forward_pass import FLASH, ForwardPass, Hardware, hardware_of, resolve_forward_pass
from dapo_async.model.varlen import VARLEN
from tests.learner.test_update import settings
from tests.model.model_cases import CPU, HEADS, SMALL

ON_CPU = Hardware("cpu")
NEW_GPU = Hardware("cuda", packs=True)
NEW_GPU_FLASH = Hardware("cuda", packs=True, flash_attn=True)
OLD_GPU = Hardware("cuda")
LLAMA_LIKE = Qwen3Config(**SMALL, **HEADS)
GELU = Qwen3Config(**SMALL, **HEADS, hidden_act="gelu")


def with_model(**model: Any) -> Config:
    return settings(model={"path": "x"} | model)


@pytest.mark.parametrize(
    ("choice", "precision", "hardware", "attention", "layout"),
    [
        ("auto", "bfloat16", ON_CPU, "sdpa", "padded"),
        ("sdpa", "bfloat16", ON_CPU, "sdpa", "padded"),
        ("eager", "float32", ON_CPU, "eager", "padded"),
        ("auto", "bfloat16", NEW_GPU, VARLEN, "packed"),
        ("auto", "bfloat16", NEW_GPU_FLASH, FLASH, "packed"),
        ("auto", "bfloat16", OLD_GPU, "sdpa", "padded"),
        ("auto", "float32", NEW_GPU_FLASH, "sdpa", "padded"),
        ("varlen", "bfloat16", NEW_GPU_FLASH, VARLEN, "packed"),
        ("flash", "bfloat16", NEW_GPU_FLASH, FLASH, "packed"),
        ("sdpa", "bfloat16", NEW_GPU_FLASH, "sdpa", "padded"),
    ],
)
def test_attention_and_layout_of_the_modules_own_pass(
    choice: str, precision: str, hardware: Hardware, attention: str, layout: str
) -> None:
    found = resolve_forward_pass(with_model(attention=choice, precision=precision), hardware, LLAMA_LIKE)
    assert (found.device_type, found.attention, found.layout) == (hardware.device_type, attention, layout)
    assert found.obstacle
    assert not found.fused


@pytest.mark.parametrize(
    ("choice", "precision", "hardware", "expected"),
    [
        ("varlen", "bfloat16", ON_CPU, '"varlen" needs a CUDA device, the learner is on cpu; use "auto" or "sdpa"'),
        ("flash", "bfloat16", ON_CPU, '"flash" needs a CUDA device, the learner is on cpu; use "auto" or "sdpa"'),
        ("varlen", "float32", NEW_GPU, 'needs model.precision = "bfloat16", not "float32"'),
        ("varlen", "bfloat16", OLD_GPU, "needs a CUDA device of compute capability 8.0 or newer"),
        ("flash", "bfloat16", NEW_GPU, 'needs the flash-attn package; install it, or use "auto"'),
    ],
)
def test_attention_that_cannot_work_is_refused(choice: str, precision: str, hardware: Hardware, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve_forward_pass(with_model(attention=choice, precision=precision), hardware)


@pytest.mark.parametrize(("capability", "packs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_what_is_asked_of_a_device(capability: tuple[int, int], packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert hardware_of(torch.device("cuda"))[:2] == ("cuda", packs)
    assert hardware_of(CPU)[:2] == ("cpu", False)


@pytest.mark.parametrize(
    ("tables", "hardware", "expected"),
    [
        ({}, ON_CPU, ""),
        ({}, NEW_GPU, "the learner is on cuda"),
        ({"model": {"path": "x", "precision": "bfloat16"}}, ON_CPU, 'model.precision is "bfloat16"'),
        ({"model": {"path": "x", "attention": "eager"}}, ON_CPU, 'model.attention is "eager"'),
        ({"model": {"path": "x", "attention": "sdpa"}}, ON_CPU, ""),
        ({"model": {"path": "x", "gradient_checkpointing": True}}, ON_CPU, "model.gradient_checkpointing is on"),
        (
            {"sampling": {"max_tokens": 600}, "learner": {"microbatch_tokens": 700}},
            ON_CPU,
            "sequences of up to 608 tokens, the fused pass is for 512",
        ),
    ],
)
def test_settings_that_speak_against_the_fused_pass(
    tables: dict[str, dict[str, Any]], hardware: Hardware, expected: str
) -> None:
    found = resolve_forward_pass(settings(**tables), hardware, LLAMA_LIKE)
    assert found.obstacle.startswith(expected)
    assert bool(found.obstacle) == bool(expected) != found.fused
    wish = tables | {"model": tables.get("model", {"path": "x"}) | {"forward": "fused"}}
    sentence = re.escape(f'model.forward = "fused": {found.obstacle}; use "auto"')
    refused = pytest.raises(ConfigError, match=sentence) if expected else contextlib.nullcontext()
    with refused:
        resolve_forward_pass(settings(**wish), hardware)


def test_the_architecture_decides_as_soon_as_it_is_known() -> None:
    assert resolve_forward_pass(with_model(), ON_CPU) == ForwardPass("cpu", "sdpa", "shared")
    found = resolve_forward_pass(with_model(), ON_CPU, GELU)
    assert found == ForwardPass("cpu", "sdpa", "padded", "its activation is gelu, not silu")
    assert resolve_forward_pass(with_model(forward="fused"), ON_CPU, LLAMA_LIKE).fused
    assert resolve_forward_pass(with_model(forward="fused"), ON_CPU).fused
    with pytest.raises(ConfigError, match=r'model\.forward = "fused": its activation is gelu, not silu; use "auto"'):
        resolve_forward_pass(with_model(forward="fused"), ON_CPU, GELU)


def test_the_modules_pass_is_used_where_it_is_the_choice() -> None:
    found = resolve_forward_pass(with_model(forward="module"), ON_CPU, LLAMA_LIKE)
    assert found == ForwardPass("cpu", "sdpa", "padded", 'model.forward is "module"', "module")


def test_without_the_fused_pass_the_modules_layout_stays() -> None:
    assert ForwardPass("cpu", "sdpa", "shared").unfused("it").layout == "padded"
    assert ForwardPass("cuda", VARLEN, "packed").unfused("it").layout == "packed"
