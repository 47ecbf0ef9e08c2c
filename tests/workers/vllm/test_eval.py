"""``dapo-async eval --engine vllm`` of a real checkpoint, on vLLM's CPU build: interrupted, resumed, table and JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from math import sqrt
from pathlib import Path

import pytest

from dapo_async.cli import main
from dapo_async.config.settings import Config
from dapo_async.run.launch import train
from tests.whole_run.test_training import demo, settings  # noqa: F401
from tests.workers.vllm.test_engine import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(300)]
K = 8
PROMPTS = 32


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_with_vllm_and_an_interruption_is_made_good(
    demo: Config,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = {"slots": 4, "prefetch_groups": 0, "step_delay_s": 0.005}  # so that it can be interrupted half-way
    config = settings(demo, tmp_path, run={"batches": 2}, workers=slow, evaluation={"max_prompts": 0})
    run = train(config).folder
    assert run is not None
    out, answers = tmp_path / "vllm.json", tmp_path / "vllm.answers.jsonl"
    line = ["eval", str(run / "checkpoints" / "step_2"), "--k", str(K), "--engine", "vllm", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "dapo_async.cli", *line], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 120.0
            while not answers.exists() or len(answers.read_bytes().splitlines()) < 4:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "no answers within 120 s"
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60.0)
        finally:
            process.kill()
    kept = answers.read_text().splitlines()
    assert process.returncode == 128 + signal.SIGINT
    assert 4 <= len(kept) < 1 + PROMPTS, "it was not interrupted half-way: this shows nothing"
    assert f"interrupted: {len(kept) - 1} of {PROMPTS} prompts are answered" in told
    assert not out.exists()

    capsys.readouterr()
    assert main([*line, "--resume"]) == 0
    printed, table = capsys.readouterr()
    result = json.loads(out.read_text())
    assert json.loads(printed) == result
    assert answers.read_text().splitlines()[: len(kept)] == kept
    places = [json.loads(text)["place"] for text in answers.read_text().splitlines()[1:]]
    assert sorted(places) == list(range(PROMPTS))
    assert (result["engine"], result["prompts"], result["k"]) == ("vllm", PROMPTS, K)
    correct = [one["correct"] for text in answers.read_text().splitlines()[1:] for one in json.loads(text)["answers"]]
    assert len(correct) == PROMPTS * K
    accuracy = sum(correct) / len(correct)
    assert 0.0 < accuracy < 1.0, "all alike: this shows nothing"
    assert result["scores"][f"avg@{K}"]["value"] == pytest.approx(accuracy)
    assert f"avg@{K}" in table

    # The embedded engine samples the same distribution; answers to one prompt are independent given the policy.
    embedded = tmp_path / "embedded.json"
    line[-3:] = ["torch", "--out", str(embedded)]
    assert main(line) == 0
    other = json.loads(embedded.read_text())
    noise = sqrt(2 * 0.25 / len(correct))
    assert abs(other["scores"][f"avg@{K}"]["value"] - accuracy) <= 4 * noise
    assert os.listdir(run / "checkpoints") == ["step_2"]  # nothing of it is written there
