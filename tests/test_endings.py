"""Runs that do not end as planned, with real workers: each says why, saves what can be saved, and does not hang."""

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_async import waiting
from dapo_async.cli import main

BASE: dict[str, Any] = {
    "run": {"batches": 3, "stall_timeout_s": 90.0},
    "demo": {
        "task": "sums",
        "train_prompts": 100,
        "heldout_prompts": 1,
        "hidden_size": 16,
        "layers": 1,
        "warm_start_iterations": 2,
        "threads": 1,
    },
    "data": {"max_prompt_tokens": 32},
    "sampling": {"group_size": 2, "max_tokens": 8},
    "schedule": {"groups_per_batch": 2, "max_staleness": 1, "filter": False},
    "reward": {"verifier": "sums"},
    "learner": {"microbatch_tokens": 64},
    "workers": {"slots": 8},
    "network": {"heartbeat_s": 0.2, "silence_s": 3.0},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo is kept from test to test."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``dapo-async train`` in this process, in ``tmp_path``. Gives its exit code and all it said."""

    def start(*arguments: str, **tables: dict[str, Any]) -> tuple[int, str]:
        merged = {name: {**BASE.get(name, {}), **tables.get(name, {})} for name in {*BASE, *tables}}
        merged["run"]["folder"], merged["demo"]["cache"] = str(tmp_path), str(cache)
        rows = []
        for section, values in merged.items():
            rows += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        file = tmp_path / "run.toml"
        file.write_text("\n".join(rows) + "\n")
        code = main(["train", str(file), *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(tmp_path: Path, run: str = "run") -> list[str]:
    """Everything in the folder of checkpoints."""
    return sorted(path.name for path in (tmp_path / run / "checkpoints").glob("*"))


# --- all filtered -----------------------------------------------------------------------------------------


def test_a_run_whose_groups_are_all_filtered_tells_so_and_ends_by_itself(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is the bare truth, so ``exact`` calls all of them wrong."""
    monkeypatch.setattr(waiting, "REPORT_EVERY_S", 0.1)
    schedule = {"filter": True, "max_filtered_batches": 20}
    code, said = start(reward={"verifier": "exact"}, schedule=schedule, workers={"step_delay_s": 0.02})
    assert code == 1, said
    assert "groups were filtered and no batch formed, as many as schedule.max_filtered_batches = 20 allows" in said
    assert "Check reward.verifier" in said
    assert "Traceback" not in said
    told = [line for line in said.splitlines() if "no batch for " in line]
    assert len(told) >= 2, said
    assert " all wrong, 0 all right, 0 kept; " in told[-1]
    waited = [line for line in lines(tmp_path / "run/metrics.jsonl") if "waiting/groups" in line]
    assert len(waited) == len(told)
    assert {line["step"] for line in waited} == {0}
    last = waited[-1]
    assert last["waiting/all_wrong"] == last["waiting/groups"] == last["groups/filtered_all_wrong"] > 0
    assert last["workers/alive"] == 1
    assert not any(name.startswith(("time/", "throughput/")) for name in last), "an interval was ended"
    assert checkpoints(tmp_path) == ["step_0"]

    # What was wrong is mended, and counting begins anew.
    code, said = start("--resume", schedule={"max_filtered_batches": 20})
    assert code == 0, said
    assert [line["step"] for line in lines(tmp_path / "run/ledger.jsonl")] == [1, 2, 3]
