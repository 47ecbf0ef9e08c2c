"""The simulator against cases computed by hand, and the promises of the schedule in virtual time."""

import random
from typing import Any

import pytest

from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.simulate.cluster import Cluster, Outcome
from dapo_async.simulate.simulate import Simulation, simulate
from dapo_async.simulate.virtual_worker import Job, Pace, VirtualWorker
from dapo_async.simulate.workload import ALL_WRONG, MIXED, GroupSpec, Workload, lognormal, replayed

B, G, LENGTH = 4, 2, 10
SAME = lognormal(LENGTH, 0.0, LENGTH, G, mixed=1.0)
HEAVY = lognormal(50, 1.0, 2000, group_size=4, mixed=0.6)


def cluster(**changes: float) -> Cluster:
    """One worker that answers B groups of constant length in one second, and a learner that trains for two."""
    return Cluster(**{"slots": B * G, "step_s": 0.1, "step_row_s": 0.0, "train_batch_s": 2.0} | changes)


def run(machines: Cluster, eta: int, workload: Workload = SAME, **schedule: object) -> Outcome:
    config = ScheduleConfig(groups_per_batch=B, max_staleness=eta, **schedule)
    return simulate(machines, config, workload, batches=40, warm_up=10, seed=1)


def fleet(**changes: float) -> Cluster:
    """Many workers with pauses and pushes, where stragglers and failures matter."""
    settings = {"workers": 6, "slots": 8, "step_s": 0.01, "step_row_s": 0.001, "train_token_s": 0.0005}
    return Cluster(**settings | {"group_s": 0.01, "push_s": 0.2, "swap_s": 0.02, "publish_s": 0.05} | changes)


def test_synchronous_training_takes_both_times() -> None:
    done = run(cluster(), eta=0)
    assert done.groups_per_s == pytest.approx(B / (1.0 + 2.0), rel=1e-9)
    assert done.learner["train"] == pytest.approx(2 / 3)
    assert done.learner["wait_generation"] == pytest.approx(1 / 3)
    assert done.workers["decode"] == pytest.approx(1 / 3)
    assert done.workers["idle"] == pytest.approx(2 / 3)
    assert done.staleness == {0: 40 * B}
    assert done.running_mean == pytest.approx(B * G)


@pytest.mark.parametrize("train_s", [0.25, 0.5, 2.0, 3.0])
def test_overlap_takes_the_longer_time(train_s: float) -> None:
    done = run(cluster(train_batch_s=train_s), eta=4)
    assert done.groups_per_s == pytest.approx(B / max(1.0, train_s), rel=1e-6)


def test_every_pause_and_push_is_paid_when_nothing_overlaps() -> None:
    """Per batch: generating, B prompts, one push and one swap, and the learner's training and publishing."""
    machines = cluster(group_s=0.03, push_s=0.4, swap_s=0.2, publish_s=0.1, verdict_s=0.5, train_token_s=0.01)
    seconds = 1.0 + B * 0.03 + 0.4 + 0.2 + 0.1 + 0.5 + 2.0 + 0.01 * B * G * LENGTH
    assert run(machines, eta=0).groups_per_s == pytest.approx(B / seconds, rel=1e-9)


def test_a_step_takes_longer_the_more_completions_run() -> None:
    done = run(cluster(step_s=0.02, step_row_s=0.01, train_batch_s=0.0), eta=0)
    assert done.groups_per_s == pytest.approx(B / (LENGTH * (0.02 + 0.01 * B * G)), rel=1e-9)


def test_learners_divide_the_training_time() -> None:
    assert run(cluster(learners=4.0), eta=0).groups_per_s == pytest.approx(B / 1.5, rel=1e-9)


def test_filtered_groups_cost_generation_only() -> None:
    half = run(cluster(train_batch_s=0.01), eta=4, workload=lognormal(LENGTH, 0.0, LENGTH, G, mixed=0.5))
    assert half.groups_per_s == pytest.approx(B * 0.5, rel=0.25)  # 400 draws of a fair coin, and B of them per second
    assert half.generated_tokens_per_s == pytest.approx(B * G * LENGTH, rel=0.02)


def test_a_seed_fixes_everything() -> None:
    runs = [run(fleet(mtbf_s=60.0, restart_s=3.0), 2, HEAVY) for _ in range(2)]
    assert runs[0] == runs[1]
    other = simulate(fleet(), ScheduleConfig(groups_per_batch=B, max_staleness=2), HEAVY, batches=40, seed=2)
    assert other.groups_per_s != runs[0].groups_per_s


@pytest.mark.parametrize("straggler", ["wait", "late", "expire"])
@pytest.mark.parametrize("eta", [0, 1, 3])
@pytest.mark.parametrize("mtbf_s", [0.0, 20.0])
def test_the_account_is_kept_whatever_happens(straggler: str, eta: int, mtbf_s: float) -> None:
    done = run(fleet(mtbf_s=mtbf_s, restart_s=3.0), eta, HEAVY, straggler=straggler)
    account = dict(done.account)
    assert account.pop("leased") == sum(account.values())
    assert account["trained"] == 50 * B
    assert sum(done.staleness.values()) == 40 * B
    assert account["in_flight"] + account["buffered"] <= (eta + 1) * B
    assert (done.reissued > 0) == (mtbf_s > 0)
    if straggler != "late":
        assert max(done.staleness) <= eta
        assert done.late == 0
    if straggler != "expire":
        assert account["expired"] == 0
    assert sum(done.learner.values()) == pytest.approx(1.0)
    assert sum(done.workers.values()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("straggler", ["wait", "late", "expire"])
@pytest.mark.parametrize(("eta", "oversample"), [(0, 3.0), (0, 1.0), (1, 2.0), (2, 1.0)])
def test_draws_that_are_spared_because_they_would_wait_change_nothing(
    eta: int, oversample: float, straggler: Any
) -> None:
    outcomes = []
    for spared in (True, False):
        machines, config = (
            fleet(mtbf_s=30.0, restart_s=1.0),
            ScheduleConfig(groups_per_batch=B, max_staleness=eta, oversample=oversample, straggler=straggler),
        )
        simulation = Simulation(machines, config, HEAVY, seed=2)
        if not spared:
            simulation._draw = simulation.schedule.draw  # type: ignore[method-assign]
        outcomes.append(simulation.run(40, warm_up=5))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].reissued > 0


def test_admission_is_never_exceeded() -> None:
    """Looked at after every event of the clock."""
    simulation = Simulation(fleet(), ScheduleConfig(groups_per_batch=B, max_staleness=1), HEAVY)
    schedule, step, most = simulation.schedule, simulation.env.step, 0

    def watched() -> None:
        nonlocal most
        step()
        most = max(most, schedule.in_flight + schedule.buffered)
        assert all(len(worker.jobs) <= 2 + 2 for worker in simulation.workers)  # slots / G + prefetch_groups
        assert all(worker.running <= 8 for worker in simulation.workers)

    simulation.env.step = watched  # type: ignore[method-assign]
    simulation.run(30)
    assert most == 2 * B


def test_one_worker_holds_what_fills_its_slots_and_what_it_prefetches() -> None:
    simulation = Simulation(fleet(workers=1), ScheduleConfig(groups_per_batch=B, max_staleness=3), HEAVY)
    issue, most = simulation.schedule.issue, 0

    def watched(*arguments: Any) -> Any:
        nonlocal most
        record = issue(*arguments)
        most = max(most, len(simulation.workers[0].jobs) + (record is not None))
        return record

    simulation.schedule.issue = watched  # type: ignore[method-assign]
    simulation.run(10)
    assert most == 2 + 2  # of the 16 leases that the bound admits


def test_waiting_keeps_the_length_and_a_cluster_without_workers_is_named() -> None:
    assert run(fleet(), 2, HEAVY).trained_generated_ratio == pytest.approx(1.0, abs=0.05)
    down = run(cluster(mtbf_s=3.0, restart_s=30.0), eta=1)
    assert down.learner["wait_workers"] > 0.3
    assert down.workers["down"] > 0.5


def test_a_worker_joins_work_at_the_end_of_a_step_and_swaps_between_steps() -> None:
    worker = VirtualWorker(0, Pace(slots=2, step_s=1.0, step_row_s=0.5, group_s=0.0, swap_s=0.25))
    worker.start(0, 0.0)
    worker.hold(Job(0, 0, GroupSpec((4,), MIXED)), 0.0)
    assert worker.next_end() == 4 * 1.5
    worker.hold(Job(1, 1, GroupSpec((2,), MIXED)), 0.1)  # needs version 1
    worker.swap(1, 2.0)  # the second step ends at 3.0
    assert worker.next_end() == pytest.approx(3.0 + 0.25 + 2 * 2.0)
    done: list[Job] = []
    worker.finish(worker.next_end(), done.append)
    assert [(job.lease, job.oldest) for job in done] == [(0, 0), (1, 1)]
    assert worker.seconds == {"decode": 7.0, "group": 0.0, "swap": 0.25, "idle": 0.0, "down": 0.0}
    assert (worker.steps, worker.rows) == (4, 6)


def test_workloads_keep_their_limits() -> None:
    rng = random.Random(0)
    workload = lognormal(100, 2.0, 500, 8, 0.5)
    asked = [workload(rng, number) for number in range(2000)]
    lengths = [length for group in asked for length in group.lengths]
    assert min(lengths) >= 1
    assert max(lengths) == 500
    assert sum(group.verdicts == MIXED for group in asked) / 2000 == pytest.approx(0.5, abs=0.05)  # 4.5 sigma
    seen = [GroupSpec((3, 5), MIXED), GroupSpec((1, 1), ALL_WRONG)]
    assert [replayed(seen)(rng, number) for number in range(6)] == [*seen, *reversed(seen), *seen]
    with pytest.raises(ValueError, match="at least one group"):
        replayed([])
