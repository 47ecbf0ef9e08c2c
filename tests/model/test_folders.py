"""Model folders as people bring them: what cannot be trained is refused in one sentence, by ``check`` where it can."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from dapo_async.config import settings as config
from dapo_async.errors import ConfigError
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.loading import empty_model, load_architecture
from dapo_async.model.policy import check_architecture, load_policy
from dapo_async.model.tokenizer import load_tokenizer
from dapo_async.run.check import load_material
from dapo_async.run.memory_check import check_memory
from tests.model.model_cases import CPU, save, tiny
from tests.model.test_checks import ENDOFTEXT, IM_END, run_config, stops_of, write_model
from workers.torch.engine import TorchEngine

torch.set_num_threads(1)


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def refusal_by_check(folder: Path) -> str:
    """The sentence with which ``check`` refuses the folder."""
    with pytest.raises(ConfigError) as caught:
        checked(run_config(folder))
    return one_sentence(caught.value, folder)


def checked(settings: config.Config) -> None:
    """What ``check`` asks of a folder; ``train`` asks the same, in the same order."""
    check_memory(settings)
    load_material(settings)


def refusal_by_load(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_policy(config.Model(path=str(folder)), PLAIN, CPU)
    return one_sentence(caught.value, folder)


def one_sentence(error: ConfigError, folder: Path) -> str:
    sentence = str(error)
    assert f'model.path = "{folder}"' in sentence
    assert "\n" not in sentence
    return sentence


# --- ties that files contradict --------------------------------------------------------------------------


def other_head(folder: Path, change: float = 1.0) -> Tensor:
    """A head of its own beside a configuration that ties it, ``change`` away from the embedding in its last number."""
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[-1, -1] += change
    return head


@pytest.mark.parametrize("change", [1.0, 1e-3, float("nan")])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path, change: float) -> None:
    edit_weights(write_model(tmp_path), **{"lm_head.weight": other_head(tmp_path, change)})
    wanted = "config.json says that lm_head.weight and model.embed_tokens.weight are one"
    assert wanted in refusal_by_check(tmp_path)
    assert wanted in refusal_by_load(tmp_path)


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    edit_weights(write_model(tmp_path), **{"lm_head.weight": torch.zeros(16, 32)})
    assert "its files hold two that differ" in refusal_by_check(tmp_path)


def test_a_tied_head_of_equal_values_is_fine_in_any_precision(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    edit_weights(tmp_path, **weights, **{"lm_head.weight": weights["model.embed_tokens.weight"].float()})
    load_material(run_config(tmp_path))
    policy = load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def shards(folder: Path, head: Tensor) -> None:
    """The weights in two files with an index, the head in the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({"lm_head.weight": head}, folder / "b.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(weights, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_ties_are_compared_across_shards(tmp_path: Path) -> None:
    head = other_head(write_model(tmp_path))
    shards(tmp_path, head)
    assert "its files hold two that differ" in refusal_by_check(tmp_path)
    assert "its files hold two that differ" in refusal_by_load(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}', "{}"])
def test_a_broken_index_of_shards_is_refused(tmp_path: Path, index: str) -> None:
    shards(write_model(tmp_path), torch.zeros(1))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "its safetensors files cannot be read" in refusal_by_check(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    shards(write_model(tmp_path), torch.zeros(15, 32))
    (tmp_path / "b.safetensors").unlink()
    assert "its safetensors files cannot be read" in refusal_by_check(tmp_path)


# --- numbers that are none -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, number: float) -> None:
    weight = load_file(write_model(tmp_path) / "model.safetensors")[name]
    weight.flatten()[-1] = number
    edit_weights(tmp_path, **{name: weight})
    assert f"weight {name} holds NaN or infinity (1 of {weight.numel()} numbers)" in refusal_by_load(tmp_path)


# --- values of config.json -------------------------------------------------------------------------------

ODD: list[Any] = [None, -1, 0, 1, 3, "x", "", 1.5, [], {}, [1, "a"], {"a": 1}, True, 10**12, 10**400]


def test_no_value_in_config_json_raises_anything_but_one_sentence(tmp_path: Path) -> None:
    """Every field, with every kind of value; what is taken is taken by the loader too, or refused there."""
    fields = json.loads((write_model(tmp_path) / "config.json").read_text())
    settings, told = run_config(tmp_path), []
    for name, value in itertools.product(fields, ODD):
        (tmp_path / "config.json").write_text(json.dumps(fields | {name: value}))
        try:
            check_memory(settings)
            check_architecture(empty_model(str(tmp_path)), str(tmp_path))
        except ConfigError as error:
            told.append(str(error))
    assert len(fields) * len(ODD) / 2 < len(told) < len(fields) * len(ODD) - 60
    assert not [sentence for sentence in told if "\n" in sentence or len(sentence) > 1000]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1}, "`num_hidden_layers` (1) must be equal to the number of `layer_types` (2)"),
        ({"num_hidden_layers": "2"}, "config.json: Validation error for field 'num_hidden_layers'"),
        ({"rms_norm_eps": "small"}, "config.json: Validation error for field 'rms_norm_eps'"),
        ({"rope_parameters": 3}, "config.json: Validation error for field 'rope_parameters'"),
        ({"num_attention_heads": 0}, "config.json says num_attention_heads = 0: must be at least 1"),
        ({"num_key_value_heads": 0}, "config.json says num_key_value_heads = 0: must be at least 1"),
        ({"hidden_size": -32}, "config.json says hidden_size = -32: must be at least 1"),
        ({"vocab_size": 0}, "config.json says vocab_size = 0: must be at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 and num_key_value_heads = 3"),
        ({"vocab_size": 7}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"hidden_act": "abacus"}, "KeyError"),
        ({"model_type": None}, "holds no model that transformers can load"),
    ],
)
def test_wrong_values_are_refused_by_check_naming_file_and_field(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit(write_model(tmp_path), **changes)
    assert words in refusal_by_check(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", "\x00"])
def test_a_config_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(text)
    assert "holds no model that transformers can load" in refusal_by_check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, "holds no model that transformers can load"),
        ({"intermediate_size": 50}, "holds no model that transformers can load"),
        ({"head_dim": 16}, "holds no model that transformers can load"),
        ({"num_hidden_layers": 3, "layer_types": None}, "its files lack 11 weights, model.layers.2."),
        ({"num_hidden_layers": 1, "layer_types": None}, "hold 11 weights of layers that config.json does not have"),
    ],
)
def test_counts_that_the_files_contradict_are_refused_at_load(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit(write_model(tmp_path), **changes)
    assert words in refusal_by_load(tmp_path)


def test_weights_that_no_layer_misses_are_no_mistake(tmp_path: Path) -> None:
    extra = {"score.weight": torch.zeros(1, 32), "visual.blocks.0.norm.weight": torch.zeros(3)}
    edit_weights(write_model(tmp_path), **extra)
    names = dict(load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU).named_parameters())
    assert names
    assert not names.keys() & extra.keys()


# --- quantised weights -----------------------------------------------------------------------------------

QUANTISED: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "mxfp4"},
    {"quant_method": "hqq"},
    {"quant_method": "aqlm"},
    {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    {"quant_method": "bitnet"},
    {"quant_method": "quanto", "weights": "int8"},
    {"quant_method": "of tomorrow"},
]


@pytest.mark.parametrize("quantisation", QUANTISED, ids=lambda told: str(told.get("quant_method")))
def test_quantised_folders_are_refused_by_check(tmp_path: Path, quantisation: dict[str, Any]) -> None:
    edit(write_model(tmp_path), quantization_config=quantisation)
    sentence = refusal_by_check(tmp_path)
    assert "holds quantised weights, which cannot be trained" in sentence
    assert f"({quantisation.get('quant_method', 'without a method')})" in sentence
    assert sentence == refusal_by_load(tmp_path)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_folders_quantised_by_older_tools_are_refused_by_check(tmp_path: Path, file: str) -> None:
    (write_model(tmp_path) / file).write_text('{"bits": 4}')
    assert f"cannot be trained: there is a {file}" in refusal_by_check(tmp_path)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_quantisation_is_none(tmp_path: Path, nothing: Any) -> None:
    edit(write_model(tmp_path), quantization_config=nothing)
    assert load_architecture(str(tmp_path)).num_hidden_layers == 2


# --- decoders that are called in another way -------------------------------------------------------------


def test_a_model_whose_decoder_is_not_called_through_its_base_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    save(
        OPTForCausalLM(OPTConfig(**sizes, vocab_size=23, max_position_embeddings=64, word_embed_proj_dim=32)), tmp_path
    )
    assert "OPTForCausalLM computes its logits around its base_model" in refusal_by_load(tmp_path)
    with pytest.raises(ConfigError, match="OPTForCausalLM computes its logits around its base_model"):
        check_architecture(empty_model(str(tmp_path)), str(tmp_path))


def test_a_model_that_fails_when_it_is_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = save(tiny("llama"), tmp_path)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda self, x: x[..., 99])
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be run on three tokens: IndexError"):
        load_policy(settings, PLAIN, CPU)


# --- ends of answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "stops"),
    [(5, [5]), ([5], [5]), ([13, 5, 7], [5, 7]), (-1, []), ([-1, 7], [7]), (None, []), ([], [])],
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_that_is_a_token_is_a_stop_and_minus_one_is_none(
    tmp_path: Path, file: str, ends: Any, stops: list[int]
) -> None:
    """Of config.json where there is no generation_config.json."""
    write_model(tmp_path, ends=ENDOFTEXT if file == "generation_config.json" else None)
    edit(tmp_path, file, eos_token_id=ends)
    assert stops_of(tmp_path) == [*stops, ENDOFTEXT, IM_END]


@pytest.mark.parametrize("end", ["x", "13", 1.5, True, {}, [[1]], [None], ["<|endoftext|>"]])
def test_ends_that_are_no_tokens_are_refused_by_check(tmp_path: Path, end: Any) -> None:
    write_model(tmp_path, ends=end)
    assert "generation_config.json says eos_token_id = " in refusal_by_check(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', '{"cache_implementation": "abacus"}'])
def test_a_broken_generation_config_is_refused_by_check(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path) / "generation_config.json").write_text(text)
    assert "generation_config.json cannot be read" in refusal_by_check(tmp_path)


# --- tokenizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["special_tokens_map.json", "tokenizer_config.json"]])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_folders_without_a_vocabulary_are_refused_by_check(tmp_path: Path, family: str, kept: list[str]) -> None:
    write_model(tmp_path)
    save(tiny(family), tmp_path)
    for path in tmp_path.glob("*token*.json"):
        if path.name not in kept:
            path.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    refusal_by_check(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"model": {"type": "abacus"}}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path) / "tokenizer.json").write_text(text)
    assert "holds no tokenizer" in refusal_by_check(tmp_path)


# --- code that a folder brings ---------------------------------------------------------------------------

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder: Path) -> config.Model:
    save(tiny("llama"), write_model(folder))
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    return config.Model(path=str(folder))


def test_code_that_a_folder_brings_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked on the terminal"))
    with_code(tmp_path)
    wanted = "brings Python code of its own for its model, which is not run unasked"
    assert wanted in refusal_by_check(tmp_path)
    assert "set model.trust_remote_code = true" in refusal_by_load(tmp_path)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        TorchEngine(tmp_path, slots=2, max_len=40, stop_token_ids=[])


def test_a_tokenizers_code_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked on the terminal"))
    with_code(tmp_path)
    classes = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=classes)
    with pytest.raises(ConfigError, match="brings Python code of its own for its tokenizer"):
        load_tokenizer(str(tmp_path))


def test_code_that_is_trusted_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusted = replace(with_code(tmp_path / "model"), trust_remote_code=True)
    checked(run_config(tmp_path / "model", model={"trust_remote_code": True}))
    assert type(load_policy(trusted, PLAIN, CPU)).__name__ == "OwnForCausalLM"
    TorchEngine(tmp_path / "model", slots=2, max_len=40, stop_token_ids=[], trust_remote_code=True)
