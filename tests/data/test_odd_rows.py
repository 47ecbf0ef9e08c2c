"""Rows as people bring them: no truth, a list of truths, messages stored as text, an answer that is begun, a date."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from dapo_async.config.settings import Data
from dapo_async.config.toml import build_config
from dapo_async.data.prompts import PromptSet, load_prompts
from dapo_async.errors import ConfigError
from tests.data.test_prompts import CHAT_TOKENIZER, PLAIN_TOKENIZER, make_tokenizer, write_jsonl, write_parquet

MESSAGES = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+2"}]
CLOSING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y %H:%M') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

BLANKS = ["", " ", "\n", "\t\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00"]


def load(folder: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast = PLAIN_TOKENIZER, **data: Any) -> PromptSet:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return load_prompts(path, tokenizer, Data(train=str(path), **data))


def row(truth: Any, prompt: Any = "1+2=") -> dict[str, Any]:
    return {"prompt": prompt, "answer": truth}


# --- truths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth", ["", " ", "\n", "\t\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", [""], '[" "]']
)
@pytest.mark.parametrize("layout", ["plain", "dapo"])
def test_rows_without_a_truth_are_dropped_and_counted(
    tmp_path: Path, truth: Any, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = row(truth, "what?")
    if layout == "dapo":
        nothing = {"prompt": [{"role": "user", "content": "what?"}], "reward_model": {"ground_truth": truth}}
    prompts = load(tmp_path, [row("2", "1+1="), nothing, row("4", "2+2=")])
    assert [prompt.truth for prompt in prompts.prompts] == ["2", "4"]
    assert prompts.counts.without_truth == 1
    assert sum(prompts.counts[1:]) == prompts.counts.rows == 3
    assert "1 without a truth dropped" in caplog.text


def test_a_truth_may_come_after_a_row_without_it(tmp_path: Path) -> None:
    prompts = load(tmp_path, [row(""), row("3")])
    assert prompts[0].truth == "3"
    assert prompts.counts.conflicting == 0


def test_a_file_without_any_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt is left of 2 rows: none has a truth"):
        load(tmp_path, [row(""), row(" ", "2+2=")])


@pytest.mark.parametrize(
    ("truth", "kept"),
    [
        (["5"], "5"),
        ([5], "5"),
        ('["5"]', "5"),
        (' [ "5" ] ', "5"),
        ('["\\\\frac12"]', "\\frac12"),
        ('["a]"]', "a]"),
        # Answers that only look like it.
        ("[5]", "[5]"),
        ("[1, 2]", "[1, 2]"),
        ("[]", "[]"),
        ('["5", ]', '["5", ]'),
        ('["5"', '["5"'),
        ("['5']", "['5']"),
        ('"5"', '"5"'),
        ('["a"] or ["b"]', '["a"] or ["b"]'),
    ],
)
def test_a_list_of_one_truth_is_that_truth(tmp_path: Path, truth: Any, kept: str) -> None:
    assert load(tmp_path, [row(truth)])[0].truth == kept


@pytest.mark.parametrize("truth", [["5", "6"], [], '["5", "6"]', '["5","5"]', ["5", None]])
def test_several_truths_are_refused(tmp_path: Path, truth: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1: (answer|truth) must be one truth, got a list of [02]"):
        load(tmp_path, [row(truth)])


@pytest.mark.parametrize("truth", ['["assert f(1) == 2"]', '["assert f(1) == 2", "assert f(2) == 3"]'])
def test_a_list_that_a_users_own_verifier_reads_stays_as_it_is(tmp_path: Path, truth: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row(truth)])
    prompts = load_prompts(path, PLAIN_TOKENIZER, Data(train=str(path)), unwrap=False).prompts
    assert [prompt.truth for prompt in prompts] == [truth]


@pytest.mark.parametrize("truth", [[None], [["5"]], [True], [1.5], [{"a": 1}]])
def test_a_list_of_what_is_no_truth_is_refused(tmp_path: Path, truth: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1: answer must be a text or an integer"):
        load(tmp_path, [row(truth)])


@pytest.mark.parametrize("column", [pa.list_(pa.string()), pa.large_list(pa.string())])
def test_lists_of_truths_in_parquet(tmp_path: Path, column: pa.DataType) -> None:
    schema = pa.schema([("prompt", pa.string()), ("answer", column)])
    path = write_parquet(tmp_path / "rows.parquet", [row(["5"]), row(["6"], "3+3=")], schema)
    prompts = load_prompts(path, PLAIN_TOKENIZER, Data(train=str(path)))
    assert [prompt.truth for prompt in prompts.prompts] == ["5", "6"]


# --- messages stored as text -----------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_messages_stored_as_json_are_messages(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps(MESSAGES, indent=indent)
    as_text, as_list = (load(tmp_path, [row("3", prompt)], CHAT_TOKENIZER) for prompt in (text, MESSAGES))
    assert as_text[0].text == as_list[0].text == "<s><system>add<user>1+2<assistant>"
    path = write_parquet(tmp_path / "rows.parquet", [row("3", text)])
    assert load_prompts(path, CHAT_TOKENIZER, Data(train=str(path)))[0].ids.tolist() == as_list[0].ids.tolist()


@pytest.mark.parametrize("text", ["[{", "[1, 2]", "[]", '[{"x": 1}]', "[{x}] is a set?", '["role"]', "{}", "[{}]"])
def test_texts_that_only_look_like_messages_are_texts(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, [row("3", text)])[0].text == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (str(MESSAGES), "as Python prints it"),
        ('[{"role": "user", "content": "1", "name": "x"}]', "a message must hold role and content and nothing else"),
        ('[{"role": "user"}]', "a message must hold role and content and nothing else"),
        ('[{"role": "user", "content": null}]', "role and content of a message must be texts"),
        ('[{"role": "user", "content": " "}]', "prompt is empty"),
        ('[{"role": "user", "content": "1"}, 2]', "a message must hold role and content and nothing else"),
    ],
)
def test_texts_that_are_no_right_messages_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1: ") as caught:
        load(tmp_path, [row("3", text)], CHAT_TOKENIZER)
    assert words in str(caught.value)


# --- an answer that is begun -----------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["3=", "<s>", "The answer\nis", "1+2", " so", "user"])
def test_an_answer_that_is_begun_is_gone_on_with(tmp_path: Path, begun: str) -> None:
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": begun}]
    assert load(tmp_path, [row("3", messages)], make_tokenizer(CLOSING))[0].text == f"<user>1+2</s><assistant>{begun}"


def test_an_earlier_answer_is_closed(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    text = load(tmp_path, [row("3", messages)], make_tokenizer(CLOSING))[0].text
    assert text == "<user>1</s><assistant>2</s><user>3</s><assistant>"


@pytest.mark.parametrize("begun", ["", " ", "\n"])
def test_an_empty_beginning_is_refused(tmp_path: Path, begun: str) -> None:
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": begun}]
    with pytest.raises(ConfigError, match="line 1: the prompt ends with an empty assistant message"):
        load(tmp_path, [row("3", messages)], make_tokenizer(CLOSING))


def test_a_template_that_cannot_go_on_is_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3="}]
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="line 1: the tokenizer's chat template refuses this prompt"):
        load(tmp_path, [row("3", messages)], make_tokenizer(users))


# --- templates that print the date -----------------------------------------------------------------------


def test_a_template_prints_the_date_that_is_set_and_no_time(tmp_path: Path) -> None:
    prompts = load(tmp_path, [row("3")], make_tokenizer(DATED), template_date="2025-02-28")
    assert prompts[0].text == "28 Feb 2025 00:00<user>1+2="
    other = load(tmp_path, [row("3")], make_tokenizer(DATED), template_date="2025-03-01")
    assert other.fingerprint != prompts.fingerprint


@pytest.mark.parametrize("wrong", ["today", "2025-2-3", "2025-02-30", "20250203", "2025-02-28T10:00"])
def test_dates_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="template_date"):
        build_config({"demo": {"task": "sums"}, "data": {"template_date": wrong}}, "test")
