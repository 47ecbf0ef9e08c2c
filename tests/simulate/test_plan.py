"""The plan names what limits a run. The runs are written by the simulator, so what limits them is known."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dapo_async.cli import main
from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.schedule.schedule import CAUSES
from dapo_async.simulate.cluster import Cluster
from dapo_async.simulate.plan import Plan, make_plan, text
from dapo_async.simulate.run_facts import fit_steps, read_facts, read_groups
from dapo_async.simulate.simulate import Simulation
from dapo_async.simulate.workload import ALL_WRONG, MIXED, GroupSpec, Workload, lognormal
from tests import ROOT

B, G, BATCHES = 8, 4, 60
FEW = 4000  # completions per simulation
LENGTHS = lognormal(40, 0.3, 400, G, mixed=0.8, shared=0.2)
SAME = lognormal(40, 0.0, 40, G, mixed=1.0)


def cluster(**changes: float) -> Cluster:
    settings = {"workers": 2, "slots": 16, "step_s": 0.01, "step_row_s": 0.001, "train_token_s": 0.0008}
    return Cluster(**settings | {"train_batch_s": 0.01, "swap_s": 0.001, "push_s": 0.01, "publish_s": 0.002} | changes)


def write_run(
    folder: Path, machines: Cluster, eta: int, workload: Workload = LENGTHS, verify: float = 0.0, **settings: Any
) -> float:
    """A run folder as the learner writes it; returns its groups/s. ``verify``: part of the pause per group."""
    schedule = ScheduleConfig(groups_per_batch=B, max_staleness=eta)
    simulation, groups = Simulation(machines, schedule, workload, seed=3), []
    done = simulation.run(BATCHES, warm_up=eta + 5)
    groups = [workload(simulation._rng, number) for number in range(20 * BATCHES)]
    tokens = done.tokens_per_s * done.seconds / BATCHES
    step_s, pause = done.seconds / BATCHES, done.workers["group"]
    arrived = sum(group.verdicts == MIXED for group in groups) / len(groups)
    rows: dict[str, float] = {
        "time/step": step_s,
        "time/forward_backward": machines.train_token_s / machines.learners * tokens,
        "time/other": machines.train_batch_s,
        "time/publish": machines.publish_s,
        "batch/tokens": tokens,
        "throughput/trained_groups_per_s": done.groups_per_s,
        "throughput/generated_groups_per_s": done.groups_per_s / arrived,
        "worker_time/decode": done.workers["decode"],
        "worker_time/prefill": pause * (1.0 - verify),
        "worker_time/verify": pause * verify,
        "worker_time/swap": done.workers["swap"],
        "worker_time/idle": done.workers["idle"],
        "workers/alive": machines.workers,
        **{f"time/wait_{cause}": done.learner[f"wait_{cause}"] * step_s for cause in CAUSES},
    }
    folder.mkdir()
    config = {
        "data": {"train": "x"},
        "model": {"path": "x"},
        "run": {"batches": BATCHES},
        "sampling": {"group_size": G, "max_tokens": 400},
        "schedule": {"groups_per_batch": B, "max_staleness": eta},
        "workers": {"count": machines.workers, "slots": machines.slots},
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, BATCHES + 1):
        low, high = (1, machines.slots) if step % 2 else (3, machines.slots)
        pace = [machines.step_s + machines.step_row_s * running for running in (low, high)]
        decode = {  # as many steps of the one kind as of the other
            "decode/steps": done.workers["decode"] * machines.workers * step_s / (sum(pace) / 2),
            "decode/running_mean": (low + high) / 2,
            "decode/step_s": sum(pace) / 2,
            "decode/running_seen": (low**2 + high**2) / (low + high),
            "decode/token_s": (low * pace[0] + high * pace[1]) / (low + high),
        }
        lag = {"publish/lag_s": machines.push_s + machines.swap_s + 1.5 * sum(pace) / 2}
        lines.append(json.dumps({"step": step, "wall_s": step * step_s} | rows | decode | lag))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 61, "torn')
    told = [groups[20 * i : 20 * i + 20] for i in range(BATCHES)]
    (folder / "lengths.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": step,
                    "leases": [20 * (step - 1) + i for i in range(20)],
                    "groups": [group.lengths for group in some],
                    "accepted": [group.verdicts == MIXED for group in some],
                }
            )
            + "\n"
            for step, some in enumerate(told, start=1)
        )
    )
    return done.groups_per_s


REGIMES: dict[str, tuple[Cluster, int, Workload, float]] = {
    "generation": (cluster(train_token_s=0.0001), 4, LENGTHS, 0.0),
    "training": (cluster(train_token_s=0.004), 4, LENGTHS, 0.0),
    "turns": (cluster(train_token_s=0.0008), 0, LENGTHS, 0.0),
    "push": (cluster(train_token_s=0.0001, swap_s=0.5, push_s=0.2, publish_s=0.4), 2, LENGTHS, 0.0),
    "stragglers": (
        cluster(workers=8, train_token_s=0.00001),
        1,
        lognormal(20, 1.0, 400, G, mixed=1.0, shared=0.9),
        0.0,
    ),
    "verifier": (cluster(train_token_s=0.0001, group_s=0.6), 4, LENGTHS, 0.95),
}


@pytest.mark.parametrize("limit", REGIMES)
def test_it_names_what_limits_a_run_and_predicts_its_rate(limit: str, tmp_path: Path) -> None:
    machines, eta, workload, verify = REGIMES[limit]
    measured = write_run(tmp_path / "run", machines, eta, workload, verify)
    plan = make_plan(tmp_path / "run", FEW)
    assert plan.limit == limit, plan.gains
    assert plan.measured_groups_per_s == pytest.approx(measured)
    # Other draws of the same lengths, 60 batches of 8 groups: the heavy tail moves the rate by several per cent.
    assert plan.predicted_groups_per_s == pytest.approx(measured, rel=0.12 if limit == "stragglers" else 0.06)
    told = text(plan)
    assert plan.sentence in told
    assert f"max_staleness is {eta}" in told


def test_it_fits_the_machines(tmp_path: Path) -> None:
    machines = cluster(group_s=0.02)
    write_run(tmp_path / "run", machines, 2)
    found = read_facts(tmp_path / "run").cluster
    for name in ("step_s", "step_row_s", "train_token_s", "train_batch_s", "publish_s"):
        assert getattr(found, name) == pytest.approx(getattr(machines, name), rel=1e-6), name
    assert (found.workers, found.slots) == (2, 16)
    assert found.push_s == pytest.approx(0.01, rel=0.05)  # what the swap takes is taken off
    # Per group that arrived: the share of mixed groups among those written differs from that among those simulated.
    assert found.group_s == pytest.approx(0.02, rel=0.1)
    assert found.swap_s == pytest.approx(0.001, rel=0.1)


def test_groups_are_replayed_in_the_order_of_their_leases_whatever_the_order_they_came_in(tmp_path: Path) -> None:
    write_run(tmp_path / "run", cluster(), 1)
    lines = [{"step": step, "leases": [], "groups": [], "accepted": []} for step in range(1, BATCHES + 1)]
    for lease, line in enumerate(reversed(lines)):
        line |= {"leases": [2 * lease + 1, 2 * lease], "groups": [[2], [lease + 1]], "accepted": [False, True]}
    (tmp_path / "run" / "lengths.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [
        group for lease in range(BATCHES) for group in (GroupSpec((lease + 1,), MIXED), GroupSpec((2,), ALL_WRONG))
    ]
    assert list(read_groups(tmp_path / "run").values()) == expected
    facts = read_facts(tmp_path / "run")
    assert facts.groups == expected[: 2 * facts.batches]  # of the steady batches, which come last


def test_steps_that_are_all_alike_give_their_time_and_no_slope() -> None:
    line = {"decode/steps": 7, "decode/running_mean": 8.0, "decode/step_s": 0.4}
    assert fit_steps([line | {"decode/running_seen": 8.0, "decode/token_s": 0.4}]) == pytest.approx((0.4, 0.0))
    falling = {"decode/running_seen": 9.0, "decode/token_s": 0.3}  # full steps were faster: noise, not a slope
    assert fit_steps([line | falling]) == pytest.approx((0.4, 0.0))


def test_a_larger_bound_is_asked_for_where_it_pays_and_more_machines_are_worth_what_they_bring(tmp_path: Path) -> None:
    write_run(tmp_path / "run", cluster(train_token_s=0.0012), 0)
    plan = make_plan(tmp_path / "run", FEW)
    assert plan.eta_needed >= 1
    assert plan.by_eta[0] < 0.8 * plan.by_eta[16]
    rates = {(row["workers"], row["learners"]): row["groups_per_s"] for row in plan.by_machines}
    assert rates[2, 1.0] == pytest.approx(plan.predicted_groups_per_s)
    assert rates[2, 1.0] < rates[4, 2.0] < rates[8, 4.0]


def test_only_bounds_that_the_pushes_allow_are_tried(tmp_path: Path) -> None:
    write_run(tmp_path / "run", cluster(push_every=3), 2, SAME, weights={"push_every": 3})
    plan = make_plan(tmp_path / "run", FEW)
    assert min(plan.by_eta) == 2


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", cluster(), 1)
    assert main(["plan", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {*told} == {*Plan.__struct_fields__}
    assert told["eta"] == 1
    assert main(["plan", str(tmp_path / "run")]) == 0
    assert "limit: " in capsys.readouterr().out


def test_batches_beside_an_evaluation_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, cluster(), 2, evaluation={"every": 20})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        if 20 < line["step"] <= 23:
            line["throughput/trained_groups_per_s"] = 1e6  # must not be looked at
        if line["step"] in (23, 43):
            line["heldout/accuracy"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_facts(folder)
    assert facts.batches == BATCHES - 6 - 3 - 3  # the warm-up, and twice an evaluation
    assert facts.groups_per_s < 1e3


@pytest.mark.parametrize("command", [["plan", "RUN"], ["bench", "simulate", "--help"], ["bench", "scale", "--help"]])
def test_without_simpy_the_commands_say_what_to_install(command: list[str], tmp_path: Path) -> None:
    told = without_simpy(tmp_path, "-m", "dapo_async.cli", *command)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == (
        "dapo-async: simulating a run needs the simpy package: "
        'install it, for example with pip install "dapo-async[plan]"\n'
    )


def test_what_a_run_was_is_read_without_simpy(tmp_path: Path) -> None:
    code = "from dapo_async.simulate import cluster, run_facts, virtual_worker, workload"
    assert without_simpy(tmp_path, "-c", code).returncode == 0


def without_simpy(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python, as if simpy were not installed."""
    (folder / "simpy.py").write_text("raise ModuleNotFoundError(name='simpy')\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def _of_an_earlier_version(folder: Path) -> None:
    path = folder / "lengths.jsonl"
    path.write_text(path.read_text().replace('"leases"', '"other"'))


def _cut_short(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:6]))


def _of_vllm(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [{name: value for name, value in line.items() if not name.startswith("decode/")} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def _drained(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"workers": {"in_flight": False}}))


REFUSALS: dict[str, tuple[Any, str]] = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), "not a run folder"),
    "no metrics": (lambda folder: (folder / "metrics.jsonl").unlink(), "cannot be read"),
    "no lengths": (lambda folder: (folder / "lengths.jsonl").unlink(), "cannot be read"),
    "no groups": (lambda folder: (folder / "lengths.jsonl").write_text(""), "no group that passed"),
    "no leases": (_of_an_earlier_version, "tells no leases"),
    "short": (_cut_short, "too short for a plan: 6 batches"),
    "no steps": (_of_vllm, "engine torch"),
    "broken": (lambda folder: (folder / "metrics.jsonl").write_text("{nonsense\n"), "not JSON"),
    "no text": (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "is no text"),
    "no objects": (lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"), "no JSON object"),
    "drained": (_drained, "in_flight = false is not modelled"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{nonsense"), "not JSON"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_carry_a_plan_is_refused_in_a_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = REFUSALS[what]
    write_run(tmp_path / "run", cluster(), 1, SAME)
    damage(tmp_path / "run")
    assert main(["plan", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
