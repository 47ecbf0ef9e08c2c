"""A checkpoint is complete or ignored, and a resumed run is the uninterrupted one bit for bit."""

import errno
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dapo_async.errors import CheckpointError, SaveError
from dapo_async.learner.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dapo_async.observe import checkpoint_folder
from tests import ROOT

VOCABULARY = {text: number for number, text in enumerate("0123456789+-=;#")}
STATE = {"version": 3, "groups": [{"lease": 7, "tokens": b"\x00\xff"}], "big": 2**62, "ratio": 0.1, "none": None}


def make_model(hidden_size: int = 16, tied: bool = True, layers: int = 1) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=14,
        pad_token_id=14,
    )
    return Qwen3ForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=VOCABULARY, merges=[])), eos_token="#")


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))


def train(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Each step draws from all three generators."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(len(VOCABULARY), (4, 6))
        loss = model(input_ids=ids, labels=ids).loss * (1 + random.random() + np.random.normal())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def save(folder: Path, step: int, **changes: Any) -> Path:
    model = changes.pop("model", None) or make_model()
    optimizer = changes.pop("optimizer", None) or make_optimizer(model)
    arguments = {"tokenizer": make_tokenizer(), "state": STATE, **changes}
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, **arguments)


def load(path: Path, model: Qwen3ForCausalLM | None = None, **more: Any) -> dict[str, Any]:
    model = model or make_model()
    return load_checkpoint(path, model=model, optimizer=make_optimizer(model), **more)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_tensors(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("tied", [True, False])
def test_resuming_continues_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model = make_model(tied=tied)
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.1 / 3
    random.gauss()  # leaves a cached second sample, as NumPy's generator holds one after an odd number of draws
    assert random.getstate()[2] is not None
    assert np.random.get_state()[3] == 1  # type: ignore[index]
    path = save(tmp_path, 3, model=model, optimizer=optimizer)
    draws = random.gauss(), np.random.normal(), torch.rand(3).tolist()
    expected = train(model, optimizer, 3)

    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = make_model(tied=tied)
    resumed_optimizer = make_optimizer(resumed)
    head = resumed.lm_head.weight
    assert load_checkpoint(path, model=resumed, optimizer=resumed_optimizer) == STATE
    assert (random.gauss(), np.random.normal(), torch.rand(3).tolist()) == draws
    assert train(resumed, resumed_optimizer, 3) == expected
    assert_same_tensors(resumed.state_dict(), model.state_dict())
    ours, theirs = resumed_optimizer.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, entries in theirs["state"].items():
        assert_same_tensors(ours["state"][number], entries)
    assert resumed.lm_head.weight is head, "restored in place, so that others may hold the parameters"
    assert (resumed.lm_head.weight is resumed.model.embed_tokens.weight) == tied


def test_an_optimizer_that_has_not_stepped_yet_is_restored_too(tmp_path: Path) -> None:
    path = save(tmp_path, 0)
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_it_with_the_same_float32_weights(tmp_path: Path, tied: bool) -> None:
    model = make_model(tied=tied)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 + 2**-23  # needs every bit of a float32
    path = save(tmp_path, 1, model=model)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.float32
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    ids = torch.randint(len(VOCABULARY), (2, 5))
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.generation_config.temperature == 0.5
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("3+5=8#") == make_tokenizer().encode("3+5=8#")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == {"step_9", "step_10"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"


def test_the_one_just_written_is_kept_even_when_others_have_higher_steps(tmp_path: Path) -> None:
    save(tmp_path, 8, keep_last=1)
    assert save(tmp_path, 5, keep_last=1).exists()


def test_no_checkpoint_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_3").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 4, state={"which": "second"})
    assert load(path) == {"which": "second"}
    assert names(tmp_path) == {"step_4"}


# --- refusals --------------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/optimizer.safetensors", "trainer/trainer.msgpack"])
def test_a_flipped_byte_is_refused_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    flip_byte(path / name)
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"step_1: {name} is damaged"):
        load(path, model)
    assert_same_tensors(model.state_dict(), before)


def test_a_truncated_file_is_refused_and_the_checkpoint_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    weights = path / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"model.safetensors has {size - 5} bytes instead of {size}"):
        load(path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"


def test_a_missing_file_is_refused_and_the_checkpoint_ignored(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing: the checkpoint is incomplete"):
        load(path)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", [None, "", "{", '{"format": 1}', "[]"])
def test_without_a_valid_manifest_it_is_refused_and_ignored(tmp_path: Path, content: str | None) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    if content is not None:
        (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: it is incomplete|manifest\.json cannot be read"):
        load(path)
    assert latest_checkpoint(tmp_path) is None


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, this version reads format 1"):
        load(path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step_7: no such checkpoint"):
        load(tmp_path / "step_7")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fixed = {"run.seed": 0, "data.shuffle": True, "sampling.group_size": 8}
    path = save(tmp_path, 1, fixed=fixed)
    differing = r"\(data\.shuffle true -> false, sampling\.group_size 8 -> 16\); resume it with its own"
    with pytest.raises(CheckpointError, match=f"step_1: belongs to a run with other settings {differing}"):
        load(path, fixed=fixed | {"data.shuffle": False, "sampling.group_size": 16})
    assert load(path, fixed=fixed) == load(path) == STATE
    assert load(save(tmp_path, 2), fixed=fixed) == STATE, "saved without saying which settings"


def test_settings_of_a_checkpoint_that_kept_their_digest_only(tmp_path: Path) -> None:
    """As checkpoints were before they named the settings."""
    fixed = {"run.seed": 0, "data.shuffle": True}
    path = save(tmp_path, 1, fixed=fixed)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.pop("fixed") == fixed
    assert manifest["config_digest"] == hashlib.sha256(b"[0,true]").hexdigest()[:16]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert load(path, fixed=fixed) == STATE
    with pytest.raises(CheckpointError, match=r"other settings \(one of run\.seed, data\.shuffle differs\)"):
        load(path, fixed=fixed | {"run.seed": 1})


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"hidden_size": 24}, r"has shape \[15, 16\] there and \[15, 24\] here"),
        ({"layers": 2}, r"only one of the two has model\.layers\.1"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, shape: dict[str, Any], reason: str) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"belongs to another model: .*{reason}"):
        load(path, make_model(**shape))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    model = make_model()
    with pytest.raises(CheckpointError, match="its optimizer has other parameters or groups"):
        load_checkpoint(path, model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_a_disk_that_refuses_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(SaveError, match="step_1: the checkpoint could not be written"):
        save(tmp_path / "checkpoints", 1)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Both as the operating system says it, and as the tokenizers library does."""

    def full(self: Any, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(
            SaveError, match=r"step_1: .* could not be written: .*No space left.*there is no earlier one"
        ):
            save(tmp_path, 1)
    assert names(tmp_path) == set()
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(SaveError, match=r"step_2: .*the latest one before it, .*step_1, is intact") as caught:
            save(tmp_path, 2)
    assert caught.value.exit_code == 1
    assert names(tmp_path) == {"step_1"}
    assert load(tmp_path / "step_1") == STATE


def test_an_old_checkpoint_that_cannot_be_removed_does_not_make_the_new_one_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network disk keeps the file that somebody reads."""
    save(tmp_path, 1)
    remove = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path.name.startswith("step_1"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for step in (2, 3):
            assert save(tmp_path, step, keep_last=1) == tmp_path / f"step_{step}"
            assert load(tmp_path / f"step_{step}") == STATE
    assert "step_1 could not be removed" in caplog.text
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == {"step_4"}


def test_saving_because_of_an_error_is_not_blamed_for_it(tmp_path: Path) -> None:
    try:
        raise Exception("what ended the run")  # exactly the class that the tokenizers library raises
    except Exception:  # noqa: BLE001
        assert save(tmp_path, 1) == tmp_path / "step_1"


def test_a_bug_while_saving_stays_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda self, folder: [][0])
    with pytest.raises(IndexError):
        save(tmp_path, 1)
    assert names(tmp_path) == set()


# --- crashes ---------------------------------------------------------------------------------------------


def crash() -> None:
    raise KeyboardInterrupt


# Where a save may be interrupted: with some files written, before the new name, and between the two renames.
@pytest.mark.parametrize("where", ["_sync", "write_manifest", "publish", "rename"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_crash_while_saving_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, step: int
) -> None:
    """``step`` 1 saves the same step again, 2 the next; either way step 1 must survive with its contents."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        if where == "rename":
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: crash() if ".tmp-" in self.name else rename(self, to))
        elif where == "_sync":
            patch.setattr(checkpoint_folder, "_sync", lambda path: crash())
        else:
            patch.setattr(f"dapo_async.learner.checkpoint.{where}", lambda *arguments: crash())
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, step, keep_last=1, state={})
    survivor = latest_checkpoint(tmp_path)
    assert survivor is not None
    assert load(survivor) == STATE
    save(tmp_path, 3)
    assert names(tmp_path) - {"step_1.replaced"} <= {"step_1", "step_3"}


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from dapo_async.learner import checkpoint
from tests.learner.test_checkpoint import save
folder = Path(sys.argv[1])
save(folder, 1)
def hang(*arguments):
    print("writing", flush=True)
    time.sleep(600)
checkpoint.write_manifest = hang
save(folder, 2)
"""


def test_a_writer_killed_with_sigkill_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    assert names(tmp_path) == {"step_1", f"step_2.tmp-{writer.pid}"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"
    assert load(tmp_path / "step_1") == STATE
    save(tmp_path, 2)
    assert names(tmp_path) == {"step_1", "step_2"}


def test_a_half_removed_checkpoint_is_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: crash() if "removed" in path.name else None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"
    save(tmp_path, 3)
    assert names(tmp_path) == {"step_2", "step_3"}


def test_a_replaced_checkpoint_that_was_not_removed_is_second_to_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = tmp_path / "step_1.replaced"
    save(tmp_path, 1).rename(replaced)
    with monkeypatch.context() as patch:
        patch.setattr("dapo_async.learner.checkpoint.write_manifest", lambda *arguments: crash())
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == replaced, "kept as long as it is the only one of its step"
    path = save(tmp_path, 1)
    shutil.copytree(path, replaced)
    assert latest_checkpoint(tmp_path) == path
    save(tmp_path, 2, keep_last=9)
    assert names(tmp_path) == {"step_1", "step_2"}
