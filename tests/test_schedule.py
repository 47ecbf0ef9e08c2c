"""The schedule under chaos, with every promise checked after each step, and its corner cases by hand."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dapo_async import config
from dapo_async.schedule import Batch, Schedule, Wait

MIXED, RIGHT, WRONG = [True, False], [True, True], [False, False]


def make(num_prompts: int | None = None, **settings: Any) -> Schedule:
    return Schedule(config.Schedule(**{"groups_per_batch": 2, "max_staleness": 1, **settings}), num_prompts)


def issue(schedule: Schedule, count: int, version: int | None = None, worker: str = "w") -> list[int]:
    """Lease ``count`` prompts to a worker that serves ``version``."""
    records = [schedule.issue(worker, schedule.version if version is None else version, 0.0) for _ in range(count)]
    return [record.number for record in records if record is not None]


def complete(schedule: Schedule, *numbers: int, oldest: int = 0, correct: list[bool] = MIXED) -> list[str]:
    return [schedule.complete(number, oldest, 10, correct, f"group {number}") for number in numbers]


def draw(schedule: Schedule) -> list[int]:
    drawn = schedule.draw()
    assert isinstance(drawn, Batch), drawn
    return [entry.key for entry in drawn.entries]


def train(schedule: Schedule) -> None:
    """Train the drawn batch and publish the result."""
    schedule.published = schedule.batch_trained()


# --- admission -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("staleness", "places"), [(0, 2), (1, 4), (3, 8)])
def test_admission_is_eta_plus_one_batches(staleness: int, places: int) -> None:
    schedule = make(max_staleness=staleness)
    assert issue(schedule, 100) == list(range(places))
    assert schedule.admission() == "full"


def test_synchronous_leases_nothing_while_training() -> None:
    """η = 0: groups sampled from old weights could only be trained one version late."""
    schedule = make(max_staleness=0)
    complete(schedule, *issue(schedule, 2))
    assert draw(schedule) == [0, 1]
    assert issue(schedule, 1) == []
    schedule.batch_trained()
    assert schedule.admission() == "publish"  # and not before the new weights can be had
    schedule.published = 1
    record = schedule.issue("w", 0, 0.0)
    assert record is not None
    assert record.oldest == 1


def test_filtered_groups_give_their_place_to_the_next_prompt() -> None:
    schedule = make(max_staleness=0)
    first, second = issue(schedule, 2)
    assert complete(schedule, first, correct=RIGHT) == ["filtered_all_right"]
    assert complete(schedule, second, correct=WRONG) == ["filtered_all_wrong"]
    records = [schedule.issue("w", 0, 0.0) for _ in range(3)]
    assert [record.position for record in records if record] == [2, 3]
    assert schedule.filtered == 2


def test_without_filter_everything_is_trained() -> None:
    schedule = make(max_staleness=0, filter=False)
    assert complete(schedule, *issue(schedule, 2), correct=WRONG) == ["accepted", "accepted"]
    assert draw(schedule) == [0, 1]


def test_leases_queue_behind_each_other() -> None:
    """At version 3 and η = 2, the k-th outstanding group is trained at version 3 + k // B at the latest."""
    schedule = make(max_staleness=2)
    schedule.version = schedule.published = 3
    records = [schedule.issue("w", -1, 0.0) for _ in range(6)]
    assert [record.oldest for record in records if record] == [1, 1, 2, 2, 3, 3]


def test_end_of_the_prompts() -> None:
    schedule = make(num_prompts=3)
    numbers = issue(schedule, 9)
    assert len(numbers) == 3
    assert schedule.admission() == "exhausted"
    complete(schedule, *numbers)
    assert draw(schedule) == [0, 1]
    train(schedule)
    assert schedule.draw() == Wait("exhausted", [])


# --- deduplication, lost workers --------------------------------------------------------------------------


def test_every_lease_is_settled_once() -> None:
    schedule = make()
    (number,) = issue(schedule, 1)
    assert complete(schedule, number, number) == ["accepted", "duplicate"]
    assert complete(schedule, 77) == ["unknown_lease"]
    assert complete(schedule, -1) == ["unknown_lease"]
    assert schedule.buffered == 1


def test_a_lost_worker_gives_its_leases_to_the_next_under_their_own_numbers() -> None:
    schedule = make()
    issue(schedule, 1, worker="a")
    issue(schedule, 1, worker="b")
    assert schedule.lose_worker("a") == [0]
    record = schedule.issue("b", 0, 5.0)
    assert record is not None
    assert (record.number, record.position, record.worker) == (0, 0, "b")
    assert schedule.events["reissued"] == 1
    assert complete(schedule, 0) == ["accepted"]  # whoever answers first
    assert schedule.lose_worker("b") == [1]


def test_a_worker_that_comes_back_keeps_what_nobody_else_has() -> None:
    schedule = make()
    issue(schedule, 2, worker="a")
    schedule.lose_worker("a")
    issue(schedule, 1, worker="b")
    assert schedule.reclaim("a", [0, 1, 9]) == [1]
    assert schedule.release("b", [0, 1]) == [0]


def test_a_group_older_than_its_lease_allows_is_refused_and_leased_again() -> None:
    schedule = make(max_staleness=0)
    schedule.version = schedule.published = 4
    (number,) = issue(schedule, 1)
    assert complete(schedule, number, oldest=3) == ["too_old"]
    record = schedule.issue("w", 4, 0.0)
    assert record is not None
    assert record.number == number


# --- batches ---------------------------------------------------------------------------------------------


def test_oldest_complete_leases_first_in_lease_order() -> None:
    schedule = make(max_staleness=2)
    issue(schedule, 6)
    complete(schedule, 5, 2, 4)
    assert draw(schedule) == [2, 4]


def with_a_straggler(**settings: Any) -> Schedule:
    """η = 1, B = 2: version 1 is about to be trained while lease 0, sampled with version 0, still runs."""
    schedule = make(max_staleness=1, **settings)
    issue(schedule, 4)
    complete(schedule, 1, 2)
    assert draw(schedule) == [1, 2]
    train(schedule)
    issue(schedule, 2, version=1)
    complete(schedule, 3, oldest=0)
    complete(schedule, 4, oldest=1)
    return schedule


def test_wait_holds_the_batch_back_until_the_straggler_is_in() -> None:
    schedule = with_a_straggler(straggler="wait")
    assert schedule.draw() == Wait("straggler", [0])
    complete(schedule, 0)
    assert draw(schedule) == [0, 3]


def test_late_trains_it_past_the_bound_and_counts() -> None:
    schedule = with_a_straggler(straggler="late")
    assert draw(schedule) == [3, 4]
    train(schedule)
    complete(schedule, 0)
    complete(schedule, 5, oldest=1)
    drawn = schedule.draw()
    assert isinstance(drawn, Batch)
    assert ([entry.key for entry in drawn.entries], drawn.late) == ([0, 5], 1)


def test_expire_gives_it_up_and_its_prompt_back() -> None:
    schedule = with_a_straggler(straggler="expire")
    drawn = schedule.draw()
    assert isinstance(drawn, Batch)
    assert [record.number for record in drawn.cancelled] == [0]
    assert schedule.settled["expired"] == 1
    assert complete(schedule, 0) == ["duplicate"]
    schedule.published = schedule.batch_trained()
    record = schedule.issue("w", 2, 0.0)
    assert record is not None
    assert (record.number, record.position) == (6, 0)


def test_oversample_expires_the_youngest_surplus() -> None:
    """Synchronous DAPO with three generation batches: the first B survivors in lease order are trained."""
    schedule = make(max_staleness=0, oversample=3.0)
    assert len(issue(schedule, 100)) == 6
    complete(schedule, 5, 4)
    complete(schedule, 1, correct=WRONG)
    assert schedule.draw() == Wait("straggler", [0, 2])
    complete(schedule, 0, 2)
    drawn = schedule.draw()
    assert isinstance(drawn, Batch)
    assert [entry.key for entry in drawn.entries] == [0, 2]
    assert [record.number for record in drawn.cancelled] == [3]
    assert schedule.settled["expired"] == 3


@pytest.mark.parametrize(("priority", "expected"), [("oldest", [0, 1]), ("freshest", [2, 3]), ("signal", [1, 3])])
def test_priorities(priority: str, expected: list[int]) -> None:
    schedule = make(max_staleness=3, priority=priority)
    schedule.published = schedule.version = 1
    issue(schedule, 4)
    half, few = [True, False, True, False], [True, False, False, False]
    for number, oldest, correct in ((0, 1, few), (1, 1, half), (2, 2, few), (3, 2, half)):
        schedule.complete(number, oldest, 1, correct, None)
    assert draw(schedule) == expected


def test_a_deadline_beats_the_priority() -> None:
    """freshest would take 4 and 5 and leave 2 and 3 until it is too late for them."""
    schedule = make(max_staleness=1, priority="freshest")
    complete(schedule, *issue(schedule, 4))
    draw(schedule)
    train(schedule)
    complete(schedule, *issue(schedule, 2), oldest=1)
    assert draw(schedule) == [2, 3]


def test_a_restored_schedule_goes_on_where_it_stopped() -> None:
    schedule = make(max_staleness=2)
    issue(schedule, 6)
    complete(schedule, 0, 1, 3)
    complete(schedule, 4, correct=RIGHT)
    draw(schedule)
    again = make(max_staleness=2)
    again.restore(schedule.state(str.upper), str.lower)
    assert (again.leased, again.in_flight, again.buffered, again.filtered) == (6, 2, 3, 1)
    assert draw(again) == [0, 1]
    reissued = [again.issue("new", 0, 0.0) for _ in range(2)]
    assert [record.number for record in reissued if record] == [2, 5]
    fresh = again.issue("new", 0, 0.0)
    assert fresh is not None
    assert (fresh.number, fresh.position) == (6, 6)


# --- chaos -----------------------------------------------------------------------------------------------


class Chaos(RuleBasedStateMachine):
    """Workers of any speed, duplicates, losses, restarts and filters, against sets that anyone can check."""

    @initialize(
        eta=st.integers(0, 3),
        size=st.integers(1, 3),
        oversample=st.sampled_from([1.0, 1.5, 3.0]),
        straggler=st.sampled_from(["wait", "late", "expire"]),
        priority=st.sampled_from(["oldest", "freshest", "signal"]),
        filtering=st.booleans(),
        data=st.data(),
    )
    def begin(
        self, eta: int, size: int, oversample: float, straggler: str, priority: str, filtering: bool, data: Any
    ) -> None:
        self.settings = config.Schedule(
            groups_per_batch=size,
            max_staleness=eta,
            oversample=oversample,
            straggler=straggler,  # type: ignore[arg-type]
            priority=priority,  # type: ignore[arg-type]
            filter=filtering,
        )
        self.push_every = data.draw(st.integers(1, eta + 1))
        self.schedule = Schedule(self.settings)
        self.workers = {"a": 0, "b": 0}  # weights each serves
        self.running: dict[int, tuple[str, int]] = {}  # lease: (worker, version it started with)
        self.answered: list[int] = []
        self.filtered: set[int] = set()
        self.trained: list[int] = []
        self.training = False
        self.positions: dict[int, int] = {}

    @rule(worker=st.sampled_from(["a", "b"]), count=st.integers(1, 4))
    def lease(self, worker: str, count: int) -> None:
        for _ in range(count):
            outstanding = self.schedule.in_flight + self.schedule.buffered
            reissued = self.schedule.events["reissued"]
            record = self.schedule.issue(worker, self.workers[worker], 0.0)
            if record is None:
                return
            if self.schedule.events["reissued"] == reissued and self.settings.oversample == 1.0:
                assert outstanding < (self.settings.max_staleness + 1) * self.settings.groups_per_batch
            assert record.oldest <= max(self.schedule.published, self.workers[worker])
            assert record.number not in self.running
            assert self.positions.setdefault(record.number, record.position) == record.position
            self.workers[worker] = max(self.workers[worker], record.oldest)
            self.running[record.number] = (worker, self.workers[worker])

    @rule(worker=st.sampled_from(["a", "b"]))
    def fetch_weights(self, worker: str) -> None:
        self.workers[worker] = self.schedule.published

    @precondition(lambda self: self.running)
    @rule(data=st.data(), correct=st.lists(st.booleans(), min_size=2, max_size=4))
    def finish(self, data: Any, correct: list[bool]) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        _, started = self.running.pop(number)
        outcome = self.schedule.complete(number, started, 1, correct, number)
        same = all(correct) or not any(correct)
        if self.settings.filter and same:
            assert outcome == ("filtered_all_right" if correct[0] else "filtered_all_wrong")
            self.filtered.add(number)
        else:
            assert outcome == "accepted"
        self.answered.append(number)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def duplicate(self, data: Any) -> None:
        number = data.draw(st.sampled_from(self.answered))
        assert self.schedule.complete(number, 0, 1, [True, False], number) == "duplicate"

    @rule(worker=st.sampled_from(["a", "b"]))
    def lose(self, worker: str) -> None:
        lost = {number for number, (owner, _) in self.running.items() if owner == worker}
        assert set(self.schedule.lose_worker(worker)) == lost
        for number in lost:
            del self.running[number]

    @precondition(lambda self: not self.training)
    @rule()
    def draw(self) -> None:
        drawn = self.schedule.draw()
        if isinstance(drawn, Wait):
            self.check_wait(drawn)
            return
        keys = [entry.key for entry in drawn.entries]
        assert len(keys) == self.settings.groups_per_batch
        assert keys == sorted(keys)
        if self.settings.straggler != "late":
            assert all(self.schedule.version - e.version <= self.settings.max_staleness for e in drawn.entries)
        for record in drawn.cancelled:
            self.running.pop(record.number, None)
        self.trained += keys
        self.training = True

    def check_wait(self, wait: Wait) -> None:
        """Nothing is waited for that cannot come: whoever is named is unanswered."""
        if wait.cause == "straggler":
            assert self.settings.straggler == "wait"
            assert wait.leases
            assert all(self.schedule.lease(number) is not None for number in wait.leases)
        elif self.schedule.in_flight == 0 and self.settings.oversample == 1.0:
            assert self.schedule.admission() == "open", "stuck: nothing runs and nothing may start"

    @precondition(lambda self: self.training)
    @rule()
    def train(self) -> None:
        version = self.schedule.batch_trained()
        if version % self.push_every == 0:
            self.schedule.published = version
        self.training = False

    @rule()
    def restart(self) -> None:
        """The learner dies and comes back from a checkpoint of this very moment, its workers with it."""
        again = Schedule(self.settings)
        again.restore(self.schedule.state(lambda value: value), lambda value: value)
        if self.training:  # the batch was drawn but not trained: it will be drawn again
            self.trained = self.trained[: -self.settings.groups_per_batch]
            self.training = False
        self.schedule = again
        self.workers = dict.fromkeys(self.workers, again.version)
        self.running.clear()

    @invariant()
    def account(self) -> None:
        if not hasattr(self, "schedule"):
            return
        s = self.schedule
        assert s.leased == s.in_flight + s.buffered + s.settled["trained"] + s.filtered + s.settled["expired"]
        assert s.buffered <= s.capacity
        assert len(set(self.trained)) == len(self.trained), "trained twice"
        assert not self.filtered & set(self.trained)
        assert s.settled["trained"] == len(self.trained) - (self.settings.groups_per_batch if self.training else 0)
        assert set(self.running) <= {record.number for record in s.running()}


TestChaos = pytest.mark.timeout(300)(Chaos.TestCase)
TestChaos.settings = settings(  # type: ignore[attr-defined]
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
