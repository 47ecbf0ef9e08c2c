"""A whole run whose copies are slow: what workers get is the model as it was published, never a step half taken."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_async.config.settings import Config
from dapo_async.run.launch import train
from dapo_async.weight_sync import publisher as publisher_module
from dapo_async.weight_sync.encoding import encode_weights
from dapo_async.weight_sync.publisher import Publisher
from tests.whole_run.test_training import demo, lines, settings  # noqa: F401  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shm", "delta"])
def test_no_step_changes_weights_that_are_being_copied(
    demo: Config,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The next batch is trained while the copy is held up, but its first optimizer step waits."""
    given: dict[int, str] = {}
    copied: dict[int, str] = {}
    publish, fill = Publisher.publish, publisher_module.fill

    def publish_and_note(self: Publisher, version: int, tensors: Any, dtype: torch.dtype | None = None) -> None:
        given[version] = encode_weights(version, {name: t.clone() for name, t in tensors.items()}, "")[0].digest
        publish(self, version, tensors, dtype)

    def slow_fill(*arguments: Any) -> Any:
        time.sleep(0.3)  # a batch of this model takes less
        snapshot = fill(*arguments)
        copied[snapshot.version] = snapshot.digest
        return snapshot

    monkeypatch.setattr(Publisher, "publish", publish_and_note)
    monkeypatch.setattr(publisher_module, "fill", slow_fill)
    tables = {"run": {"batches": 8}, "schedule": {"max_staleness": 4}, "weights": {"way": way}}
    finished = train(settings(demo, tmp_path, **{"evaluation": {"max_prompts": 4}} | tables))
    assert copied == {version: given[version] for version in copied}
    assert set(copied) >= {0, 1, 8}
    last = [line for line in lines(finished.folder / "metrics.jsonl") if "publish/blocked_s" in line][-1]
    assert last["publish/blocked_s"] > 0.1
    assert last["publish/pushes_shm" if way == "shm" else "publish/pushes_full"] > 0
    assert last["publish/refused"] == 0
