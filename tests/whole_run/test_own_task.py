"""The page on a task of one's own is true: its files are taken from it, checked, called and trained on."""

import itertools
import json
import re
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_async.cli import main
from dapo_async.config.settings import Demo, Reward
from dapo_async.demo import demo
from dapo_async.demo.warm_start import Example, warm_start
from dapo_async.verify.verifier import built_in, make_verifier
from tests import ROOT

PAGE = (ROOT / "docs/own_task.md").read_text(encoding="utf-8")
Judge = Callable[[str, str], Any]
# What the page leaves to the user's machine: a model this small needs no GPU, and two rows make no larger batch.
HERE = {
    "model.path": "model",
    "model.precision": "float32",
    "workers.engine": "torch",
    "schedule.groups_per_batch": 2,
    "sampling.max_tokens": 40,
    "reward.overlong_cache_tokens": 8,
    "optimizer.lr": 1e-4,
    "run.batches": 2,
    "run.max_minutes": 1,  # a run without a right answer would not end
    "logging.samples_per_batch": 16,
}
ANSWERS = ("Answer: 3*5+7", "Answer: 3*5-7"), ("Answer: 2*4+9", "Answer: 2+4*9")  # right and wrong, of each row


def block(language: str) -> str:
    """The page's only code block in this language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the files of the page."""
    for name, language in {"train.jsonl": "jsonl", "my_rewards.py": "python", "run.toml": "toml"}.items():
        (tmp_path / name).write_text(block(language), encoding="utf-8")
    (tmp_path / "heldout.jsonl").write_text(block("jsonl"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def judge(folder: Path) -> Judge:
    module: dict[str, Any] = {}
    exec(compile(block("python"), "my_rewards.py", "exec"), module)
    function: Judge = module["judge"]
    return function


def save_model(folder: Path, rows: list[dict[str, str]], iterations: int) -> None:
    """A tiny model of single letters that answers each row right about as often as wrong."""
    vocabulary = {
        token: index for index, token in enumerate([demo.PAD, demo.EOS, demo.UNKNOWN, *string.printable[:95]])
    }
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token=demo.UNKNOWN))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token=demo.PAD,
        eos_token=demo.EOS,
        unk_token=demo.UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    model = demo.make_model(tokenizer, Demo(hidden_size=32, layers=1))
    shown = [
        Example(tokenizer(row["prompt"])["input_ids"], [*tokenizer(answer)["input_ids"], vocabulary[demo.EOS]])
        for row, answers in zip(rows, ANSWERS, strict=True)
        for answer in answers
    ]
    warm_start(model, itertools.cycle(shown), iterations, len(shown), 1e-2, lambda *_: None)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")


def run(command: str, *, without: tuple[str, ...] = ()) -> int:
    settings = [f"--set={key}={value}" for key, value in HERE.items() if key not in without]
    return main([command, "run.toml", *settings])


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in block("jsonl").splitlines()]


def test_check_accepts_the_pages_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(folder, rows(), iterations=1)
    assert run("check", without=("sampling.max_tokens", "reward.overlong_cache_tokens")) == 2
    assert "exceeds what model.path = model was made for: 1024 positions" in capsys.readouterr().err
    assert run("check") == 0
    out = capsys.readouterr().out
    assert "2 kept" in out
    resolved = json.loads(out[out.index("\n{") :])
    for table, settings in tomllib.loads(block("toml")).items():
        for key, value in settings.items():
            assert resolved[table][key] == HERE.get(f"{table}.{key}", value)


def test_the_function_judges_the_pages_rows(judge: Judge) -> None:
    for row, (right, wrong) in zip(rows(), ANSWERS, strict=True):
        assert judge(f"Let me see. {right}", row["answer"]) == (True, right.removeprefix("Answer: "))
        assert judge(wrong, row["answer"]) == (False, wrong.removeprefix("Answer: "))
    truth = rows()[0]["answer"]
    for text in (
        "",
        "22",
        "Answer: 22",
        "Answer: 3*5+7+0",
        "Answer: (3",
        "Answer: __import__('os')",
        "Answer: 7+7.5*2",
    ):
        assert judge(text, truth)[0] is False


def test_the_line_to_try_it_by_hand_tries_it(folder: Path, judge: Judge) -> None:
    [command] = re.findall(r"^python -c '(.*)'$", PAGE, re.MULTILINE)
    [call] = re.findall(r"print\((.*)\)$", command)
    assert eval(call, {"judge": judge}) == (True, "3*5+7")


def test_the_table_holds_the_verifiers_there_are() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(named) == sorted([*built_in(Reward()), "math_verify"])


@pytest.mark.parametrize(
    ("verifier", "text", "truth", "correct"),
    [
        ("dapo_math", "Answer: 12 km\n", "12", True),
        ("dapo_math", "Answer: 1,234\nor so", "1234", True),
        ("dapo_math", "Answer: 33.0", "33", False),
        ("dapo_math", "Answer: 7" + "." * 300, "7", False),
        ("dapo_math", r"\boxed{7}", "7", False),
        ("exact", " seven\n", "seven", True),
        ("exact", "It is seven", "seven", False),
        ("sums", "3+5=8;#8", "8", True),
        ("sums", "#3+5=8;#8", "8", False),
    ],
)
def test_what_the_table_says_is_right_is_right(verifier: str, text: str, truth: str, correct: bool) -> None:
    made = make_verifier(Reward(verifier=verifier))
    made.submit(0, text, truth)
    assert made.poll()[0][1].correct is correct


@pytest.mark.slow
def test_two_batches_are_trained_with_the_pages_files(folder: Path) -> None:
    torch.manual_seed(0)
    save_model(folder, rows(), iterations=150)
    assert run("train") == 0
    [made] = (folder / "runs").iterdir()
    samples = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    assert {sample["correct"] for sample in samples} == {True, False}
    truths = {row["prompt"]: row["answer"] for row in rows()}
    assert all(truths[sample["prompt"]] == sample["truth"] for sample in samples)
    assert all(
        sample["predicted"] == sample["answer"].removesuffix(demo.EOS).rpartition("Answer:")[2].strip()
        for sample in samples
    )
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    numbers = {name: value for line in lines for name, value in line.items()}
    assert numbers["step"] == 2
    assert (numbers["verifier/errors"], numbers["verifier/timeouts"]) == (0, 0)
    assert (made / "logs" / "w0.log").is_file()
