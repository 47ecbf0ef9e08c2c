"""The difference that arithmetic alone makes: by hand, apart from drift, and through ``check --parity``."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dapo_async import cli
from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.rl.mismatch import BANDS, Mismatch, band, same_weights
from tests.learner.test_update import answers, make_model, make_update
from tests.learner.test_update import settings as update_settings
from tests.whole_run.test_training import demo, settings, toml  # noqa: F401


def test_by_hand() -> None:
    mismatch = Mismatch()
    assert mismatch.results() == {}
    mismatch.add(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))  # d = 0.5, -1
    mismatch.add(torch.tensor([]), torch.tensor([]))
    mismatch.add(torch.tensor([-3.0]), torch.tensor([-3.0]))  # d = 0
    assert mismatch.num_tokens == 3
    k3 = ((math.exp(0.5) - 1.5) + (math.exp(-1.0) - 1 + 1.0)) / 3
    assert mismatch.results() == pytest.approx({"mean": 0.5, "max": 1.0, "k1": 0.5 / 3, "k3": k3})


@pytest.mark.parametrize(
    ("spans", "same"), [([(4, 7)], True), ([(3, 7)], False), ([(3, 1), (4, 6)], False), ([(5, 7)], False)]
)
def test_only_tokens_of_exactly_these_weights_count(spans: list[tuple[int, int]], same: bool) -> None:
    assert same_weights(spans, 4) is same


@pytest.mark.parametrize(
    ("model", "weights", "precision"),
    [
        ("float32", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "float16", "float16"),
    ],
)
def test_the_band_is_that_of_the_coarser_precision(model: str, weights: str, precision: str) -> None:
    table = {"model": {"path": "m", "precision": model}, "data": {"train": "t"}, "weights": {"dtype": weights}}
    assert band(build_config(table, "test")) == BANDS[precision]


def exact(model: torch.nn.Module, batch: list[RolloutGroup], shift: float) -> list[RolloutGroup]:
    """The batch with the model's own log-probs recorded, all of them off by ``shift``."""
    result = []
    for answer in batch:
        end, columns = np.cumsum(answer.lengths), []
        for i, length in enumerate(answer.lengths):
            own = answer.group.token_ids[end[i] - length : end[i]]
            ids = torch.tensor(np.concatenate([answer.prompt.ids, own]), dtype=torch.long)
            with torch.no_grad():
                logp = model(ids[None]).logits[0].log_softmax(-1)
            place = torch.arange(len(answer.prompt.ids) - 1, len(ids) - 1)
            columns.append(logp[place, ids[place + 1]].float().numpy() + np.float32(shift))
        group = msgspec.structs.replace(answer.group, logprobs=np.concatenate(columns))
        result.append(answer._replace(group=group))
    return result


def test_a_batch_reports_the_mismatch_of_its_fresh_tokens_only() -> None:
    """Groups sampled by version 0, two of them with log-probs off by 0.25."""
    update = make_update(update_settings(learner={"minibatches": 2}), model=make_model())
    batch = exact(make_model(), answers()[:2], 0.0) + exact(make_model(), answers()[2:], -0.25)
    tokens = [sum(answer.lengths) for answer in batch]
    metrics = update.train(batch, 0, lambda: None).metrics
    # The first optimizer step sees every second group; the second one's weights are no longer those of the version.
    off = tokens[2] / (tokens[0] + tokens[2])
    assert metrics["mismatch/max"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["mismatch/mean"] == pytest.approx(0.25 * off, abs=1e-5)
    assert metrics["mismatch/k1"] == pytest.approx(-0.25 * off, abs=1e-5)
    assert not any(name.startswith("mismatch/") for name in update.train(batch, 1, lambda: None).metrics)


def parity(demo: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], **tables: Any) -> tuple[int, str]:  # noqa: F811
    file = tmp_path / "config.toml"
    file.write_text(toml(msgspec.to_builtins(settings(demo, tmp_path, **tables))))
    code = cli.main(["check", str(file), "--parity"])
    return code, capsys.readouterr().out


def test_parity_of_the_embedded_engine(
    demo: Config,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, told = parity(demo, tmp_path, capsys, sampling={"temperature": 0.7})
    assert code == 0, told
    assert "workers (torch, float32) against learner (float32)" in told
    assert "at temperature 0.7" in told
    assert told.rstrip().endswith("passed")
    assert 0.0 <= float(told.partition("mean ")[2].split(",")[0]) < 1e-5
    json.loads("\n".join(line for line in told.splitlines() if not line.startswith("#")))


def test_parity_that_fails_says_so_and_fails(
    demo: Config,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 weights in the worker, measured by float32's band."""
    monkeypatch.setitem(BANDS, "bfloat16", BANDS["float32"])
    code, told = parity(demo, tmp_path, capsys, weights={"dtype": "bfloat16"})
    assert code == 1
    assert "workers (torch, bfloat16) against learner (float32)" in told
    assert "FAILED" in told
