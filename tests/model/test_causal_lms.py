"""Every causal LM that transformers knows and that can be made tiny: trained, or refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dapo_async.config import settings as config
from dapo_async.errors import ConfigError
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.loading import LOADING_ERRORS, empty_model
from dapo_async.model.policy import check_architecture, load_policy
from tests.model.model_cases import CPU

LARGEST = 30_000_000  # parameters of what still counts as tiny
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), 13),
    **{"vocab_size": 15, "intermediate_size": 48, "ffn_dim": 48, "head_dim": 8},
}
TRAINED = {"gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
REFUSED = {"bart", "cohere", "gemma2", "mbart", "opt", "roberta", "trocr"}


def save_tiny(kind: str, folder: Path) -> None:
    """Raises of ``LOADING_ERRORS`` where these sizes make no model of the kind."""
    made = CONFIG_MAPPING[kind]
    known = set(made().to_dict()) | set(getattr(made, "attribute_map", {}))
    settings = made(**{name: size for name, size in SIZES.items() if name in known})
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(settings)
    if sum(parameter.numel() for parameter in shape.parameters()) > LARGEST:
        raise ValueError("not tiny")
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_causal_lm_is_trained_or_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    try:
        save_tiny(kind, tmp_path)
    except LOADING_ERRORS as error:
        pytest.skip(f"cannot be made tiny: {error}")
    try:
        check_architecture(empty_model(str(tmp_path)), str(tmp_path))
        load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert not (refusal and kind in TRAINED), refusal
    assert refusal or kind not in REFUSED
