"""Runs that do not end as planned, with real workers: each says why, saves what can be saved, and does not hang."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_async.cli import main
from dapo_async.config.settings import Config, Demo, Run
from dapo_async.coordinator import progress as waiting
from dapo_async.errors import DapoError
from dapo_async.learner import checkpoint
from dapo_async.learner.out_of_memory import is_out_of_memory
from dapo_async.learner.update import Update
from dapo_async.observe.records import JsonLines
from dapo_async.observe.run_folder import RunFolder, run_to_resume
from dapo_async.rl.mismatch import BANDS
from dapo_async.run import launch
from tests import ROOT

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
    assert 0 < last["waiting/all_wrong"] == last["waiting/groups"] <= last["groups/filtered_all_wrong"]
    assert last["workers/alive"] == 1
    assert not any(name.startswith(("time/", "throughput/")) for name in last), "an interval was ended"
    assert checkpoints(tmp_path) == ["step_0"]

    # What was wrong is mended, and counting begins anew.
    code, said = start("--resume", schedule={"max_filtered_batches": 20})
    assert code == 0, said
    assert [line["step"] for line in lines(tmp_path / "run/ledger.jsonl")] == [1, 2, 3]


# --- resumed ----------------------------------------------------------------------------------------------


def test_a_resumed_run_says_where_it_goes_on_and_what_has_changed(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = start(checkpoint={"every": 2, "keep_last": 5})
    assert code == 0, said
    assert "resuming" not in said
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints/step_3")
    code, said = start("--resume", run={"batches": 4}, optimizer={"lr": 1e-5}, reward={"boxed_fallback": True})
    assert code == 0, said
    assert f"resuming {run} at step 2 (steps logged after it, now dropped: 1)" in said
    (changed,) = (line for line in said.splitlines() if "changed since: " in line)
    assert set(changed.partition("changed since: ")[2].split(", ")) == {
        "run.batches 3 -> 4",
        "optimizer.lr 1e-06 -> 1e-05",
        "reward.boxed_fallback false -> true",
        "checkpoint.every 2 -> 20",
        "checkpoint.keep_last 5 -> 2",
    }
    assert [line["step"] for line in lines(run / "ledger.jsonl")] == [1, 2, 3, 4]

    code, said = start("--resume", run={"batches": 5}, sampling={"group_size": 4})
    assert code == 2
    assert "belongs to a run with other settings (sampling.group_size 2 -> 4); resume it with its own" in said
    assert json.loads((run / "config.json").read_text())["run"]["batches"] == 4, "refused, so nothing was written"

    metrics = (run / "metrics.jsonl").read_text()
    old = [[0, 0, 0, 0.0, 0, b""]] * 3  # as if a wider bound had let three groups wait
    with monkeypatch.context() as patch:
        patch.setattr(launch, "load_checkpoint", wide(launch.load_checkpoint, old))
        code, said = start("--resume", run={"batches": 6})
    assert code == 2
    assert "the checkpoint holds" in said
    assert "resume with the settings of the run" in said
    assert json.loads((run / "config.json").read_text())["run"]["batches"] == 4, "refused, so nothing was written"
    assert (run / "metrics.jsonl").read_text() == metrics


def wide(load: Callable[..., dict[str, Any]], groups: list[Any]) -> Callable[..., dict[str, Any]]:
    """``load_checkpoint`` of a checkpoint that holds these groups too."""

    def load_wide(*arguments: Any, **options: Any) -> dict[str, Any]:
        state = load(*arguments, **options)
        state["coordinator"]["schedule"]["buffered"] += groups
        return state

    return load_wide


def test_without_a_checkpoint_a_resumed_run_says_that_it_begins_anew(start: Any, tmp_path: Path) -> None:
    code, said = start()
    assert code == 0, said
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").unlink()
    code, said = start("--resume")
    assert code == 0, said
    assert f"{run} has no checkpoint: it begins anew (steps it has logged, now dropped: 3)" in said
    assert "config.json is not readable" in said
    assert [line["step"] for line in lines(run / "ledger.jsonl")] == [1, 2, 3]


def test_the_newest_folder_with_a_checkpoint_is_resumed_and_a_newer_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(run=Run(name="run", folder=str(tmp_path)), demo=Demo(task="sums"))
    manifest = '{"step": 3, "config_digest": "", "versions": {}, "files": {}}'
    for name in ("run", "run-2", "run-3", "run-10", "run-old"):
        (tmp_path / name / "checkpoints/step_3").mkdir(parents=True)
    assert run_to_resume(config) == (tmp_path / "run-10", None)
    assert not caplog.records
    (tmp_path / "run-10/checkpoints/step_3/manifest.json").write_text(manifest)
    assert run_to_resume(config) == (tmp_path / "run-10", tmp_path / "run-10/checkpoints/step_3")
    assert not caplog.records
    (tmp_path / "run-11").mkdir()
    assert run_to_resume(config) == (tmp_path / "run-10", tmp_path / "run-10/checkpoints/step_3")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}/run-11 has no checkpoint: {tmp_path}/run-10, which is older, is resumed; to begin run-11 anew "
        "instead, set run.name to it"
    )
    assert run_to_resume(Config(run=Run(name="run-11", folder=str(tmp_path)), demo=Demo(task="sums"))) == (
        tmp_path / "run-11",
        None,
    )


# --- out of memory, and bugs ------------------------------------------------------------------------------

GPU = torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def fail_after(monkeypatch: pytest.MonkeyPatch, num_steps: int, kind: type[BaseException], *words: str) -> None:
    """The next forward pass after so many optimizer steps fails."""
    forward = Update._logprobs

    def logprobs(self: Update, *arguments: Any, **options: Any) -> Any:
        state = self.optimizer.state_dict()["state"]
        if state and int(state[0]["step"]) == num_steps:
            raise kind(*words)  # made here: an exception that lives on keeps the whole run alive
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Update, "_logprobs", logprobs)


@pytest.mark.parametrize("error", [GPU, (RuntimeError, HOST), (MemoryError,)])
def test_out_of_memory_before_an_optimizer_step_saves_what_was_before_the_batch(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: tuple[type[BaseException], str]
) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, 1, *error)
        code, said = start(checkpoint={"every": 0})
    assert code == 1, said
    assert "Traceback" not in said
    (sentence,) = (line for line in said.splitlines() if line.startswith("dapo-async: "))
    reason = [*error[1:], "MemoryError"][0].splitlines()[0].rstrip(".")
    assert sentence == (
        f"dapo-async: training batch 2 ran out of memory ({reason}): lower learner.microbatch_tokens = 64 (it must "
        "hold the longest sequence, 40) or learner.logprob_chunk_tokens = 4096, or set model.gradient_checkpointing = "
        "true, and go on with --resume; no optimizer step of the batch had begun, so a checkpoint of step 1 is saved"
    )
    assert checkpoints(tmp_path) == ["step_1"]
    groups = json.loads((tmp_path / "run/summary.json").read_text())["groups"]
    assert groups["trained"] == 2
    code, said = start("--resume", learner={"microbatch_tokens": 40})
    assert code == 0, said
    check_trained_once(tmp_path)


@pytest.mark.parametrize("every", [0, 1])
def test_out_of_memory_between_optimizer_steps_saves_nothing(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    settings = {"learner": {"minibatches": 2}, "checkpoint": {"every": every}}
    with monkeypatch.context() as patch:
        fail_after(patch, 3, *GPU)
        code, said = start(**settings)
    assert code == 1, said
    stands = f"{tmp_path}/run/checkpoints/step_1 stands" if every else "and there is no earlier one"
    assert f"an optimizer step of the batch had begun, so no checkpoint is saved: {stands}\n" in said
    assert checkpoints(tmp_path) == ["step_1"] * every
    assert (tmp_path / "run/summary.json").exists()
    code, said = start("--resume", **settings)
    assert code == 0, said
    check_trained_once(tmp_path)


def test_trouble_after_the_last_optimizer_step_does_not_save_a_batch_that_is_not_counted(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of one batch more than the schedule knows: a resume would train it twice."""

    def fail(*_arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Update, "_metrics", fail)
        code, said = start(checkpoint={"every": 0})
    assert code == 1, said
    assert "an optimizer step of the batch had begun, so no checkpoint is saved" in said
    assert checkpoints(tmp_path) == []


def test_a_bug_keeps_its_traceback_and_the_state_before_the_batch(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, 1, ZeroDivisionError, "a bug")
        with pytest.raises(ZeroDivisionError, match="a bug"):
            start(checkpoint={"every": 0})
    assert checkpoints(tmp_path) == ["step_1"]
    assert (tmp_path / "run/summary.json").exists()
    assert start("--resume")[0] == 0
    check_trained_once(tmp_path)


def check_trained_once(tmp_path: Path) -> None:
    ledger = lines(tmp_path / "run/ledger.jsonl")
    assert [line["step"] for line in ledger] == [1, 2, 3]
    leases = [lease for line in ledger for lease in line["leases"]]
    assert len(set(leases)) == len(leases) == 6


def test_only_missing_memory_is_out_of_memory() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with ..."))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


# --- disk full --------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """From the given step on, no checkpoint finds room. Gives the attempts, by the names of their folders."""
    with monkeypatch.context() as patch:
        yield lambda step: fill_disk(patch, step)


def fill_disk(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    attempts: list[str] = []
    write = checkpoint.write_manifest

    def write_manifest(building: Path, at: int, *others: Any) -> None:
        attempts.append(building.name)
        if at >= step:
            (building / "manifest.json").write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(building, at, *others)

    patch.setattr(checkpoint, "write_manifest", write_manifest)
    return attempts


def last_words(said: str) -> str:
    (words,) = (line for line in said.splitlines() if line.startswith("dapo-async: "))
    return words.removeprefix("dapo-async: ")


def refusal(tmp_path: Path, step: int) -> str:
    folder = tmp_path / "run/checkpoints"
    return (
        f"{folder}/step_{step}: the checkpoint could not be written: [Errno 28] No space left on device; the latest "
        f"one before it, {folder}/step_{step - 1}, is intact"
    )


def test_a_full_disk_ends_the_run_with_one_sentence_and_one_attempt(start: Any, tmp_path: Path, full_disk: Any) -> None:
    attempts = full_disk(2)
    code, said = start(checkpoint={"every": 1, "keep_last": 5})
    assert code == 1, said
    assert "Traceback" not in said
    assert last_words(said) == refusal(tmp_path, 2)
    assert [name.partition(".")[0] for name in attempts] == ["step_1", "step_2"], "it tried again"
    assert checkpoints(tmp_path) == ["step_1"]
    assert (tmp_path / "run/summary.json").exists()


def test_what_ended_the_run_is_told_although_the_disk_is_full_too(
    start: Any, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(2)
    fail_after(monkeypatch, 2, *GPU)
    code, said = start(checkpoint={"every": 1}, run={"batches": 1})
    assert code == 0, said
    code, said = start("--resume", checkpoint={"every": 0})
    assert code == 1, said
    assert last_words(said).startswith("training batch 3 ran out of memory")
    assert refusal(tmp_path, 2) in said
    assert "Traceback" not in said
    assert checkpoints(tmp_path) == ["step_1"]


def test_an_interrupted_run_that_cannot_be_saved_is_trouble(
    start: Any, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked it to end must not believe that it can be resumed from there."""
    full_disk(2)
    train = Update.train

    def interrupted(self: Update, answers: Any, batch: int, tick: Any) -> Any:
        if batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, answers, batch, tick)

    monkeypatch.setattr(Update, "train", interrupted)
    code, _ = start(checkpoint={"every": 1}, run={"batches": 1})
    assert code == 0
    code, said = start("--resume", checkpoint={"every": 0})
    assert code == 1, said
    assert last_words(said) == refusal(tmp_path, 2)
    assert checkpoints(tmp_path) == ["step_1"]


def test_a_summary_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, None)
    (tmp_path / "summary.json.part").symlink_to("/dev/full")
    with pytest.raises(DapoError, match=r"summary\.json: cannot be written: No space left on device"):
        folder.write_json("summary.json", {})
    folder.close()
    assert not (tmp_path / "summary.json.part").is_symlink()


# --- one writer, and a ledger that is whole ------------------------------------------------------------------


def test_a_run_that_somebody_trains_is_not_resumed(start: Any, tmp_path: Path) -> None:
    assert start()[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said = start("--resume", run={"batches": 5})
        assert code == 2
        assert f"run is being trained by process {holder.pid} of " in said
        assert "Traceback" not in said
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    finally:
        holder.kill()
        holder.communicate(timeout=60)
    code, said = start("--resume", run={"batches": 4})
    assert code == 0, said  # the kernel let go with the process


HOLDS = """
import sys, time
from pathlib import Path
from dapo_async.observe.run_folder import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("damage", ["missing", "shorter", "a line twice", "a line gone", "no text"])
def test_a_ledger_that_does_not_tell_of_every_batch_is_not_resumed_in_silence(
    start: Any, tmp_path: Path, damage: str
) -> None:
    assert start()[0] == 0
    ledger = tmp_path / "run/ledger.jsonl"
    whole = ledger.read_bytes().splitlines(keepends=True)
    damaged = {
        "missing": None,
        "shorter": whole[:-1],
        "a line twice": [*whole, whole[-1]],
        "a line gone": [whole[0], *whole[2:]],
        "no text": [*whole[:-1], b"\xff" + whole[-1]],
    }[damage]
    ledger.unlink() if damaged is None else ledger.write_bytes(b"".join(damaged))
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, said = start("--resume", run={"batches": 4})
    assert code == 2
    assert "ledger.jsonl" in said
    assert "Traceback" not in said
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics, "refused, so nothing was written"
    ledger.write_bytes(b"".join(whole))
    assert start("--resume", run={"batches": 4})[0] == 0


def test_a_ledger_that_cannot_be_written_counts_no_batch(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses between training and counting: the batch is in no checkpoint, and is trained by the resume."""
    write = JsonLines.write

    def full(self: JsonLines, record: Any) -> None:
        if self.path.name == "ledger.jsonl" and record.step == 2:
            raise DapoError(f"{self.path}: cannot be written: No space left on device")
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", full)
        code, said = start(checkpoint={"every": 1})
    assert code == 1
    assert "ledger.jsonl: cannot be written: No space left on device" in said
    assert checkpoints(tmp_path) == ["step_1"]
    assert start("--resume")[0] == 0
    check_trained_once(tmp_path)


# --- workers and learner that disagree -----------------------------------------------------------------------


def test_a_mismatch_far_beyond_rounding_ends_the_run_before_the_second_batch(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BANDS, "float32", 1e-12)
    code, said = start()
    assert code == 1
    assert (
        "the workers' engine (torch, float32) and the learner (float32) disagree on tokens of the same weights" in said
    )
    assert "dapo-async check CONFIG --parity" in said
    assert 'learner.on_mismatch = "warn"' in said
    assert checkpoints(tmp_path) == ["step_1"]
    code, said = start("--resume", learner={"on_mismatch": "warn"})
    assert code == 0, said
    assert said.count("disagree on tokens of the same weights") == 1
    check_trained_once(tmp_path)


# --- damaged checkpoints, and others than the newest ---------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "manifest is no text": lambda step: (step / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest is cut": lambda step: (step / "manifest.json").write_bytes((step / "manifest.json").read_bytes()[:-20]),
    "manifest is gone": lambda step: (step / "manifest.json").unlink(),
    "weights": lambda step: flip(step / "model.safetensors"),
    "optimizer": lambda step: flip(step / "trainer/optimizer.safetensors"),
    "trainer": lambda step: flip(step / "trainer/trainer.msgpack"),
    "a file is gone": lambda step: (step / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_is_gone_on_from(
    start: Any, tmp_path: Path, damage: str
) -> None:
    assert start(checkpoint={"every": 1, "keep_last": 3})[0] == 0
    run = tmp_path / "run"
    DAMAGES[damage](run / "checkpoints/step_3")
    code, said = start("--resume", checkpoint={"every": 1, "keep_last": 5})
    assert code == 0, said
    assert "; step_2 is tried instead" in said
    assert f"resuming {run} at step 2" in said
    check_trained_once(tmp_path)
    assert {"step_2", "step_3", "step_3.dropped"} <= set(checkpoints(tmp_path)), "nothing that was there is removed"


def test_all_checkpoints_damaged_is_one_sentence_and_changes_nothing(start: Any, tmp_path: Path) -> None:
    assert start(checkpoint={"every": 1, "keep_last": 2})[0] == 0
    for name in checkpoints(tmp_path):
        flip(tmp_path / "run/checkpoints" / name / "model.safetensors")
    before = (tmp_path / "run/metrics.jsonl").read_bytes(), checkpoints(tmp_path)
    code, said = start("--resume")
    assert code == 2
    assert "model.safetensors is damaged" in said
    assert "Traceback" not in said
    assert ((tmp_path / "run/metrics.jsonl").read_bytes(), checkpoints(tmp_path)) == before


def test_a_run_goes_on_from_the_checkpoint_that_is_named(start: Any, tmp_path: Path) -> None:
    assert start(checkpoint={"every": 1, "keep_last": 3})[0] == 0
    code, said = start("--resume-from", "step_7")
    assert code == 2
    assert "step_7: no such checkpoint; there are: step_1, step_2, step_3" in said
    code, said = start("--resume-from", "step_1", checkpoint={"every": 1, "keep_last": 9})
    assert code == 0, said
    assert f"resuming {tmp_path / 'run'} at step 1 (steps logged after it, now dropped: 2)" in said
    assert "step_3 is of a later step than the one that is gone on from: it is kept as step_3.dropped" in said
    check_trained_once(tmp_path)
    assert checkpoints(tmp_path) == ["step_1", "step_2", "step_2.dropped", "step_3", "step_3.dropped"]
