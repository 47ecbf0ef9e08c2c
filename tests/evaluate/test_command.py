"""``dapo-async eval`` with real workers: interrupted and resumed it tells the same, and it refuses what would not."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_async.cli import main
from dapo_async.config.toml import build_config
from dapo_async.demo.demo import build_demo
from dapo_async.errors import CheckpointError
from dapo_async.evaluate.answers import AnswerFile
from dapo_async.rl.scores import ScoredAnswer

RUN = """
[model]
path = "elsewhere"
[data]
train = "elsewhere"
heldout = "{folder}/train.jsonl"
max_prompt_tokens = 16
[sampling]
max_tokens = 24
group_size = 4
[reward]
verifier = "sums"
[workers]
count = 2
slots = 4
prefetch_groups = 0
step_delay_s = 0.01
[evaluation]
samples = 3
top_p = 0.7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts, tokenizer and an untrained model, as files, and settings under which answering takes a while."""
    folder = tmp_path_factory.mktemp("demo")
    small: dict[str, Any] = {"train_prompts": 40, "heldout_prompts": 6, "hidden_size": 32, "layers": 1, "threads": 1}
    table = {"demo": {"task": "sums", "warm_start_iterations": 1, "warm_start_batch": 4, **small}}
    build_demo(folder, build_config(table, "test").demo, 0, lambda *_: None)
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "result.json"
    assert main(arguments(folder, "--out", str(out))) == 0
    return out


def arguments(folder: Path, *more: str) -> list[str]:
    return ["eval", str(folder / "model"), "--config", str(folder / "run.toml"), *more]


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The one sentence with which this command line is refused, exit code 2."""
    capsys.readouterr()
    assert main([*line]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = [text for text in err.splitlines() if text.startswith("dapo-async: ")]
    assert len(told) == 1
    return told[0].removeprefix("dapo-async: ")


# --- interrupted and resumed ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed_gives_the_same_result(
    folder: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out, answers = tmp_path / "result.json", tmp_path / "result.answers.jsonl"
    command = [sys.executable, "-m", "dapo_async.cli", *arguments(folder, "--out", str(out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60.0
            while not answers.exists() or len(answers.read_bytes().splitlines()) < 4:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "no answers within 60 s"
                time.sleep(0.01)
            process.send_signal(number)
            printed, told = process.communicate(timeout=60.0)
        finally:
            process.kill()
    kept = answers.read_bytes().splitlines(keepends=True)
    assert 3 <= len(kept) - 1 < 40, "it was not interrupted half-way: this shows nothing"
    assert printed == ""
    assert not out.exists()
    if number == signal.SIGKILL:
        answers.write_bytes(b"".join(kept[:-1]) + kept[-1][:20])  # a torn line
    else:
        assert process.returncode == 128 + number
        assert (
            f"interrupted: {len(kept) - 1} of 40 prompts are answered, kept in {answers}: go on with --resume" in told
        )
    assert main(arguments(folder, "--out", str(out), "--resume")) == 0
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    by_place = sorted(answers.read_text().splitlines()[1:])
    assert by_place == sorted((whole.parent / "result.answers.jsonl").read_text().splitlines()[1:])


def test_a_finished_evaluation_resumed_tells_the_same(folder: Path, whole: Path) -> None:
    before = json.loads(whole.read_text())
    whole.unlink()
    assert main(arguments(folder, "--out", str(whole), "--resume")) == 0
    assert json.loads(whole.read_text()) == before


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "4"], "was begun with k = 3, now it is 4"),
        (["--temperature", "0.9"], "was begun with temperature = 1.0, now it is 0.9"),
        (["--top-p", "1.0"], "was begun with top_p = 0.7, now it is 1.0"),
        (["--data", "heldout.jsonl"], "was begun with prompts = "),
    ],
)
def test_other_settings_are_not_resumed(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    options = [str(folder / option) if option.endswith("jsonl") else option for option in options]
    kept = (whole.parent / "result.answers.jsonl").read_bytes()
    told = refused(capsys, *arguments(folder, "--out", str(whole), "--resume", *options))
    assert words in told
    assert told.endswith("go on with the same, or choose another --out")
    assert (whole.parent / "result.answers.jsonl").read_bytes() == kept


def test_other_weights_are_not_resumed(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    for file in (folder / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    copy = ["eval", str(tmp_path / "model"), "--config", str(folder / "run.toml"), "--out", str(whole), "--resume"]
    assert main(copy) == 0  # the same bits elsewhere are the same model
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1.0
    model.save_pretrained(tmp_path / "model")
    assert "was begun with weights = 'xxh3-128" in refused(capsys, *copy)


REFUSED = {
    "resume without a file": (["--resume"], "--resume needs --out FILE"),
    "top_p": (["--top-p", "1.5"], "eval: evaluation.top_p = 1.5: Expected `float` <= 1.0"),
    "temperature": (["--temperature", "0"], "eval: evaluation.temperature = 0.0: Expected `float` > 0.0"),
    "more answers than a message holds": (["--k", "100000", "--set-small"], "network.max_message_mb"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, words = REFUSED[case]
    line = arguments(folder, *(option for option in options if option != "--set-small"))
    if "--set-small" in options:
        (folder / "small.toml").write_text(RUN.format(folder=folder) + "[network]\nmax_message_mb = 1\n")
        line[line.index(str(folder / "run.toml"))] = str(folder / "small.toml")
    assert words in refused(capsys, *line)


def test_a_hub_id_needs_settings_and_a_hub(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(capsys, "eval", "owner/name") == (
        "owner/name: no such folder; if it is a hub id, say --config FILE too"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = refused(capsys, "eval", "owner/name", "--config", str(folder / "run.toml"))
    assert told.startswith(
        'model.path = "owner/name" is neither a folder nor a hub id reachable from here with a tokenizer'
    )


def test_nothing_to_resume(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, *arguments(folder, "--out", str(tmp_path / "result.json"), "--resume"))
    assert told == f"{tmp_path}/result.answers.jsonl: no evaluation to go on with; start it without --resume"


# --- the workers' logs -------------------------------------------------------------------------------------


def log_folders(folder: Path) -> list[Path]:
    return list(folder.glob("dapo-async-logs-*"))


def test_logs_are_kept_if_the_workers_fail_and_only_then(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = RUN.format(folder=folder)
    (tmp_path / "bad.toml").write_text(text.replace('"sums"', '"no_such_module:judge"'))
    assert main(["eval", str(folder / "model"), "--config", str(tmp_path / "bad.toml")]) == 1
    (kept,) = log_folders(tmp_path)
    assert f"Last lines of {kept}/w" in capsys.readouterr().err
    assert "no_such_module" in "".join(log.read_text() for log in kept.glob("w*.log"))
    shutil.rmtree(kept)
    assert main(arguments(folder, "--k", "1")) == 0
    assert log_folders(tmp_path) == []


# --- the file of answers ----------------------------------------------------------------------------------

ONE = [ScoredAnswer(correct=True, predicted="7", num_tokens=2, truncated=False)]


def test_an_interrupted_evaluation_is_not_overwritten_and_a_finished_one_is(tmp_path: Path) -> None:
    path = tmp_path / "r.answers.jsonl"
    with AnswerFile(path, {"k": 1}, 2, resume=False) as file:
        file.write(1, "p1", ONE)
    with pytest.raises(CheckpointError, match="holds 1 answered prompts of an interrupted evaluation"):
        AnswerFile(path, {"k": 1}, 2, resume=False)
    with AnswerFile(path, {"k": 1}, 2, resume=True) as file:
        assert file.kept == {1: ONE}
        file.write(0, "p0", ONE)
    with AnswerFile(path, {"k": 1}, 2, resume=False) as file:
        assert file.kept == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"nonsense\n", "not a file of answers"),
        (b'{"place":2,"prompt_id":"p","answers":[{"correct":true,"num_tokens":1,"truncated":false}]}\n', "prompt 2"),
        (b'{"place":1,"prompt_id":"p","answers":[]}\n', "prompt 1"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "r.answers.jsonl"
    path.write_bytes(b'{"k":1}\n' + line)
    with pytest.raises(CheckpointError, match=words):
        AnswerFile(path, {"k": 1}, 2, resume=True)
