"""Details of base models that ruin runs: ends of answers, padding, vocabularies, tied embeddings, positions."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dapo_async.config import settings as config
from dapo_async.config.toml import build_config
from dapo_async.errors import ConfigError
from dapo_async.model.batching import TrainSequence
from dapo_async.model.checks import check_positions
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.policy import load_policy
from dapo_async.model.tokenizer import TextDecoder
from dapo_async.run.check import load_material
from dapo_async.weight_sync.encoding import serving_tensors
from tests.data.test_prompts import make_tokenizer, write_jsonl
from tests.model.model_cases import CPU, batch_logprobs, plain_logprobs
from workers.engine import Request
from workers.torch.engine import TorchEngine

WORDS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "=", " "]
ENDOFTEXT, IM_END = 13, 14
CHAT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}={% endif %}"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}


def qwen_tokenizer(end: str | None = "<|endoftext|>", **more: Any) -> PreTrainedTokenizerFast:
    """Digits, and the two ends of Qwen's tokenizers: of a document and of a turn."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<|endoftext|>", "<|im_end|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|endoftext|>", "<|im_end|>"],
        **more,
    )


def write_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    ends: Any = ENDOFTEXT,
    vocab: int = 15,
    **more: Any,
) -> Path:
    """A tiny Qwen3 with random weights whose generation config ends with ``ends`` (None: there is no such file)."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": vocab, "eos_token_id": ENDOFTEXT, "pad_token_id": ENDOFTEXT} | more
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (tokenizer or qwen_tokenizer()).save_pretrained(folder)
    generation = folder / "generation_config.json"
    if ends is None:
        generation.unlink()
    else:
        generation.write_text(json.dumps({"eos_token_id": ends}))
    return folder


def run_config(folder: Path, **tables: dict[str, Any]) -> config.Config:
    rows = [{"prompt": f"{a}+{b}", "answer": a + b} for a in range(5) for b in range(4)]
    data = {"train": str(write_jsonl(folder / "train.jsonl", rows)), "max_prompt_tokens": 8}
    table: dict[str, Any] = {"model": {"path": str(folder)}, "data": data, "sampling": {"max_tokens": 16}}
    for name, changes in tables.items():
        table[name] = table.get(name, {}) | changes
    return build_config(table, "test")


def stops_of(folder: Path, **sampling: Any) -> list[int]:
    return load_material(run_config(folder, sampling={"max_tokens": 16, **sampling})).config.sampling.stop_token_ids


# --- where an answer ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [ENDOFTEXT, IM_END, [IM_END], [ENDOFTEXT, IM_END], None])
@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_base_and_chat_ends_are_both_stops_whatever_the_files_name(tmp_path: Path, ends: Any, end: str) -> None:
    assert stops_of(write_model(tmp_path, qwen_tokenizer(end), ends=ends)) == [ENDOFTEXT, IM_END]


def test_ends_of_another_name_come_from_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()  # its end is </s>, number 2
    assert stops_of(write_model(tmp_path, tokenizer, ends=7, vocab=110)) == [2, 7]


def test_the_ends_are_told_with_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stops_of(write_model(tmp_path))
    assert "answers end with 13 (<|endoftext|>), 14 (<|im_end|>)" in caplog.messages


def test_a_list_of_ones_own_stands_and_what_it_leaves_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path)
    assert stops_of(folder, stop_token_ids=[IM_END]) == [IM_END]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "sampling.stop_token_ids = [14] leaves out 13 (<|endoftext|>), with which the model is said to end: answers "
        "may run on to the length limit"
    ]
    caplog.clear()
    assert stops_of(folder, stop_token_ids=[ENDOFTEXT]) == [ENDOFTEXT]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_name_beyond_the_models_vocabulary_is_no_stop(tmp_path: Path) -> None:
    assert stops_of(write_model(tmp_path, vocab=14)) == [ENDOFTEXT]


def test_stops_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.stop_token_ids = \[15\]: the model knows only 15 tokens"):
        stops_of(folder, stop_token_ids=[15])
    folder = write_model(tmp_path / "other", ends=15)
    with pytest.raises(ConfigError, match=r"sampling\.stop_token_ids = \[13, 14, 15\]: the model knows only 15 tokens"):
        stops_of(folder)
    nameless = make_tokenizer()
    nameless.eos_token = None
    folder = write_model(tmp_path / "third", nameless, ends=None, vocab=110, eos_token_id=None)
    with pytest.raises(ConfigError, match="names no end-of-sequence token; list the tokens that end an answer"):
        stops_of(folder)


# --- the end token that also pads ------------------------------------------------------------------------


def test_a_pad_token_that_is_the_end_is_sampled_told_and_trained(tmp_path: Path) -> None:
    """pad = eos = <|endoftext|>: the stop token counts, has its log-prob, and gets its gradient."""
    policy = load_policy(config.Model(path=str(write_model(tmp_path, ends=[ENDOFTEXT]))), PLAIN, CPU)
    engine = TorchEngine(tmp_path, slots=8, max_len=40, stop_token_ids=[ENDOFTEXT])
    engine.swap(0, serving_tensors(policy, torch.float32))
    prompt = np.array([1, ENDOFTEXT, 10, 2, 11], np.int32)  # and it may stand in a prompt
    engine.add(Request("a", prompt, 64, 5, 30))
    done = []
    while engine.running or engine.waiting:
        done += engine.step()
    stopped = [one for one in done if one.finish == "stop"]
    assert len(stopped) > 5
    assert all(one.token_ids[-1] == ENDOFTEXT and ENDOFTEXT not in one.token_ids[:-1] for one in stopped)
    batch = [TrainSequence(prompt, one.token_ids, one.logprobs, advantage=1.0, group=0) for one in stopped]
    logp, _ = batch_logprobs(policy, batch, padded=True, temperature=1.0, budget=200)
    behaviour = np.concatenate([one.logprobs for one in stopped])
    np.testing.assert_allclose(logp.detach().numpy(), behaviour, atol=1e-5)
    np.testing.assert_allclose(logp.detach().numpy(), plain_logprobs(policy, batch, 1.0)[0].detach().numpy(), atol=1e-5)


def test_a_pad_token_that_is_the_end_learns_as_an_input_too(tmp_path: Path) -> None:
    policy = load_policy(config.Model(path=str(write_model(tmp_path, tie_word_embeddings=False))), PLAIN, CPU)
    ids = torch.tensor([[1, ENDOFTEXT, 10, IM_END, 11]])
    policy(input_ids=ids).logits[0, -1, 3].backward()
    gradient = policy.get_input_embeddings().weight.grad
    assert gradient[ENDOFTEXT].abs().sum() > 0
    assert gradient[IM_END].abs().sum() > 0


# --- tied embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_are_published_and_served_as_trained(tmp_path: Path, tied: bool) -> None:
    policy = load_policy(config.Model(path=str(write_model(tmp_path, tie_word_embeddings=tied))), PLAIN, CPU)
    with torch.no_grad():
        policy.get_output_embeddings().weight[5] += 3.0  # as a step of training would
    tensors = serving_tensors(policy, torch.float32)
    names = {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert names == ({"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"})
    engine = TorchEngine(tmp_path, slots=2, max_len=40, stop_token_ids=[])
    engine.swap(0, tensors)
    prompt = np.array([1, 10, 2, 11], np.int32)
    engine.add(Request("a", prompt, 2, 5, 20))
    done = []
    while engine.running or engine.waiting:
        done += engine.step()
    batch = [TrainSequence(prompt, one.token_ids, one.logprobs, advantage=1.0, group=0) for one in done]
    logp, _ = plain_logprobs(policy, batch, 1.0)
    np.testing.assert_allclose(np.concatenate([one.logprobs for one in done]), logp.detach().numpy(), atol=1e-5)


def test_a_model_said_to_be_untied_whose_files_lack_the_head_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match=r"its files lack 1 weights, lm_head.weight among them"):
        load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)


def test_a_tied_model_keeps_one_tensor_though_its_files_hold_another_head(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert "lm_head.weight" not in serving_tensors(policy, torch.float32)


# --- vocabularies of different sizes ---------------------------------------------------------------------


def test_a_padded_vocabulary_is_told_and_its_tokens_decode_to_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path, vocab=32)
    with caplog.at_level(logging.INFO):
        material = load_material(run_config(folder))
    assert (
        "the model has 32 tokens, the tokenizer 15: sampled ones beyond decode to nothing and are counted "
        "(batch/unknown_tokens)"
    ) in caplog.messages
    text = TextDecoder(material.tokenizer)
    assert text(np.array([1, 31, 2, 15, IM_END], np.int32)) == material.tokenizer.decode([1, 2])
    assert text(np.array([31, 20], np.int32)) == ""


class Brittle:
    """A tokenizer of the kind that fails on numbers it does not know."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1, "c": 5}  # numbers may be left out

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        words = {number: word for word, number in self.get_vocab().items()}
        return "".join(words[int(i)] for i in ids)


def test_no_tokenizer_is_asked_for_what_it_does_not_know() -> None:
    assert TextDecoder(Brittle())(np.array([0, 5, 6, 1, 31], np.int32)) == "acb"  # type: ignore[arg-type]


def test_prompts_with_tokens_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    folder = write_model(tmp_path, tokenizer, vocab=14)
    with pytest.raises(ConfigError) as caught:
        load_material(run_config(folder))
    told = str(caught.value)
    assert told.startswith('prompt "')
    assert told.endswith(
        f'" holds token 14 (<|im_end|>), but the model at model.path = {folder} knows only 14 tokens: resize its '
        "embeddings to the tokenizer's 15, or give it its own tokenizer"
    )
    tokenizer.save_pretrained(write_model(tmp_path / "wide", tokenizer, vocab=15))
    assert load_material(run_config(tmp_path / "wide")).train[0].ids.tolist() == [0, 10, 0, IM_END, 11]


# --- positions -------------------------------------------------------------------------------------------


def positions(longest: int, caplog: pytest.LogCaptureFixture, **architecture: Any) -> tuple[str, str]:
    """What ``check_positions`` refuses and what it warns of, for sequences of ``longest`` tokens."""
    table = {
        "model": {"path": "M"},
        "data": {"train": "t", "max_prompt_tokens": 8},
        "sampling": {"max_tokens": longest - 8},
        "learner": {"microbatch_tokens": 100_000},
    }
    caplog.clear()
    refused = ""
    try:
        check_positions(build_config(table, "test"), LlamaConfig(**architecture))
    except ConfigError as error:
        refused = str(error)
    return refused, " ".join(record.getMessage() for record in caplog.records if record.name.startswith("dapo"))


def test_sequences_longer_than_the_model_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert positions(64, caplog, max_position_embeddings=64) == ("", "")
    assert positions(65, caplog, max_position_embeddings=64) == (
        "data.max_prompt_tokens + sampling.max_tokens = 65 exceeds what model.path = M was made for: 64 positions",
        "",
    )


@pytest.mark.parametrize("trained", [64, 256])  # as published: Qwen keeps the old length, others write the new one
def test_yarn_stretches_the_limit_with_a_warning(caplog: pytest.LogCaptureFixture, trained: int) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    shape: dict[str, Any] = {"max_position_embeddings": trained, "rope_parameters": rope}
    assert positions(64, caplog, **shape) == ("", "")
    said = "data.max_prompt_tokens + sampling.max_tokens = "
    for longest in (65, 256):
        assert positions(longest, caplog, **shape) == (
            "",
            f"{said}{longest} goes beyond the 64 positions that M was trained at, on the strength of its yarn rope "
            "scaling by 4",
        )
    assert positions(257, caplog, **shape)[0] == f"{said}257 exceeds what model.path = M was made for: 256 positions"


def test_scaling_that_the_model_was_trained_with_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 5e5,
    }  # fmt: skip
    shape: dict[str, Any] = {"max_position_embeddings": 256, "rope_parameters": rope}
    assert positions(256, caplog, **shape) == ("", "")
    assert "256 positions" in positions(257, caplog, **shape)[0]


def test_scaling_that_depends_on_the_longest_sequence_is_refused_where_it_would(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    shape: dict[str, Any] = {"max_position_embeddings": 64, "rope_parameters": rope}
    assert positions(64, caplog, **shape) == ("", "")
    assert positions(65, caplog, **shape)[0] == (
        'data.max_prompt_tokens + sampling.max_tokens = 65 exceeds the 64 positions beyond which the "dynamic" rope '
        "scaling of model.path = M changes with the longest sequence at hand, so that sampler and learner would "
        "disagree; lower one of the two, or use yarn"
    )


def test_beyond_the_trained_length_sampler_and_learner_agree_under_yarn(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    write_model(tmp_path, max_position_embeddings=16, rope_parameters=rope)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "yarn"
    policy = load_policy(config.Model(path=str(tmp_path)), PLAIN, CPU)
    engine = TorchEngine(tmp_path, slots=2, max_len=60, stop_token_ids=[])
    engine.swap(0, serving_tensors(policy, torch.float32))
    prompt = np.array([1, 10, 2, 11], np.int32)
    engine.add(Request("a", prompt, 2, 5, 50))
    done = []
    while engine.running or engine.waiting:
        done += engine.step()
    assert [len(one.token_ids) for one in done] == [50, 50]
    batch = [TrainSequence(prompt, one.token_ids, one.logprobs, advantage=1.0, group=0) for one in done]
    logp, _ = batch_logprobs(policy, batch, padded=True, temperature=1.0, budget=200)
    np.testing.assert_allclose(logp.detach().numpy(), np.concatenate([one.logprobs for one in done]), atol=1e-5)
