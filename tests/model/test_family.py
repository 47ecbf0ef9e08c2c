"""Which architectures our own passes compute: one rule, and the embedded engine goes by it as the learner does."""

from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from dapo_async.model.family import architecture_obstacle
from tests.model.model_cases import HEADS, SMALL
from workers.torch.decoders import ModuleDecoder, build_decoder
from workers.torch.fused_decoder import FusedDecoder

GELU = {"hidden_act": "gelu"}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        (GELU, "its activation is gelu"),
        (DYNAMIC, "of the kind dynamic"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "not all its layers"),
    ],
)
def test_what_speaks_against_an_architecture(changes: dict[str, Any], expected: str) -> None:
    obstacle = architecture_obstacle(Qwen3Config(**SMALL, **HEADS, **changes))
    assert expected in obstacle
    assert bool(obstacle) == bool(expected)


def test_another_family_is_named() -> None:
    architecture = Qwen3Config(**SMALL, **HEADS)
    architecture.model_type = "mistral"
    assert "mistral is not of the Llama family (llama, qwen2, qwen3)" in architecture_obstacle(architecture)


@pytest.mark.parametrize(("changes", "decoder"), [({}, FusedDecoder), (GELU, ModuleDecoder), (DYNAMIC, ModuleDecoder)])
def test_the_embedded_engine_goes_by_it(changes: dict[str, Any], decoder: type) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEADS, **changes)).eval().requires_grad_(False)
    assert type(build_decoder(model, HEADS["max_position_embeddings"])) is decoder
