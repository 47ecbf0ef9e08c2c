"""JSON lines that a resumed run continues, and the records kept that way."""

import json
import os
from pathlib import Path

import pytest

from dapo_async.errors import CheckpointError, ConfigError, DapoError
from dapo_async.observe.records import NO_STEP, JsonLines, Sample, TrainedBatch


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, *numbers: int, resume_step: int | None = None) -> JsonLines:
    file = JsonLines(path, resume_step)
    for number in numbers:
        file.write({"step": number})
    file.close()
    return file


def sample(**changes: object) -> Sample:
    fields: dict = {
        "step": 3,
        "worker": "w0",
        "lease": 41,
        "prompt": "3+5=",
        "answer": "#8",
        "truth": "8",
        "predicted": "8",
        "correct": True,
        "reward": 1.0,
        "advantage": 0.5,
        "num_tokens": 3,
        "spans": [(2, 1), (3, 2)],
        "finish": "stop",
    }
    return Sample(**(fields | changes))


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "deep" / "x.jsonl")
    file.write({"step": 1, "value": float("nan")})
    assert (tmp_path / "deep" / "x.jsonl").read_text() == '{"step":1,"value":null}\n'
    file.close()
    file.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(NO_STEP, []), (0, [0]), (1, [0, 1, 1]), (2, [0, 1, 1, 2]), (9, [0, 1, 1, 2])]
)
def test_resume_keeps_exactly_the_steps_up_to_the_checkpoint(resume_step: int, kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, 0, 1, 1, 2)
    file = write(path, 70, resume_step=resume_step)
    assert steps(path) == [*kept, 70]
    assert file.last == ({"step": kept[-1]} if kept else {})
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_resume_drops_a_line_torn_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, 1)
    with path.open("a") as file:
        file.write('{"step": 2}')  # even if it reads: what follows would be glued to it
    write(path, 2, resume_step=5)
    assert path.read_text() == '{"step":1}\n{"step":2}\n'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{not json}", "line 2: not a JSON object"), ("[1]", "line 2: not a JSON object"), ('{"a": 1}', "line 2: has no")],
)
def test_resume_refuses_a_damaged_file_and_leaves_it_alone(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    damaged = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(damaged)
    with pytest.raises(CheckpointError, match=complaint):
        JsonLines(path, resume_step=1)
    assert path.read_text() == damaged


def test_a_new_run_refuses_the_lines_of_another_but_not_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.touch()
    write(path, 1)
    with pytest.raises(ConfigError, match=r"holds another run: continue it with --resume, or choose another run\.name"):
        JsonLines(path)
    assert steps(path) == [1]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    file = JsonLines(tmp_path / "x.jsonl")
    with pytest.raises(DapoError, match=r"x\.jsonl: cannot be written: No space left on device"):
        file.write({"step": 1})
    with pytest.raises(DapoError, match="No space left"):
        file.close()
    file.close()


def test_samples_and_ledger_are_readable_and_resume(tmp_path: Path) -> None:
    for resume_step in (None, 2):
        samples = JsonLines(tmp_path / "samples.jsonl", resume_step)
        ledger = JsonLines(tmp_path / "ledger.jsonl", resume_step)
        samples.write(sample())
        ledger.write(TrainedBatch(step=3, leases=[40, 41], prompt_ids=["a", "b"]))
        samples.close()
        ledger.close()
    assert json.loads((tmp_path / "ledger.jsonl").read_text()) == {
        "step": 3,
        "leases": [40, 41],
        "prompt_ids": ["a", "b"],
    }
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert (line["prompt"], line["answer"], line["spans"], line["correct"]) == ("3+5=", "#8", [[2, 1], [3, 2]], True)


def test_half_a_character_does_not_end_the_run(tmp_path: Path) -> None:
    samples = JsonLines(tmp_path / "samples.jsonl")
    samples.write(sample(truth="\ud83d"))
    samples.close()
    assert json.loads((tmp_path / "samples.jsonl").read_text())["truth"] == "?"


def test_markdown_shows_markup_instead_of_applying_it() -> None:
    text = sample(prompt="# 3+5\n```", answer="", correct=False, reward=-1.25, advantage=-0.5).markdown()
    assert "    # 3+5\n    ```\n\n---\n\n    \n" in text
    assert "**wrong**" in text
    assert "reward -1.250, advantage -0.500" in text
    assert "1 of version 2, 2 of version 3" in text
    assert "3 tokens" in text
    assert "stop" in text
