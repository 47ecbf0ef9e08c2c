"""Prompt files in both layouts, what is counted, what is refused, and the stream as a function of position."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dapo_async.config.settings import Data
from dapo_async.data.prompts import PromptSet, PromptStream, load_prompts, permutation
from dapo_async.errors import ConfigError

SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(4) for b in range(3)]
DAPO_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())])),
    ]
)
AIME_SCHEMA = DAPO_SCHEMA.set(
    4,
    pa.field("extra_info", pa.struct([("index", pa.int64()), ("raw_problem", pa.string()), ("split", pa.null())])),
).append(pa.field("__index_level_0__", pa.int64()))


def make_tokenizer(template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable character, and a few special ones."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = template
    return made


PLAIN_TOKENIZER = make_tokenizer()
CHAT_TOKENIZER = make_tokenizer(TEMPLATE)


def dapo_row(content: str, truth: Any, index: Any = None, role: str = "user") -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": role}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=1000)
    return path


def load(path: Path, tokenizer: Any = PLAIN_TOKENIZER, limit: int = 0, **data: Any) -> PromptSet:
    return load_prompts(path, tokenizer, Data(train=str(path), **data), limit=limit)


def refusal(path: Path, tokenizer: Any = PLAIN_TOKENIZER, **data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, tokenizer, **data)
    return str(caught.value)


def contents(prompts: PromptSet) -> list[tuple[str, list[int], str, str]]:
    return [(prompt.id, prompt.ids.tolist(), prompt.truth, prompt.text) for prompt in prompts.prompts]


# --- layouts and formats ---------------------------------------------------------------------------------


def test_plain_rows_become_prompts_in_order(tmp_path: Path) -> None:
    prompts = load(write_jsonl(tmp_path / "plain.jsonl", PLAIN))
    assert [prompt.text for prompt in prompts.prompts] == [row["prompt"] for row in PLAIN]
    assert [prompt.truth for prompt in prompts.prompts] == [str(row["answer"]) for row in PLAIN]
    assert all(prompt.ids.dtype == np.int32 for prompt in prompts.prompts)
    assert PLAIN_TOKENIZER.convert_ids_to_tokens(prompts[5].ids.tolist()) == list(PLAIN[5]["prompt"])
    assert prompts.counts._asdict() == {
        "rows": 12, "without_truth": 0, "duplicates": 0, "conflicting": 0, "overlong_dropped": 0,
        "overlong_truncated": 0, "kept": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    "answer_type", [pa.int64(), pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_and_jsonl_give_the_same_prompts(tmp_path: Path, answer_type: pa.DataType) -> None:
    rows = [
        {**row, "answer": row["answer"] if pa.types.is_integer(answer_type) else str(row["answer"])} for row in PLAIN
    ]
    schema = pa.schema([("prompt", pa.string()), ("answer", answer_type)])
    parquet = load(write_parquet(tmp_path / "plain.parquet", rows, schema))
    assert contents(parquet) == contents(load(write_jsonl(tmp_path / "plain.jsonl", rows)))


def test_both_formats_of_the_dapo_layout_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [dapo_row(f"Solve {i}.\n\nAnswer: é", str(-i), f"uuid-{i}") for i in range(20)]
    parquet = load(write_parquet(tmp_path / "a.parquet", rows, DAPO_SCHEMA), CHAT_TOKENIZER)
    assert contents(parquet) == contents(load(write_jsonl(tmp_path / "a.jsonl", rows), CHAT_TOKENIZER))
    assert [(prompt.id, prompt.truth) for prompt in parquet.prompts] == [(f"uuid-{i}", str(-i)) for i in range(20)]


def test_parquet_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    assert len(load(write_parquet(tmp_path / "data", PLAIN))) == 12


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1", "answer": "2"}\n\n  \r\n{"prompt": "3", "answer": "4"}')
    assert [prompt.text for prompt in load(path).prompts] == ["1", "3"]


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*PLAIN[:2], PLAIN[0], *PLAIN[2:], "nonsense"])
    prompts = load(path, limit=4)
    assert [prompt.text for prompt in prompts.prompts] == [row["prompt"] for row in PLAIN[:4]]
    assert prompts.counts.kept == 4


# --- duplicates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_hundredfold_shuffled_file_holds_each_prompt_once(tmp_path: Path, form: str) -> None:
    unique = [dapo_row(f"problem {i}", str(i), f"uuid-{i}") for i in range(60)]
    rows = [unique[i] for i in np.random.default_rng(0).permutation(6000) % 60]
    path = tmp_path / f"a.{form}"
    prompts = load(write_jsonl(path, rows) if form == "jsonl" else write_parquet(path, rows, DAPO_SCHEMA))
    assert sorted(prompt.id for prompt in prompts.prompts) == sorted(f"uuid-{i}" for i in range(60))
    assert [prompt.text for prompt in prompts.prompts] == list(
        dict.fromkeys(row["prompt"][0]["content"] for row in rows)
    )
    assert prompts.counts == (6000, 0, 5940, 0, 0, 0, 60)
    assert prompts.summary() == f"{path}: 60 prompts of 6000 rows, 5940 duplicates removed"


def test_the_32_fold_aime_file_holds_30_prompts(tmp_path: Path) -> None:
    rows = [
        {**dapo_row(f"problem {i}", "33" if i < 2 else str(i)), "__index_level_0__": i}
        | {"extra_info": {"index": i, "raw_problem": f"{i}", "split": None}}
        for i in range(30)
        for _ in range(32)
    ]
    prompts = load(write_parquet(tmp_path / "aime-2024.parquet", rows, AIME_SCHEMA))
    assert [prompt.id for prompt in prompts.prompts] == [str(i) for i in range(30)]
    assert (prompts.counts.rows, prompts.counts.duplicates, prompts.counts.kept) == (960, 930, 30)


def test_the_first_of_conflicting_truths_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [dapo_row("a", "1", "x"), dapo_row("a", "2", "y"), dapo_row("a", "1", "z"), dapo_row("b", "1", "w")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = load(path)
    assert [(prompt.id, prompt.text, prompt.truth) for prompt in prompts.prompts] == [("x", "a", "1"), ("w", "b", "1")]
    assert prompts.counts == (4, 0, 1, 1, 0, 0, 2)
    message = (
        f"{path}: 2 prompts of 4 rows, 1 duplicates removed, "
        "1 removed that contradict an earlier row with the same prompt"
    )
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [message]


def test_a_plain_prompt_is_one_user_message(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, dapo_row("a", "1"), dapo_row("a", "1", role="system")]
    assert load(write_jsonl(tmp_path / "a.jsonl", rows)).counts == (3, 0, 1, 0, 0, 0, 2)


# --- ids -------------------------------------------------------------------------------------------------


def test_ids_are_hashes_when_indices_repeat(tmp_path: Path) -> None:
    rows = [dapo_row("a", "1", "x"), dapo_row("b", "1", "x"), dapo_row("c", "1", "y")]
    ids = [prompt.id for prompt in load(write_jsonl(tmp_path / "a.jsonl", rows)).prompts]
    assert len(set(ids)) == 3
    assert all(len(id_) == 16 and set(id_) <= set("0123456789abcdef") for id_ in ids)


def test_hashed_ids_depend_on_the_messages_alone(tmp_path: Path) -> None:
    some = load(write_jsonl(tmp_path / "a.jsonl", PLAIN[3:]), CHAT_TOKENIZER)
    every = load(write_jsonl(tmp_path / "b.jsonl", PLAIN[::-1]))
    assert {prompt.id for prompt in some.prompts} < {prompt.id for prompt in every.prompts}
    assert every.prompts[-1].id == "39ccf87e77d3fae1"  # computed once: logs of an older run name the same prompts


# --- tokens ----------------------------------------------------------------------------------------------


def test_the_chat_template_is_applied_as_transformers_does(tmp_path: Path) -> None:
    rows = [dapo_row("1+1", "2") | {"prompt": [{"role": "user", "content": "1+1"}, {"role": "user", "content": "!"}]}]
    [prompt] = load(write_jsonl(tmp_path / "a.jsonl", rows), CHAT_TOKENIZER).prompts
    assert prompt.text == "<s><user>1+1<user>!<assistant>"
    reference = CHAT_TOKENIZER.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=True)
    assert prompt.ids.tolist() == reference["input_ids"]
    assert CHAT_TOKENIZER.convert_ids_to_tokens(reference["input_ids"])[:2] == ["<s>", "<user>"]


def test_the_template_may_be_declined(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}], "answer": "3"}]
    [prompt] = load(write_jsonl(tmp_path / "a.jsonl", rows), CHAT_TOKENIZER, chat_template="never").prompts
    assert (prompt.text, len(prompt.ids), prompt.truth) == ("abc", 3, "3")


@pytest.mark.parametrize(
    ("template", "tokens"), [(None, ["<s>", "7"]), (TEMPLATE, ["<s>", "<user>", "7", "<assistant>"])]
)
def test_a_tokenizer_that_adds_a_start_token_adds_it_once_and_no_end(
    tmp_path: Path, template: str | None, tokens: list[str]
) -> None:
    tokenizer = make_tokenizer(template, adds_bos=True)
    assert tokenizer("7")["input_ids"] == tokenizer.convert_tokens_to_ids(["<s>", "7", "</s>"])
    [prompt] = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "7", "answer": "7"}]), tokenizer).prompts
    assert tokenizer.convert_ids_to_tokens(prompt.ids.tolist()) == tokens


def test_overlong_prompts_are_dropped_truncated_or_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": text, "answer": 0} for text in ("123", "12345", "1234")])
    dropped = load(path, max_prompt_tokens=4)
    assert [prompt.text for prompt in dropped.prompts] == ["123", "1234"]
    assert dropped.counts == (3, 0, 0, 0, 1, 0, 2)
    truncated = load(path, max_prompt_tokens=4, overlong_prompts="truncate_left")
    tokens = [PLAIN_TOKENIZER.convert_ids_to_tokens(prompt.ids.tolist()) for prompt in truncated.prompts]
    assert tokens == [list("123"), list("2345"), list("1234")]
    assert truncated.counts == (3, 0, 0, 0, 0, 1, 3)
    [_, shortest, _] = load(path, max_prompt_tokens=1, overlong_prompts="truncate_left").prompts
    assert PLAIN_TOKENIZER.convert_ids_to_tokens(shortest.ids.tolist()) == ["5"]
    assert refusal(path, max_prompt_tokens=4, overlong_prompts="refuse") == (
        f"{path}, line 2: the prompt has 5 tokens, more than data.max_prompt_tokens = 4; raise that, "
        'or set data.overlong_prompts to "drop" or "truncate_left"'
    )


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_truncation_keeps_the_start_token_and_the_end_of_the_prompt(tmp_path: Path, template: str | None) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "123456", "answer": 0}])
    tokenizer = make_tokenizer(template, adds_bos=True)
    for longest in (1, 2, 4):
        [prompt] = load(path, tokenizer, max_prompt_tokens=longest, overlong_prompts="truncate_left").prompts
        whole = ["<s>", *(["<user>"] if template else []), *"123456", *(["<assistant>"] if template else [])]
        expected = whole[-1:] if longest == 1 else ["<s>", *whole[1 - longest :]]
        assert tokenizer.convert_ids_to_tokens(prompt.ids.tolist()) == expected


def test_several_messages_without_a_template_are_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN[0], {"prompt": messages, "answer": "1"}])
    assert refusal(path) == (
        f"{path}, line 2: the prompt has 2 messages, and the tokenizer no chat template to make one text of them; "
        'set data.chat_template = "never" to join their contents as they are'
    )
    assert load(path, chat_template="never")[1].text == "abc"


def test_a_missing_template_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    told = "the tokenizer has no chat template: prompts are their contents as they are"
    with caplog.at_level("INFO"):
        for tokenizer, choice, expected in (
            (PLAIN_TOKENIZER, "auto", True),
            (PLAIN_TOKENIZER, "never", False),
            (CHAT_TOKENIZER, "auto", False),
        ):
            caplog.clear()
            load(path, tokenizer, chat_template=choice)
            assert (told in caplog.messages) == expected


def test_rows_are_accounted_for_across_chunks(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i % 400 + 1), "answer": i % 5} for i in range(1600)]
    counts = load(write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_tokens=300).counts
    assert counts.rows == 1600 == counts.duplicates + counts.conflicting + counts.overlong_dropped + counts.kept
    assert (counts.kept, counts.overlong_dropped, counts.conflicting) == (300, 100, 0)


# --- refusals --------------------------------------------------------------------------------------------

LAYOUTS = (
    "needed are prompt and answer, or, as in DAPO-Math-17k, prompt (a list of messages with role and content) and "
    "reward_model (with ground_truth)"
)
GOOD = '{"prompt": "1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": ', "not valid JSON: Input data was truncated"),
        ("[1]", "must be one JSON object per line, got [1]"),
        ('{"question": "1", "answer": "2"}', f"has columns question, answer; {LAYOUTS}"),
        ('{"prompt": "1"}', f"has columns prompt; {LAYOUTS}"),
        ("{}", f"has columns (none); {LAYOUTS}"),
        ('{"prompt": 5, "answer": "2"}', "prompt must be a text or a list of messages, got 5"),
        ('{"prompt": "  ", "answer": "2"}', "prompt is empty"),
        ('{"prompt": [], "answer": "2"}', "prompt is empty"),
        ('{"prompt": ["1"], "answer": "2"}', 'a message must hold role and content and nothing else, got "1"'),
        (
            '{"prompt": [{"role": "user", "content": [1]}], "answer": "2"}',
            'role and content of a message must be texts, got ["user",[1]]',
        ),
        ('{"prompt": "1", "answer": null}', "answer must be a text or an integer, got null"),
        ('{"prompt": "1", "answer": 2.5}', "answer must be a text or an integer, got 2.5"),
        ('{"prompt": "1", "answer": true}', "answer must be a text or an integer, got true"),
        ('{"prompt": "1", "reward_model": {}}', "reward_model.ground_truth must be a text or an integer, got null"),
        ('{"prompt": "1", "reward_model": "2"}', "reward_model.ground_truth must be a text or an integer, got null"),
        (
            '{"prompt": "1", "answer": "2", "extra_info": {"index": [1]}}',
            "extra_info.index must be a text or an integer, got [1]",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    assert refusal(path) == f"{path}, line 3: {problem}"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "answer": "1"}\n')
    assert refusal(path).startswith(f"{path}, line 2: not valid JSON: ")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    assert refusal(missing) == (
        f"{missing}: no such file or folder, nor the form of a hub id (owner/name); prompts come as a JSONL or Parquet "
        "file, a folder, or a hub id"
    )
    pointer = tmp_path / "pointer.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(pointer).startswith(f"{pointer}: not a readable Parquet file: ")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    write_jsonl(path, []) if form == "jsonl" else write_parquet(path, [], DAPO_SCHEMA)
    assert refusal(path) == f"{path}: no prompt is left of 0 rows: it is empty"


def test_a_file_of_overlong_prompts_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    assert (
        refusal(path, max_prompt_tokens=3) == f"{path}: no prompt is left of 12 rows: all exceed data.max_prompt_tokens"
    )


def test_bad_parquet_columns_and_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"question": "1", "answer": "2"}])
    assert refusal(path) == f"{path}: has columns question, answer; {LAYOUTS}"
    write_parquet(path, [{"prompt": ["1"], "answer": "2"}])
    assert refusal(path).startswith(
        f"{path}: column prompt must hold texts or lists of messages (role, content), got list<"
    )
    write_parquet(path, [{"prompt": 1, "answer": "2"}])
    assert refusal(path) == f"{path}, row 1: prompt must be a text or a list of messages, got 1"
    write_parquet(path, [dapo_row("1", "2"), dapo_row("1", None)], DAPO_SCHEMA)
    assert refusal(path) == f"{path}, row 2: reward_model.ground_truth must be a text or an integer, got null"
    write_parquet(path, [dapo_row("1", "2"), dapo_row("3", "2") | {"prompt": None}, dapo_row("4", "2")], DAPO_SCHEMA)
    assert refusal(path) == f"{path}, row 2: prompt must be a text or a list of messages, got null"
    write_parquet(path, [dapo_row("1", "2"), dapo_row("3", "2") | {"prompt": [None]}], DAPO_SCHEMA)
    assert refusal(path) == f"{path}, row 2: role and content of a message must be texts, got [null,null]"
    write_parquet(path, [{"prompt": "1", "answer": 2.5}])
    assert refusal(path) == f"{path}, row 1: answer must be a text or an integer, got 2.5"


def test_templates_that_are_missing_or_refuse_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*PLAIN, dapo_row("1", "2", role="tool")])
    assert refusal(path, CHAT_TOKENIZER) == (
        f"{path}, line 13: the tokenizer's chat template refuses this prompt: no tools here"
    )
    assert refusal(path, chat_template="require") == (
        'data.chat_template = "require": the tokenizer has no chat template; use "auto" or "never"'
    )


def test_a_prompt_without_tokens_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN[0], {"prompt": "x", "answer": 1}])
    tokenizer = make_tokenizer("{% if messages[0].content != 'x' %}7{% endif %}")
    assert refusal(path, tokenizer) == f"{path}, line 2: the tokenizer makes no token of this prompt"


# --- the stream ------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> PromptSet:
    return load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i), "answer": i} for i in range(50)]))


def ids_of(stream: PromptStream, positions: range) -> list[str]:
    return [stream[n].truth for n in positions]


def test_each_epoch_is_another_permutation(prompts: PromptSet) -> None:
    stream = PromptStream(prompts, seed=3, shuffle=True, epochs=3)
    epochs = [ids_of(stream, range(50 * e, 50 * e + 50)) for e in range(3)]
    everything = [str(i) for i in range(50)]
    assert [sorted(epoch, key=int) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in [*epochs, everything]}) == 4
    assert ids_of(PromptStream(prompts, seed=4, shuffle=True, epochs=1), range(50)) not in epochs


def test_position_alone_decides(prompts: PromptSet) -> None:
    whole = ids_of(PromptStream(prompts, seed=3, shuffle=True, epochs=0), range(200))
    resumed = PromptStream(prompts, seed=3, shuffle=True, epochs=0)
    assert ids_of(resumed, range(120, 200)) == whole[120:]
    assert ids_of(resumed, range(199, -1, -1)) == whole[::-1]
    longer = PromptStream(prompts, seed=3, shuffle=True, epochs=9)
    assert ids_of(longer, range(200)) == whole


def test_the_order_is_pinned() -> None:
    # Computed once; a resumed run must find the same order under any version of NumPy.
    assert permutation(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, seed=0, epoch=1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


def test_the_order_is_fair() -> None:
    # Each of the 6 orders of 3 is drawn about 1000 times in 6000 epochs: standard deviation 29, so 150 is 5 of them.
    orders, counts = np.unique([permutation(3, seed=1, epoch=e) for e in range(6000)], axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 1000).max() < 150


def test_without_shuffling_the_order_is_that_of_the_file(prompts: PromptSet) -> None:
    stream = PromptStream(prompts, seed=3, shuffle=False, epochs=2)
    assert [prompt.truth for prompt in stream] == [str(i) for i in range(50)] * 2


def test_a_finite_stream_ends_and_an_endless_one_has_no_length(prompts: PromptSet) -> None:
    stream = PromptStream(prompts, seed=0, shuffle=True, epochs=2)
    assert (len(stream), stream.total) == (100, 100)
    for n in (100, -1):
        with pytest.raises(IndexError, match=f"prompt {n} of a stream of 100"):
            stream[n]
    endless = PromptStream(prompts, seed=0, shuffle=True, epochs=0)
    assert (endless.total, bool(endless)) == (None, True)
    assert endless[10**12].truth in {str(i) for i in range(50)}
    with pytest.raises(TypeError, match="endless"):
        len(endless)


def test_the_fingerprint_tells_prompts_apart(tmp_path: Path) -> None:
    def fingerprint(rows: list[Any], tokenizer: Any = PLAIN_TOKENIZER) -> str:
        loaded = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
        return PromptStream(loaded, seed=0, shuffle=True, epochs=0).fingerprint

    assert fingerprint(PLAIN) == fingerprint([*PLAIN, PLAIN[0]])
    others = [
        PLAIN[1:],
        PLAIN[::-1],
        [*PLAIN[:-1], {**PLAIN[-1], "answer": 77}],
        [dapo_row("1", "2", "x")],
        [dapo_row("1", "2", "y")],
    ]
    assert len({fingerprint(rows) for rows in [PLAIN, *others]} | {fingerprint(PLAIN, CHAT_TOKENIZER)}) == 7
