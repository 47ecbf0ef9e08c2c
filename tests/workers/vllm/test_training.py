"""Whole runs whose workers are vLLM's, alone and beside the embedded engine, on the CPU build."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dapo_async.config.settings import Config
from dapo_async.run.launch import train
from tests.whole_run.test_training import check_account, check_trained_once, demo, free_port, lines, settings, steps  # noqa: F401
from tests.workers.vllm.test_engine import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(600)]


def test_reward_rises_with_vllm_as_it_does_with_the_embedded_engine(demo: Config, tmp_path: Path) -> None:  # noqa: F811
    """The run of ``test_training.test_reward_rises``, and the same margin."""
    config = settings(
        demo,
        tmp_path,
        run={"batches": 60, "stall_timeout_s": 180.0},
        reward={"overlong_cache_tokens": 0},
        optimizer={"lr": 5e-4},
        sampling={"group_size": 8},
        schedule={"groups_per_batch": 8},
        workers={"engine": "vllm", "slots": 64, "kv_cache": "recompute"},
        evaluation={"max_prompts": 32, "samples": 8},
    )
    finished = train(config)
    assert finished.summary["final_accuracy"] >= finished.summary["start_accuracy"] + 0.10
    measured = steps(finished.folder)
    assert any(step["staleness/mixed_version_share"] > 0 for step in measured), "no weights were swapped in flight"
    # Same distribution on both sides: nothing but the policy's own movement separates sampler and learner.
    assert measured[0]["policy/kl_behaviour_k3"] < 1e-6
    check_account(finished.summary)
    check_trained_once(finished.folder, 60)


def test_both_engines_work_for_one_run(demo: Config, tmp_path: Path) -> None:  # noqa: F811
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "dapo_async.cli", "work", "--connect", address, "--name", "other"]
    with (tmp_path / "other.log").open("w") as log:
        other = subprocess.Popen([*command, "--engine", "vllm"], stdout=log, stderr=log)
        try:
            config = settings(
                demo,
                tmp_path,
                run={"batches": 40, "stall_timeout_s": 180.0},
                network={"control": address},
                workers={"slots": 8, "step_delay_s": 0.02},  # the one that the run starts; slow enough to be joined
                logging={"samples_per_batch": 4},
            )
            finished = train(config)
            assert other.wait(timeout=60.0) == 0, (tmp_path / "other.log").read_text()
        finally:
            other.kill()
            other.wait(timeout=30.0)
    who = Counter(sample["worker"] for sample in lines(finished.folder / "samples.jsonl"))
    assert min(who["w0"], who["other"]) >= 4, who
    check_account(finished.summary)
    check_trained_once(finished.folder, 40)
