"""Workers on GPUs: who gets which, who is refused, and what the processes that start are told."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.errors import ConfigError
from dapo_async.run import parts
from dapo_async.run.memory_check import Machine, estimate_memory
from dapo_async.system.placement import VISIBLE, describe, place_workers, visible_to, wanted_gpus


def config_of(count: int, gpus: str = "own", tensor: int = 1, pipeline: int = 1, **settings: Any) -> Config:
    """vLLM's engine where one GPU is not enough, else torch's; ``settings``: devices of learner and workers."""
    engine = "vllm" if tensor * pipeline > 1 else "torch"
    return build_config(
        {
            "demo": {"task": "sums"},
            "model": {"device": settings.get("learner", "auto")},
            "workers": {"count": count, "gpus": gpus, "engine": engine, "device": settings.get("workers", "auto")},
            "vllm": {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline},
        },
        "test",
    )


PLACED: dict[str, tuple[Config, int, bool, list[tuple[int, ...]]]] = {
    "no GPU": (config_of(3), 0, True, []),
    "workers on the CPU": (config_of(3, workers="cpu"), 4, True, []),
    "workers elsewhere": (config_of(0), 4, True, []),
    "each its own": (config_of(3), 4, True, [(1,), (2,), (3,)]),
    "GPUs to spare": (config_of(1), 4, True, [(1,)]),
    "learner on the CPU": (config_of(2, learner="cpu"), 2, True, [(0,), (1,)]),
    "no learner": (config_of(2), 2, False, [(0,), (1,)]),
    "tensor parallel": (config_of(3, tensor=2), 8, True, [(1, 2), (3, 4), (5, 6)]),
    "tensor and pipeline parallel": (config_of(1, tensor=2, pipeline=2), 5, True, [(1, 2, 3, 4)]),
    "one GPU for all": (config_of(3, "shared"), 1, True, [(0,), (0,), (0,)]),
    "shared, the learner's last": (config_of(4, "shared"), 3, True, [(1,), (2,), (0,), (1,)]),
    "shared, tensor parallel": (config_of(3, "shared", 2), 4, True, [(1, 2), (3, 0), (1, 2)]),
    "shared, one GPU is left over": (config_of(2, "shared", 2), 3, True, [(1, 2), (1, 2)]),
}


@pytest.mark.parametrize("case", PLACED)
def test_where_workers_compute(case: str) -> None:
    config, num_gpus, learner, places = PLACED[case]
    assert place_workers(config, num_gpus, learner=learner) == places


REFUSED = {
    "one GPU": (
        config_of(1),
        1,
        "a worker and the learner would need 2 GPUs here, and there are 1: lower workers.co",
    ),
    "a worker too many": (config_of(4), 4, "4 workers and the learner would need 5 GPUs here, and there are 4"),
    "tensor parallel": (
        config_of(2, tensor=2),
        4,
        "would need 5 GPUs here, and there are 4: lower workers.count or vllm.tensor_parallel_size x "
        'pipeline_parallel_size, or set workers.gpus = "shared"',
    ),
    "shared is not enough": (
        config_of(1, "shared", 4),
        2,
        'workers.gpus = "shared": a worker would need 4 GPUs here, and there are 2: lower vllm.tensor_parallel_size',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_too_few_gpus_are_refused(case: str) -> None:
    config, num_gpus, told = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        place_workers(config, num_gpus, learner=True)
    assert told in str(refused.value)
    # Sharing is advised only where it would help.
    assert ("set workers.gpus" in str(refused.value)) == (config.workers.gpus == "own")


@pytest.mark.parametrize("case", [case for case in PLACED if PLACED[case][3] and PLACED[case][2]])
def test_a_machine_with_the_wanted_gpus_is_enough(case: str) -> None:
    config = PLACED[case][0]
    assert len(place_workers(config, wanted_gpus(config), learner=True)) == config.workers.count


@pytest.mark.parametrize(
    ("named", "first", "second"), [(None, "1,2", "3,0"), ("", "1,2", "3,0"), ("7, 5,GPU-a,2", "5,GPU-a", "2,7")]
)
def test_the_users_own_choice_of_gpus_is_kept(named: str | None, first: str, second: str) -> None:
    env = {} if named is None else {VISIBLE: named}
    assert visible_to([(1, 2), (3, 0)], env) == [{VISIBLE: first}, {VISIBLE: second}]


def test_the_placement_is_told() -> None:
    machine = Machine([80 << 30] * 4, 0)
    lines = estimate_memory(config_of(2), machine).lines
    assert "# placement: learner on GPU 0; w0 on GPU 1; w1 on GPU 2" in lines
    assert sum(line.startswith("# memory of worker on GPU ") for line in lines) == 2
    assert not any("placement" in line for line in estimate_memory(config_of(2), Machine([], 0)).lines)
    assert describe([(0, 1)], config_of(1, tensor=2, learner="cpu")) == "# placement: w0 on GPUs 0, 1"


# --- the processes ----------------------------------------------------------------------------------------

# Stands in for a worker: says what environment it found, and the first one crashes once.
TELLS = f"""
import json, os, sys
print(json.dumps({{name: os.environ.get(name) for name in ({VISIBLE!r}, "OMP_NUM_THREADS", "OURS")}}), flush=True)
sys.exit(1 if sys.argv[1] == "w0" else 0)
"""


def told_by(supervisor: Supervisor, logs: Path, names: list[str]) -> dict[str, dict[str, str | None]]:
    from tests.coordinator.test_supervisor import wait_until

    def all_told() -> bool:
        supervisor.poll()
        return all((logs / f"{name}.log").exists() and "}" in (logs / f"{name}.log").read_text() for name in names)

    wait_until(all_told, "what the processes found")
    return {name: json.loads((logs / f"{name}.log").read_text().splitlines()[0]) for name in names}


def test_workers_that_are_started_see_their_gpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real start of a run's workers on a machine that says it has four GPUs; a restarted one keeps its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv(VISIBLE, "3,2,1,0")
    monkeypatch.setenv("OURS", "yes")

    class Told(Supervisor):
        def __init__(self, names: Any, command: Any, logs: Path, **settings: Any) -> None:
            super().__init__(names, lambda name: [sys.executable, "-c", TELLS, name], logs, **settings)

    monkeypatch.setattr(parts, "Supervisor", Told)
    config = config_of(2)
    config = msgspec.structs.replace(config, workers=msgspec.structs.replace(config.workers, threads=3))
    coordinator = SimpleNamespace(address="tcp://127.0.0.1:1", reserve=lambda names: {"PROOF": "of " + " ".join(names)})
    supervisor = parts.start_workers(config, coordinator, tmp_path)  # type: ignore[arg-type]
    try:
        found = told_by(supervisor, tmp_path, ["w0", "w1", "w0.1"])
    finally:
        supervisor.stop()
    assert [found[name][VISIBLE] for name in ("w0", "w1", "w0.1")] == ["2", "1", "2"]
    assert {(env["OMP_NUM_THREADS"], env["OURS"]) for env in found.values()} == {("3", "yes")}
    assert os.environ[VISIBLE] == "3,2,1,0"


def test_without_gpus_workers_inherit_what_the_user_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    command = [sys.executable, "-c", TELLS]
    with Supervisor(["w1"], lambda name: [*command, name], tmp_path) as supervisor:
        found = told_by(supervisor, tmp_path, ["w1"])
    assert found["w1"][VISIBLE] == ""
