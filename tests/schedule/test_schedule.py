"""The schedule under chaos, with every promise checked after each step, and its corner cases by hand."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dapo_async.config import settings as config
from dapo_async.errors import CheckpointError
from dapo_async.schedule.deadlines import check_room
from dapo_async.schedule.schedule import SETTLED, Batch, Schedule, Wait

MIXED, RIGHT, WRONG = [True, False], [True, True], [False, False]


def make(num_prompts: int | None = None, **settings: Any) -> Schedule:
    return Schedule(config.Schedule(**{"groups_per_batch": 2, "max_staleness": 1, **settings}), num_prompts)


def issue(schedule: Schedule, count: int, version: int | None = None, worker: str = "w") -> list[int]:
    """Lease ``count`` prompts to a worker that serves ``version``."""
    records = [schedule.issue(worker, schedule.version if version is None else version, 0.0) for _ in range(count)]
    return [record.lease for record in records if record is not None]


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
    assert record.min_version == 1


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
    assert [record.min_version for record in records if record] == [1, 1, 2, 2, 3, 3]


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


def test_a_lost_worker_gives_its_leases_to_the_next_under_their_own_numbers() -> None:
    schedule = make()
    issue(schedule, 1, worker="a")
    issue(schedule, 1, worker="b")
    assert schedule.lose_worker("a") == [0]
    record = schedule.issue("b", 0, 5.0)
    assert record is not None
    assert (record.lease, record.position, record.worker) == (0, 0, "b")
    assert schedule.counts["reissued"] == 1
    assert complete(schedule, 0, 0) == ["accepted", "duplicate"]  # whoever answers first
    assert complete(schedule, 77, -1) == ["unknown_lease", "unknown_lease"]
    assert schedule.lose_worker("b") == [1]


def test_a_worker_that_comes_back_keeps_what_nobody_else_has() -> None:
    schedule = make()
    issue(schedule, 2, worker="a")
    schedule.lose_worker("a")
    issue(schedule, 1, worker="b")
    assert schedule.reclaim("a", [0, 1, 9, 1]) == [1]  # named twice, or never leased: no harm
    assert schedule.release("b", [0, 1]) == [0]


def test_a_group_older_than_its_lease_allows_is_refused_and_leased_again() -> None:
    schedule = make(max_staleness=0)
    schedule.version = schedule.published = 4
    (number,) = issue(schedule, 1)
    assert complete(schedule, number, oldest=3) == ["too_old"]
    record = schedule.issue("w", 4, 0.0)
    assert record is not None
    assert record.lease == number


# --- batches ---------------------------------------------------------------------------------------------


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
    assert [record.lease for record in drawn.cancelled] == [0]
    assert schedule.counts["expired"] == 1
    assert complete(schedule, 0) == ["duplicate"]
    schedule.published = schedule.batch_trained()
    record = schedule.issue("w", 2, 0.0)
    assert record is not None
    assert (record.lease, record.position) == (6, 0)


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
    assert [record.lease for record in drawn.cancelled] == [3]
    assert schedule.counts["expired"] == 3


@pytest.mark.parametrize(("priority", "expected"), [("oldest", [0, 1]), ("freshest", [2, 3]), ("signal", [1, 3])])
def test_priorities(priority: str, expected: list[int]) -> None:
    schedule = make(max_staleness=3, priority=priority)
    schedule.published = schedule.version = 1
    issue(schedule, 4)
    half, few = [True, False, True, False], [True, False, False, False]
    for number, oldest, correct in ((3, 2, half), (1, 1, half), (2, 2, few), (0, 1, few)):
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
    issued = [again.issue("new", 0, 0.0) for _ in range(3)]
    assert [(record.lease, record.position) for record in issued if record] == [(2, 2), (5, 5), (6, 6)]


@pytest.mark.parametrize(
    ("narrower", "told"),
    [
        (
            {"max_staleness": 0},
            "holds 5 groups, complete or leased, up to 2 versions old; .* places for 2: ",
        ),
        (
            {"max_staleness": 1},
            r"max_staleness = 1, groups_per_batch = 2 and oversample = 1 leave places for 4: resume",
        ),
        ({"max_staleness": 1, "groups_per_batch": 3}, "places for 6: resume with the settings of the run"),
        ({"max_staleness": 1, "straggler": "late"}, "places for 4: resume"),
    ],
)
def test_a_schedule_is_not_restored_under_settings_too_narrow_for_its_groups(
    narrower: dict[str, Any], told: str
) -> None:
    schedule = make(max_staleness=2)
    complete(schedule, *issue(schedule, 6))
    for _ in range(2):
        draw(schedule)
        train(schedule)
    issue(schedule, 3)
    state = schedule.state(str)
    with pytest.raises(CheckpointError, match=told):
        check_room(state, make(**narrower).config)
    for fitting in ({"max_staleness": 2}, {"max_staleness": 5}, {"max_staleness": 2, "straggler": "expire"}):
        check_room(state, make(**fitting).config)


# --- chaos -----------------------------------------------------------------------------------------------

WORKERS = st.sampled_from(["a", "b"])


@dataclass
class Model:
    """What must be true of the schedule at one moment, in plain lists and dicts. Leases go by their numbers."""

    positions: list[int] = field(default_factory=list)  # of every lease ever issued
    oldest: list[int] = field(default_factory=list)  # version it allows
    owner: dict[int, str | None] = field(default_factory=dict)  # of those in flight
    buffered: dict[int, int] = field(default_factory=dict)  # complete, not yet trained: oldest version
    drawn: list[int] = field(default_factory=list)  # those of them that are being trained
    settled: dict[str, list[int]] = field(default_factory=lambda: {outcome: [] for outcome in SETTLED})
    returned: list[int] = field(default_factory=list)  # positions that wait to be leased again
    events: Counter[str] = field(default_factory=Counter)
    version: int = 0

    def held(self, worker: str | None) -> list[int]:
        return sorted(number for number, owner in self.owner.items() if owner == worker)


@settings(max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
class Chaos(RuleBasedStateMachine):
    """Workers of any speed, duplicates, losses, returns, restarts and filters, against sets that anyone can check."""

    @initialize(
        schedule=st.builds(
            make,
            st.sampled_from([None, None, 20]),
            groups_per_batch=st.integers(1, 3),
            max_staleness=st.integers(0, 3),
            oversample=st.sampled_from([1.0, 1.5, 3.0]),
            straggler=st.sampled_from(["wait", "late", "expire"]),
            priority=st.sampled_from(["oldest", "freshest", "signal"]),
            filter=st.booleans(),
        ),
        push_every=st.integers(1, 4),
    )
    def begin(self, schedule: Schedule, push_every: int) -> None:
        self.schedule, self.model, self.config = schedule, Model(), schedule.config
        self.push_every = min(push_every, self.config.max_staleness + 1)
        self.serves = {"a": 0, "b": 0}  # worker: its weights
        self.work: dict[tuple[str, int], int] = {}  # (worker, lease): version it started with; the lost work on
        self.saved: list[tuple[bytes, Model]] = []

    @rule(worker=WORKERS, count=st.integers(1, 9), fetch=st.booleans())
    def lease(self, worker: str, count: int, fetch: bool) -> None:
        m, bound = self.model, (self.config.max_staleness + 1) * self.config.groups_per_batch
        self.serves[worker] = self.schedule.published if fetch else self.serves[worker]
        for _ in range(count):
            orphans = m.held(None)
            record = self.schedule.issue(worker, self.serves[worker], 0.0)
            if record is None:
                assert not orphans
                return
            if orphans:
                assert record.lease in orphans
                assert record.min_version == max(m.oldest[record.lease], self.serves[worker])
                m.oldest[record.lease] = record.min_version
                m.events["reissued"] += 1
            else:
                assert len(m.owner) + len(m.buffered) - len(m.drawn) < self.config.oversample * (bound - len(m.drawn))
                assert record.lease == len(m.positions)
                m.positions.append(m.returned.pop(0) if m.returned else max(m.positions, default=-1) + 1)
                m.oldest.append(record.min_version)
            assert record.min_version <= max(self.schedule.published, self.serves[worker])
            m.owner[record.lease] = worker
            self.serves[worker] = max(self.serves[worker], record.min_version)
            self.work[worker, record.lease] = self.serves[worker]

    @rule(data=st.data(), count=st.integers(1, 9))
    def finish(self, data: Any, count: int) -> None:
        """Answers arrive: also of the lost, older than was asked for, or to what is settled or unknown."""
        stray = "a", data.draw(st.integers(-1, len(self.model.positions)))
        for _ in range(min(count, len(self.work) + 1)):
            worker, number = data.draw(st.sampled_from(sorted(self.work) or [stray]))
            version = max(0, self.work.pop((worker, number), 0) - data.draw(st.sampled_from([0, 0, 0, 0, 1])))
            self.answer(worker, number, version, data.draw(st.sampled_from([MIXED, MIXED, RIGHT, WRONG])))

    def answer(self, worker: str, number: int, version: int, correct: list[bool]) -> None:
        m, expected = self.model, "accepted"
        if number not in m.owner:
            expected = "duplicate" if 0 <= number < len(m.positions) else "unknown_lease"
        elif version < m.oldest[number] and self.config.straggler != "late":
            expected = "too_old"
            if m.owner[number] not in (None, worker):
                return  # the coordinator drops it: another worker has the lease
        elif self.config.filter and correct != MIXED:
            expected = "filtered_all_right" if correct == RIGHT else "filtered_all_wrong"
        assert self.schedule.complete(number, version, number + 1, correct, number) == expected
        m.owner.pop(number, None)
        m.owner.update({number: None} if expected == "too_old" else {})
        if expected == "accepted":
            m.buffered[number] = version
        elif expected in SETTLED:
            m.settled[expected].append(number)
        else:
            m.events[expected] += 1

    @rule(worker=WORKERS, then=st.sampled_from(["dead", "silent", "back"]))
    def lose(self, worker: str, then: str) -> None:
        """Whoever is not dead works on: it answers late, or comes back and gets what nobody else has."""
        m, lost = self.model, self.model.held(worker)
        assert sorted(self.schedule.lose_worker(worker)) == lost
        m.owner.update(dict.fromkeys(lost))
        if then == "dead":
            self.work = {key: version for key, version in self.work.items() if key[0] != worker}
        elif then == "back":
            named = [number for name, number in self.work if name == worker]
            kept = [number for number in named if number in m.held(None)]
            assert self.schedule.reclaim(worker, [*named, 999]) == kept
            m.owner.update(dict.fromkeys(kept, worker))

    @rule(worker=WORKERS, data=st.data())
    def give_back(self, worker: str, data: Any) -> None:
        """The worker names any leases, and only its own are taken from it."""
        named = data.draw(st.sets(st.sampled_from([-1, 999, *self.model.owner])))
        released = sorted(named.intersection(self.model.held(worker)))
        assert sorted(self.schedule.release(worker, named)) == released
        self.model.owner.update(dict.fromkeys(released))
        for number in released:
            del self.work[worker, number]

    @rule()
    def draw(self) -> None:
        if self.model.drawn:
            return
        enough, held_back = self.schedule.buffered >= self.schedule.batch_size, self.schedule.held_back()
        m, drawn = self.model, self.schedule.draw()
        if enough and self.config.oversample == 1.0:
            assert held_back == (isinstance(drawn, Wait) and drawn.cause == "straggler")
        if isinstance(drawn, Wait):  # for nothing that cannot come
            assert {*drawn.leases} <= ({*m.owner} if self.config.straggler == "wait" else set())
            assert bool(drawn.leases) == (drawn.cause == "straggler")
            if not m.owner:
                assert self.schedule.admission() == ("exhausted" if drawn.cause == "exhausted" else "open"), "stuck"
            return
        m.drawn = [entry.key for entry in drawn.entries]
        assert [entry.value for entry in drawn.entries] == m.drawn == sorted(m.drawn)
        assert len(m.drawn) == self.config.groups_per_batch
        assert drawn.late == sum(m.version - m.buffered[n] > self.config.max_staleness for n in m.drawn)
        assert not drawn.late or self.config.straggler == "late"
        m.events["late"] += drawn.late
        state = self.schedule.state(int)
        gone = sorted({*m.owner, *m.buffered} - {row[0] for row in [*state["in_flight"], *state["buffered"]]})
        assert [record.lease for record in drawn.cancelled] == [n for n in gone if n in m.owner]
        if self.config.oversample == 1.0:  # no surplus: only the running are given up
            assert {*gone} <= ({*m.owner} if self.config.straggler == "expire" else set())
        for number in gone:
            m.settled["expired"].append(number)
            m.returned.append(m.positions[number])
            (m.owner if number in m.owner else m.buffered).pop(number)

    @rule()
    def train(self) -> None:
        m = self.model
        if not m.drawn:
            return
        m.version += 1
        assert self.schedule.batch_trained() == m.version
        self.schedule.published = max(self.schedule.published, m.version // self.push_every * self.push_every)
        m.settled["trained"] += m.drawn
        m.buffered = {number: version for number, version in m.buffered.items() if number not in m.drawn}
        m.drawn = []

    @rule(turns=st.integers(1, 4), answers=st.integers(4, 9), data=st.data())
    def go_on(self, turns: int, answers: int, data: Any) -> None:
        """All goes well for a while, so that chaos also meets a schedule in full swing."""
        fill = partial(self.lease, "a", 9, True), partial(self.lease, "b", 9, True)
        for step in (*fill, partial(self.finish, data, answers), self.draw, self.train) * turns:
            step()
            self.account()

    @rule()
    def save(self) -> None:
        state = msgspec.msgpack.encode(self.schedule.state(lambda number: {"group": number}))
        self.saved = [*self.saved[-2:], (state, deepcopy(self.model))]

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), dead=st.booleans())
    def restart(self, data: Any, dead: bool) -> None:
        """The learner dies and comes back from one of its checkpoints; its workers may outlive it."""
        former, (state, moment) = self.model, data.draw(st.sampled_from(self.saved))
        self.schedule = Schedule(self.config, self.schedule.num_prompts)
        check_room(msgspec.msgpack.decode(state), self.config)  # the same settings always have room
        self.schedule.restore(msgspec.msgpack.decode(state), lambda value: value["group"])
        m = self.model = deepcopy(moment)
        m.drawn, m.owner = [], dict.fromkeys(m.owner)  # what was not trained will be drawn again
        self.serves = dict.fromkeys(self.serves, m.version)
        for (worker, number), version in list(
            self.work.items()
        ):  # the coordinator drops what another timeline asked for
            if dead or version > m.version or m.positions[number : number + 1] != [former.positions[number]]:
                del self.work[worker, number]

    @invariant()
    def account(self) -> None:
        s, m, state = self.schedule, self.model, self.schedule.state(int)
        assert s.leased == s.in_flight + s.buffered + s.counts["trained"] + s.filtered + s.counts["expired"]
        assert s.buffered_tokens == sum(number + 1 for number in m.buffered)
        assert [(r.lease, r.worker) for r in s.running()] == sorted(m.owner.items())
        assert state["in_flight"] == [[n, m.positions[n], m.oldest[n]] for n in sorted(m.owner)]
        buffered = [[n, version, m.positions[n]] for n, version in sorted(m.buffered.items())]
        assert sorted([row[0], row[1], row[4]] for row in state["buffered"]) == buffered
        assert s.counts == m.events + Counter({outcome: len(numbers) for outcome, numbers in m.settled.items()})
        assert (s.version, state["returned"]) == (m.version, m.returned)
        # Every lease is in exactly one set, hence trained at most once; and so is every position of the stream.
        kept = [*m.owner, *m.buffered, *(n for key, numbers in m.settled.items() if key != "expired" for n in numbers)]
        assert sorted(kept + m.settled["expired"]) == list(range(s.leased)), "a lease is lost, or settled twice"
        assert sorted([m.positions[n] for n in kept] + m.returned) == list(range(state["cursor"]))
        assert s.num_prompts is None or state["cursor"] <= s.num_prompts
        assert all(owner is None or (owner, n) in self.work for n, owner in m.owner.items()), "nobody works on it"


TestChaos = pytest.mark.timeout(300)(Chaos.TestCase)
