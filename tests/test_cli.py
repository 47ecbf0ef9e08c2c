"""The command line as a user meets it: what it refuses, in one sentence with exit code 2, and what it prints."""

import importlib.metadata
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dapo_async.cli import main
from dapo_async.config.toml import build_config
from dapo_async.demo.demo import build_demo
from dapo_async.observe.checkpoint_folder import write_manifest
from dapo_async.run import memory_check
from dapo_async.transport.addresses import from_outside
from tests import ROOT

MINIMAL = """
[model]
path = "{folder}/model"
[data]
train = "{folder}/train.jsonl"
heldout = "{folder}/heldout.jsonl"
max_prompt_tokens = 16
[sampling]
max_tokens = 24
group_size = 4
[schedule]
groups_per_batch = 4
[reward]
verifier = "sums"
[workers]
slots = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and an untrained model, as files."""
    folder = tmp_path_factory.mktemp("demo")
    small: dict[str, Any] = {"train_prompts": 40, "heldout_prompts": 6, "hidden_size": 32, "layers": 1, "threads": 1}
    table = {"demo": {"task": "sums", "warm_start_iterations": 1, "warm_start_batch": 4, **small}}
    build_demo(folder, build_config(table, "test").demo, 0, lambda *_: None)
    (folder / "run.toml").write_text(MINIMAL.format(folder=folder))
    return folder


def check(folder: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, str, str]:
    arguments = ["check", str(folder / "run.toml")]
    for setting in settings:
        arguments += ["--set", setting]
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_check_prints_the_resolved_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(folder, capsys, "schedule.max_staleness=3")
    assert code == 0
    notes = [line for line in out.splitlines() if line.startswith("# ")]
    assert "40 kept" in notes[0]
    assert "6 prompts" in notes[0]
    config = json.loads("\n".join(out.splitlines()[len(notes) :]))
    assert config["schedule"]["max_staleness"] == 3
    assert config["sampling"]["stop_token_ids"] == [1]  # resolved from the model's generation config


def test_check_estimates_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = check(folder, capsys)
    memory = [line for line in out.splitlines() if line.startswith("# memory")]
    assert [line.split(" of ")[1].split(":")[0] for line in memory[1:]] == [
        "learner on this machine",
        "worker on this machine",
        "this machine",
    ]


def test_the_estimate_needs_nothing_but_the_models_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    arguments = ["check", str(folder / "run.toml"), "--set", f"model.path={tmp_path}", "--set", "data.train=nowhere"]
    assert main([*arguments, "--memory"]) == 0
    assert capsys.readouterr().out.startswith("# memory, estimated: a model of ")
    assert main([*arguments, "--gpu-gib", "80"]) == 0
    assert "80.0 GiB there" in capsys.readouterr().out
    assert main([*arguments, "--gpu-gib", "0.5", "--set", "workers.gpus=shared"]) == 2
    out, err = capsys.readouterr()
    assert "# memory of GPU 0: " in out  # the numbers come all the same
    assert err.startswith("dapo-async: GPU 0 has 512 MiB, but this run needs about 1.2 GiB there: ")
    assert err.count("\n") == 1


def test_a_model_too_large_for_the_machine_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "this_machine", lambda: memory_check.Machine([], 1 << 29))
    code, out, err = check(folder, capsys)
    assert code == 2
    assert err.startswith("dapo-async: this machine has 512 MiB, but this run needs about 1006 MiB there: ")
    assert "{" not in out


@pytest.mark.parametrize("command", ["train", "learn"])
def test_a_run_that_cannot_fit_does_not_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(memory_check, "this_machine", lambda: memory_check.Machine([], 1 << 28))
    assert main([command, str(folder / "run.toml"), "--set", f"run.folder={tmp_path}/runs"]) == 2
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("dapo-async: ")]
    assert len(told) == 1
    assert told[0].startswith("dapo-async: this machine has 256 MiB, but this run needs about ")
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_a_demo_that_cannot_fit_is_not_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "this_machine", lambda: memory_check.Machine([], 1 << 29))
    settings = [f"demo.cache={tmp_path}/cache", f"run.folder={tmp_path}/runs"]
    quickstart = str(ROOT / "configs" / "quickstart.toml")
    assert main(["train", quickstart, "--set", settings[0], "--set", settings[1]]) == 2
    assert "this machine has 512 MiB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "-1", "nan", "many"])
def test_a_gpu_has_a_size(folder: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(folder / "run.toml"), "--gpu-gib", size])
    assert "is not a size in GiB" in capsys.readouterr().err


REFUSED = {
    "batch larger than the data": ("schedule.groups_per_batch=41", "holds only 40 prompts"),
    "truncated sampling": ("sampling.top_p=0.9", "top_p must be 1.0"),
    "budget below the longest sequence": ("learner.microbatch_tokens=39", "must hold the longest sequence"),
    "missing data": ("data.train=/nowhere.jsonl", "/nowhere.jsonl"),
    "missing model": ("model.path=/nowhere/model", "/nowhere/model"),
    "unknown setting": ("schedule.max_stalenes=1", "there is no such setting"),
    "wrong type": ("schedule.max_staleness=few", "schedule.max_staleness = 'few'"),
    "not a word of the list": ("schedule.straggler=ignore", 'must be "wait" or "late" or "expire"'),
    "stop token outside the vocabulary": ("sampling.stop_token_ids=[999]", "knows only"),
    "longer than the model": ("sampling.max_tokens=2000", "was made for: 1024 positions"),
    "unknown verifier": ("reward.verifier=nonsense", "nonsense"),
    "verifier that cannot be imported": ("reward.verifier=no_such_module:judge", "no_such_module"),
    "open to the network": ("network.control=tcp://0.0.0.0:7777", "not encrypted"),
    "not an override": ("max_staleness", "must look like table.key=value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    setting, expected = REFUSED[case]
    settings = [setting]
    if case == "longer than the model":
        settings.append("learner.microbatch_tokens=100000")
    code, out, err = check(folder, capsys, *settings)
    assert code == 2
    assert expected in err
    assert err.startswith("dapo-async: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("name", ["control", "weights"])
def test_a_port_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = check(folder, capsys, f"network.{name}={address}")
    assert code == 2
    assert err.startswith(f'dapo-async: network.{name}: cannot listen on "{address}": another process listens there; ')
    assert err.endswith(" (a run that is still going on?)\n")
    assert err.count("\n") == 1


def test_an_address_of_another_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    addresses = ("network.control=tcp://192.0.2.1:5555", "network.weights=tcp://192.0.2.1:5556")
    code, _, err = check(folder, capsys, *addresses, "network.insecure=true")
    assert code == 2
    assert err.endswith(
        'dapo-async: network.control: cannot listen on "tcp://192.0.2.1:5555": this machine has no such address\n'
    )


@pytest.mark.parametrize("settings", [None, '{"model_type": "abacus"}'])
def test_a_tokenizer_without_a_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str | None
) -> None:
    copied = [path for path in (folder / "model").iterdir() if path.name.startswith(("tokenizer", "special_tokens"))]
    for path in copied:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if settings is not None:
        (tmp_path / "config.json").write_text(settings)
    code, out, err = check(folder, capsys, f"model.path={tmp_path}")
    assert code == 2
    assert err.startswith(f'dapo-async: model.path = "{tmp_path}" ')
    assert ("it has no config.json" if settings is None else "holds no model that transformers can load") in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("tcp://0.0.0.0:5555", "tcp://box:5555"),
        ("tcp://*:5555", "tcp://box:5555"),
        ("tcp://[::]:5555", "tcp://box:5555"),
        ("tcp://10.0.0.0:5555", "tcp://10.0.0.0:5555"),
        ("tcp://[::1]:5555", "tcp://[::1]:5555"),
    ],
)
def test_workers_are_told_a_host_that_they_can_reach(monkeypatch: pytest.MonkeyPatch, address: str, named: str) -> None:
    monkeypatch.setattr("platform.node", lambda: "box")
    assert from_outside(address) == named


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nowhere.toml"]) == 2
    assert "nowhere.toml: no such configuration file" in capsys.readouterr().err


def test_nothing_to_resume(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", str(folder / "run.toml"), "--resume", "--set", f"run.folder={tmp_path}"])
    assert code == 2
    assert "no such run to resume" in capsys.readouterr().err


def test_eval_of_a_folder_that_is_no_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert "no model here" in capsys.readouterr().err
    assert main(["eval", str(folder / "model")]) == 2
    assert "say --config FILE" in capsys.readouterr().err


def test_eval_of_a_run_folder_names_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (f"dapo-async: {tmp_path}: is a run folder; it has no complete checkpoint yet\n")
    for step in (9, 10):
        checkpoint = tmp_path / "checkpoints" / f"step_{step}"
        checkpoint.mkdir(parents=True)
        write_manifest(checkpoint, step, "", {})
    (tmp_path / "checkpoints" / "step_11").mkdir()  # not complete
    assert main(["eval", str(tmp_path), "--config", "nowhere.toml"]) == 2
    assert capsys.readouterr().err == (
        f"dapo-async: {tmp_path}: is a run folder; name its newest checkpoint: {tmp_path}/checkpoints/step_10\n"
    )


def evaluation(folder: Path, *more: str) -> list[str]:
    return ["eval", str(folder / "model"), "--config", str(folder / "run.toml"), *more]


def test_eval_samples_with_workers_and_writes_its_result(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert main(evaluation(folder, "--k", "3", "--top-p", "0.7", "--out", str(out))) == 0
    printed, table = capsys.readouterr()
    result = json.loads(out.read_text())
    assert result == json.loads(printed)
    assert (result["prompts"], result["k"], result["temperature"], result["top_p"]) == (6, 3, 1.0, 0.7)
    scores = result["scores"]
    assert set(scores) == {"avg@3", "pass@1", "pass@2", "pass@3", "maj@3", "length_mean", "truncated_share"}
    assert 0.0 <= scores["pass@1"]["value"] <= scores["pass@2"]["value"] <= scores["pass@3"]["value"] <= 1.0
    assert 1 <= scores["length_mean"]["low"] <= scores["length_mean"]["value"] <= scores["length_mean"]["high"] <= 24
    assert "6 prompts, k = 3, T 1, top_p 0.7" in table
    assert all(name in table for name in scores)


def test_vllm_that_is_not_there_is_told_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, _, told = check(folder, capsys, "workers.engine=vllm")
    assert code == 2
    assert 'workers.engine = "vllm": vLLM is not installed; install dapo-async[vllm]' in told


def test_output_that_nobody_reads_any_more_is_no_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "dapo_async.cli", "check", str(folder / "run.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, told = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in told


def test_eval_into_a_folder_is_refused_before_anything_is_sampled(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folder), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
