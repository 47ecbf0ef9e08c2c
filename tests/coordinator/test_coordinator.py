"""The coordinator over real sockets. The worker's side is spoken by the test: what a worker or a stranger might say."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from dapo_async.config import settings as config
from dapo_async.config.toml import build_config
from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.evaluation import EvaluationJob, summarise
from dapo_async.coordinator.groups import GroupStore
from dapo_async.coordinator.liveness import look_after
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import Prompt
from dapo_async.errors import StallError
from dapo_async.transport.messages import (
    FROM_LEARNER,
    FROM_WORKER,
    Ack,
    Beat,
    Cancel,
    Codec,
    Completion,
    Group,
    Hello,
    LearnerBeat,
    Lease,
    Message,
    Refused,
    Reintroduce,
    Released,
    Stop,
    Welcome,
)
from dapo_async.transport.sockets import Dialer

VOCABULARY = 50
SETTINGS: dict[str, Any] = {
    "model": {"path": "unused"},
    "data": {"train": "unused", "max_prompt_tokens": 8},
    "sampling": {"group_size": 2, "max_tokens": 5},
    "schedule": {"groups_per_batch": 2, "max_staleness": 1},
    "network": {"heartbeat_s": 0.1, "silence_s": 1.0},
    "run": {"stall_timeout_s": 20.0},
}


class Prompts:
    """An endless stream of numbered prompts."""

    num_prompts = 100

    def __getitem__(self, n: int) -> Prompt:
        return Prompt(id=f"p{n}", ids=np.array([n % VOCABULARY], dtype=np.int32), truth=str(n), text=f"prompt {n}")

    def __len__(self) -> int:
        return self.num_prompts


def settings(**tables: dict[str, Any]) -> config.Config:
    merged = {name: {**SETTINGS.get(name, {}), **tables.get(name, {})} for name in {*SETTINGS, *tables}}
    return build_config(merged, "test")


def make_coordinator(cfg: config.Config, life: str = "0") -> Coordinator:
    return Coordinator(
        cfg,
        Prompts(),  # type: ignore[arg-type]
        vocab_size=VOCABULARY,
        weights_address="tcp://127.0.0.1:1",
        incarnation=Incarnation("run", life),
    )


@pytest.fixture
def start() -> Iterator[Callable[..., Coordinator]]:
    coordinators: list[Coordinator] = []

    def start(life: str = "0", **tables: dict[str, Any]) -> Coordinator:
        coordinators.append(make_coordinator(settings(**tables), life))
        coordinators[-1].start()
        return coordinators[-1]

    yield start
    for coordinator in coordinators:
        coordinator.close()


class Worker:
    """A worker's end of the control socket."""

    def __init__(self, coordinator: Coordinator, name: str = "w0") -> None:
        self.name = name
        self.dialer = Dialer(coordinator.address, max_message_bytes=1 << 24)
        self.encoder, self.decoder = Codec(FROM_WORKER), Codec(FROM_LEARNER)
        self.leases: list[Lease] = []

    def send(self, message: Message) -> None:
        assert self.dialer.send(self.encoder.encode(message), timeout_s=5.0)

    def send_raw(self, *frames: bytes) -> None:
        assert self.dialer.send(frames, timeout_s=5.0)

    def hello(self, capacity: int = 100, **facts: Any) -> None:
        facts = {"version": 0, **facts}
        self.send(Hello(worker=self.name, pid=1, host="here", engine="test", capacity=capacity, **facts))

    def expect(self, kind: type[Any], where: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message of this kind; leases met on the way are kept. Fails after 10 seconds."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            frames = self.dialer.receive(timeout_s=0.1)
            if frames is None:
                continue
            message = self.decoder.decode(list(frames))
            if isinstance(message, Lease):
                message.prompt_ids = message.prompt_ids.copy()
                self.leases.append(message)
            if isinstance(message, kind) and where(message):
                return message
        raise AssertionError(f"{self.name} waited 10 s for {kind.__name__}")

    def take_leases(self, count: int) -> list[Lease]:
        """The oldest ``count`` leases not yet taken."""
        while len(self.leases) < count:
            self.expect(Lease)
        taken, self.leases = self.leases[:count], self.leases[count:]
        return taken

    def answer(self, lease: Lease, /, **changes: Any) -> Ack:
        """Answer with a mixed group, changed by ``changes``; the coordinator's word on it."""
        self.send(group(lease, **changes))
        ack: Ack = self.expect(Ack, lambda ack: ack.lease == changes.get("lease", lease.lease))
        return ack


def group(
    lease: Lease,
    /,
    *,
    versions: tuple[int, int] = (0, 0),
    correct: tuple[bool, ...] = (True, False),
    **changes: Any,
) -> Group:
    spans = [(versions[0], 2), (versions[1], 1)] if versions[0] != versions[1] else [(versions[0], 3)]
    facts: dict[str, Any] = {
        "lease": lease.lease,
        "kind": lease.kind,
        "incarnation": lease.incarnation,
        "completions": [Completion(num_tokens=3, spans=spans, finish="stop", correct=c) for c in correct],
        "token_ids": np.arange(3 * len(correct), dtype=np.int32),
        "logprobs": np.full(3 * len(correct), -1.0, dtype=np.float32),
    }
    return Group(**facts | changes)


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(coordinator: Coordinator, name: str = "w0") -> Worker:
        made.append(Worker(coordinator, name))
        return made[-1]

    yield make
    for worker in made:
        worker.dialer.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "condition not met within 10 s"
        time.sleep(0.01)


def next_batch(coordinator: Coordinator) -> Any:
    return coordinator.next_batch(lambda cause: None, lambda: False)


# --- the normal course -----------------------------------------------------------------------------------


def test_leases_go_out_groups_come_in_batches_come_out(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    assert worker.expect(Welcome).incarnation == "run.0"
    leases = worker.take_leases(4)  # (η + 1) · B
    assert [lease.lease for lease in leases] == [0, 1, 2, 3]
    assert len({lease.seed for lease in leases}) == 4
    assert [worker.answer(lease).outcome for lease in leases[2:0:-1]] == ["accepted", "accepted"]
    drawn = next_batch(coordinator)
    assert [rollout.lease for rollout in drawn.groups] == [1, 2]
    assert drawn.groups[0].prompt.id == "p1"
    assert coordinator.batch_trained() == 1
    coordinator.announce(1)
    assert [lease.lease for lease in worker.take_leases(2)] == [4, 5]


def test_capacity_is_never_exceeded(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello(capacity=1)
    (lease,) = worker.take_leases(1)
    time.sleep(0.3)
    assert coordinator.schedule.in_flight == 1
    worker.answer(lease)
    assert worker.take_leases(1)[0].lease == 1


def test_a_filtered_group_is_acknowledged_and_its_place_given_on(start: Any, workers: Any) -> None:
    coordinator = start(schedule={"groups_per_batch": 2, "max_staleness": 0})
    worker = workers(coordinator)
    worker.hello()
    first, _ = worker.take_leases(2)
    assert worker.answer(first, correct=(True, True)).outcome == "filtered_all_right"
    assert worker.take_leases(1)[0].lease == 2
    assert coordinator.handlers.counts["groups"] == 1
    assert coordinator.handlers.counts["accepted_groups"] == 0


def test_the_first_failed_verification_is_logged_and_no_further_one(
    start: Any, workers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    for failure in ("error", "error", "timeout"):
        [lease] = worker.take_leases(1)
        failed = Completion(num_tokens=3, spans=[(0, 3)], finish="stop", correct=False, verdict=failure)
        right = Completion(num_tokens=3, spans=[(0, 3)], finish="stop", correct=True)
        assert worker.answer(lease, completions=[right, failed]).outcome == "accepted"
    told = [record.getMessage() for record in caplog.records if "reward.verifier" in record.getMessage()]
    assert told == [
        f"reward.verifier failed on an answer of worker w0 ({failure}), which counts as wrong; that worker's log says "
        f"why, and verifier/{failure}s counts how many"
        for failure in ("error", "timeout")
    ]


# --- workers come and go ---------------------------------------------------------------------------------


def test_a_silent_workers_leases_are_issued_again(start: Any, workers: Any) -> None:
    coordinator = start()
    silent, other = workers(coordinator, "silent"), workers(coordinator, "other")
    silent.hello()
    held = silent.take_leases(4)
    other.hello()

    def beat() -> bool:
        other.send(Beat(version=0, running=0, holding=[]))
        return coordinator.handlers.counts["workers_lost"] == 1

    wait_until(beat)
    assert list(coordinator.gone()) == ["silent"]
    wait_until(lambda: beat() and coordinator.gone()["silent"].silent_s > 1.1)
    again = other.take_leases(4)
    assert [lease.lease for lease in again] == [lease.lease for lease in held]
    assert [lease.seed for lease in again] == [lease.seed for lease in held]
    assert other.answer(again[0]).outcome == "accepted"
    # The silent one was only slow. It is asked who it is, says so, and its late answer is recognised.
    silent.send(group(held[0]))
    silent.expect(Reintroduce)
    silent.hello(incarnation="run.0", holding=[lease.lease for lease in held])
    assert silent.answer(held[0]).outcome == "duplicate"
    assert coordinator.counts()["duplicate"] == 1
    assert not coordinator.gone()
    coordinator.worker_ended("silent")
    assert not coordinator.gone(), "an ended process is not waited for"


def test_a_lease_that_a_broken_connection_swallowed_is_issued_again(start: Any, workers: Any) -> None:
    """The worker is alive and says what it holds; what was sent to it longer than silence_s ago is missing."""
    coordinator = start(network={"heartbeat_s": 0.1, "silence_s": 0.5})
    worker = workers(coordinator)
    worker.hello()
    held = worker.take_leases(4)
    lost, *kept = [lease.lease for lease in held]

    def again() -> bool:
        worker.send(Beat(version=0, running=0, holding=[("train", number) for number in kept]))
        worker.expect(LearnerBeat)
        return bool(worker.leases)

    wait_until(again)
    assert worker.take_leases(1)[0].lease == lost
    assert coordinator.schedule.counts["reissued"] == 1
    for lease in held:
        assert worker.answer(lease).outcome == "accepted"


def test_an_answer_for_a_lease_that_another_worker_holds_is_refused(start: Any, workers: Any) -> None:
    coordinator = start()
    holder, stranger = workers(coordinator, "holder"), workers(coordinator, "stranger")
    holder.hello()
    (lease, *_) = holder.take_leases(4)
    stranger.hello(capacity=0)
    stranger.expect(Welcome)
    told = stranger.answer(lease)
    assert (told.outcome, told.detail) == (
        "refused",
        f"not_holder: lease {lease.lease} was never given to worker stranger",
    )
    assert holder.answer(lease).outcome == "accepted"


def test_a_former_holder_that_answers_first_cancels_the_holder(start: Any, workers: Any) -> None:
    coordinator = start()
    slow, quick = workers(coordinator, "slow"), workers(coordinator, "quick")
    slow.hello()
    (lease, *_) = slow.take_leases(4)
    coordinator.worker_ended("slow")
    quick.hello()
    assert lease.lease in [again.lease for again in quick.take_leases(4)]
    slow.hello(capacity=0)
    slow.expect(Welcome)
    assert slow.answer(lease).outcome == "accepted"
    assert quick.expect(Cancel).leases == [lease.lease]


def test_released_leases_go_to_somebody_else(start: Any, workers: Any) -> None:
    coordinator = start()
    leaving, staying = workers(coordinator, "leaving"), workers(coordinator, "staying")
    leaving.hello(capacity=2)
    leaving.take_leases(2)
    staying.hello()
    assert [lease.lease for lease in staying.take_leases(2)] == [2, 3]
    leaving.hello(capacity=0)
    leaving.send(Released(reason="going home"))
    assert sorted(lease.lease for lease in staying.take_leases(2)) == [0, 1]


def test_a_process_that_ended_is_forgotten_at_once(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    worker.take_leases(4)
    coordinator.worker_ended("w0")
    assert coordinator.workers() == []
    assert all(record.worker is None for record in coordinator.schedule.running())


def test_a_name_has_one_worker(start: Any, workers: Any) -> None:
    """Two of one name would else take it from each other for ever."""
    coordinator = start(network={"silence_s": 20.0})
    first, second = workers(coordinator), workers(coordinator)
    first.hello()
    first.expect(Welcome)
    leases = first.take_leases(4)
    second.hello(capacity=0)
    refused = second.expect(Refused)
    assert refused.reason == "name_taken"
    assert refused.detail.startswith("a worker named w0 is connected already (process 1 of here): ")
    first.hello(version=0)  # the same process may introduce itself again
    first.expect(Welcome)
    assert first.answer(leases[0]).outcome == "accepted"
    [worker] = coordinator.workers()
    assert worker.holds("train") == [1, 2, 3]
    assert coordinator.handlers.counts["refused_name_taken"] == 1
    first.dialer.close()  # without a goodbye
    second.hello()
    second.expect(Welcome)
    assert [lease.lease for lease in second.take_leases(3)] == [1, 2, 3]
    assert len(coordinator.workers()) == 1


def test_workers_are_not_silent_while_the_hub_itself_stood_still(
    start: Any, workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-Z and fg: what they said lies in its queue, and only the first of it is read before it judges."""
    coordinator = start(network={"silence_s": 0.5, "heartbeat_s": 0.1})
    workers(coordinator, "lost").hello()
    wait_until(lambda: "lost" in coordinator.gone())
    lost = coordinator.gone()["lost"]
    heard = lost.last_seen
    several = [workers(coordinator, f"w{number}") for number in range(3)]
    for worker in several:
        worker.hello()
        worker.expect(Welcome)
    receive, stood_still = coordinator.handlers.receive, threading.Event()

    def stand_still(*arguments: Any) -> None:
        if not stood_still.is_set():
            stood_still.set()
            time.sleep(1.5)
        receive(*arguments)

    monkeypatch.setattr(coordinator.handlers, "receive", stand_still)
    ends = time.monotonic() + 2.5
    while time.monotonic() < ends:
        for worker in several:
            worker.send(Beat(version=0, running=0, holding=[]))
        time.sleep(0.05)
    assert stood_still.is_set()
    assert list(coordinator.gone()) == ["lost"]
    assert lost.last_seen > heard, "nor has who was lost before been silent for all that time"


class Killer:
    """A supervisor of workers that are none of this machine's processes: it notes whom it was told to kill."""

    def __init__(self) -> None:
        self.killed: set[str] = set()

    def kill(self, name: str, why: str) -> None:
        assert why.startswith("silent for ")
        self.killed.add(name)

    def poll(self, _connected: object) -> list[Any]:
        return []


def test_who_hangs_is_killed_and_who_still_loads_its_model_is_not(start: Any, workers: Any) -> None:
    coordinator = start(
        network={"silence_s": 0.3, "heartbeat_s": 0.1},
        workers={"start_timeout_s": 0.3},
        run={"stall_timeout_s": 1.0},
    )
    workers(coordinator, "loading").hello(capacity=0)
    workers(coordinator, "hanging").hello()
    killer = Killer()

    def look() -> bool:
        look_after(killer, coordinator)  # type: ignore[arg-type]
        return killer.killed == {"hanging"} and coordinator.gone()["loading"].silent_s > 1.5

    wait_until(lambda: coordinator.gone().keys() == {"loading", "hanging"})
    wait_until(look)
    assert killer.killed == {"hanging"}


def test_a_name_is_free_again_once_its_worker_is_silent(start: Any, workers: Any) -> None:
    coordinator = start(network={"heartbeat_s": 0.1, "silence_s": 0.5})
    first, second = workers(coordinator), workers(coordinator)
    first.hello()
    first.expect(Welcome)
    wait_until(lambda: not coordinator.workers())
    second.hello()
    second.expect(Welcome)
    first.hello()  # it was not dead after all
    assert first.expect(Refused).reason == "name_taken"


def test_stop_reaches_everyone(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    worker.take_leases(1)
    coordinator.stop_workers("enough")
    assert worker.expect(Stop).reason == "enough"


# --- what is refused -------------------------------------------------------------------------------------

BAD_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown lease": ({"lease": 99}, "unknown_lease"),
    "future version": ({"versions": (0, 7)}, "future_version"),
    "three completions": ({"correct": (True, False, True)}, "wrong_count"),
    "token outside the vocabulary": ({"token_ids": np.full(6, VOCABULARY, dtype=np.int32)}, "tokens"),
    "longer than allowed": (
        {
            "completions": [
                Completion(num_tokens=6, spans=[(0, 6)], finish="length", correct=c) for c in (True, False)
            ],
            "token_ids": np.zeros(12, dtype=np.int32),
            "logprobs": np.full(12, -1.0, dtype=np.float32),
        },
        "overlong",
    ),
    "another run": ({"incarnation": "elsewhere.0"}, "incarnation"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_group_that_cannot_be_is_refused_counted_and_leased_again(start: Any, workers: Any, case: str) -> None:
    changes, reason = BAD_GROUPS[case]
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    leases = worker.take_leases(4)
    ack = worker.answer(leases[0], **changes)
    assert (ack.outcome, ack.detail.partition(":")[0]) == ("refused", reason)
    assert coordinator.handlers.counts[f"refused_{reason}"] == 1
    if case != "unknown lease":
        assert worker.take_leases(1)[0].lease == leases[0].lease
    assert worker.answer(leases[0]).outcome == "accepted"  # the run goes on


def encoded(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in Codec(FROM_WORKER).encode(message)]


def with_head(message: Message, **changes: Any) -> list[bytes]:
    head, *arrays = encoded(message)
    return [msgspec.msgpack.encode(msgspec.msgpack.decode(head) | changes), *arrays]


A_LEASE = Lease(
    lease=0, incarnation="run.0", truth="", prompt_ids=np.zeros(1, np.int32), num_samples=2,
    seed=1, min_version=0, max_tokens=5, temperature=1.0,
)  # fmt: skip
NAN = np.full(6, np.nan, dtype=np.float32)
BAD_FRAMES: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "malformed"),
    "truncated head": ([encoded(group(A_LEASE))[0][:40], *encoded(group(A_LEASE))[1:]], "malformed"),
    "truncated array": ([*encoded(group(A_LEASE))[:2], encoded(group(A_LEASE))[2][:7]], "malformed"),
    "missing array": (encoded(group(A_LEASE))[:2], "malformed"),
    "wrong type": (with_head(group(A_LEASE), lease="zero"), "malformed"),
    "unknown field": (with_head(group(A_LEASE), extra=1), "malformed"),
    "unknown message": (with_head(group(A_LEASE), type="gossip"), "malformed"),
    "NaN log-probs": (encoded(group(A_LEASE, logprobs=NAN)), "logprobs"),
    "positive log-probs": (encoded(group(A_LEASE, logprobs=-np.full(6, -0.5, np.float32))), "logprobs"),
    "negative tokens": (encoded(group(A_LEASE, token_ids=np.full(6, -1, np.int32))), "tokens"),
    "lengths": (encoded(group(A_LEASE, token_ids=np.zeros(5, np.int32))), "lengths"),
    "other protocol": (with_head(group(A_LEASE), protocol=99), "protocol"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_malformed_messages_are_refused_counted_and_the_run_goes_on(start: Any, workers: Any, case: str) -> None:
    frames, reason = BAD_FRAMES[case]
    coordinator = start()
    stranger, worker = workers(coordinator, "stranger"), workers(coordinator)
    stranger.send_raw(*frames)
    assert stranger.expect(Refused).reason == reason
    assert coordinator.handlers.counts[f"refused_{reason}"] == 1
    worker.hello()
    assert worker.answer(worker.take_leases(1)[0]).outcome == "accepted"
    coordinator.check()


@pytest.mark.parametrize(("megabytes", "counted"), [(1.5, 1), (3, 0)])
def test_an_oversize_message_harms_nobody_else(start: Any, workers: Any, megabytes: float, counted: int) -> None:
    """Moderately oversize: refused and counted. Far beyond: ZeroMQ cuts the sender off; that is counted as such."""
    coordinator = start(network={"heartbeat_s": 0.1, "silence_s": 1.0, "max_message_mb": 1})
    stranger, worker = workers(coordinator, "stranger"), workers(coordinator)
    stranger.send_raw(b"x" * int(megabytes * 2**20))
    if counted:
        assert stranger.expect(Refused).reason == "oversize"
    worker.hello()
    assert worker.answer(worker.take_leases(1)[0]).outcome == "accepted"
    assert coordinator.handlers.counts["refused_oversize"] == counted
    wait_until(lambda: coordinator.status().disconnects == 1 - counted)
    coordinator.check()


def test_a_worker_that_is_refused_again_and_again_is_stopped(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    for _ in range(5):
        worker.answer(worker.take_leases(1)[0], versions=(0, 9))
    assert "future_version" in worker.expect(Stop).reason
    assert coordinator.workers() == []


# --- evaluation, stalls, resume --------------------------------------------------------------------------


def evaluation(*prompts: int) -> EvaluationJob:
    """Two answers to each of these prompts, and the learner waits for them."""
    facts: dict[str, Any] = {"samples": 2, "max_tokens": 5, "temperature": 1.0, "top_p": 1.0, "min_version": 0}
    return EvaluationJob([Prompts()[n] for n in prompts], waited_for=True, **facts)


def test_an_evaluation_that_is_waited_for_goes_first_and_outside_the_account(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    prompts = [Prompts()[n] for n in range(3)]
    job = EvaluationJob(prompts, samples=2, max_tokens=5, temperature=0.7, top_p=0.9, min_version=0, waited_for=True)
    coordinator.evaluate(job)
    worker.hello(capacity=3)
    leases = worker.take_leases(3)
    assert {(lease.kind, lease.temperature, lease.top_p) for lease in leases} == {("eval", 0.7, 0.9)}
    assert coordinator.schedule.leased == 0
    for lease, correct in zip(leases, [(True, True), (True, False), (False, False)], strict=True):
        assert worker.answer(lease, correct=correct).outcome == "accepted"
    assert job.done
    result = summarise(job)
    assert result["heldout/accuracy"] == 0.5
    assert result["heldout/pass_at_k"] == pytest.approx(2 / 3)
    assert result["heldout/length_mean"] == 3
    assert worker.answer(leases[0]).outcome == "duplicate"


def test_a_late_answer_to_a_former_evaluation_is_not_taken_for_one_of_the_next(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    jobs = [evaluation(n) for n in (0, 1)]
    coordinator.evaluate(jobs[0])
    worker.hello(capacity=1)
    (former,) = worker.take_leases(1)
    coordinator.evaluate(jobs[1])
    assert worker.expect(Cancel).kind == "eval"
    (current,) = worker.take_leases(1)
    assert worker.answer(former).outcome == "duplicate"
    assert not jobs[1].done
    assert worker.answer(current).outcome == "accepted"
    assert jobs[1].done


def test_evaluation_leases_survive_their_worker(start: Any, workers: Any) -> None:
    coordinator = start()
    lost, other = workers(coordinator, "lost"), workers(coordinator, "other")
    job = evaluation(0)
    coordinator.evaluate(job)
    lost.hello(capacity=1)
    lost.take_leases(1)
    coordinator.worker_ended("lost")
    other.hello(capacity=1)
    (lease,) = other.take_leases(1)
    assert lease.kind == "eval"
    other.answer(lease)
    assert job.done


def test_withdrawn_leases_stay_in_the_account(start: Any, workers: Any) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    leases = worker.take_leases(4)
    coordinator.withdraw()
    assert sorted(worker.expect(Cancel).leases) == [lease.lease for lease in leases]
    assert coordinator.schedule.in_flight == 4
    time.sleep(0.3)
    assert all(record.worker is None for record in coordinator.schedule.running())


def test_a_stall_ends_with_a_report_of_who_is_waited_for(start: Any, workers: Any) -> None:
    coordinator = start(run={"stall_timeout_s": 0.5})
    worker = workers(coordinator)
    worker.hello()
    worker.take_leases(4)
    with pytest.raises(StallError, match=r"waited .* s for a batch \(generation\)") as caught:
        next_batch(coordinator)
    assert "lease 0 with w0" in str(caught.value)
    assert "worker w0: last heard" in str(caught.value)


def test_groups_filtered_since_the_last_batch_are_counted_and_limited(start: Any, workers: Any) -> None:
    coordinator = start(schedule={"max_filtered_batches": 2})  # two times two groups
    worker = workers(coordinator)
    worker.hello()
    outcomes = [worker.answer(lease, correct=(False, False)).outcome for lease in worker.take_leases(3)]
    outcomes += [worker.answer(lease).outcome for lease in worker.take_leases(2)]
    assert outcomes == ["filtered_all_wrong"] * 3 + ["accepted"] * 2
    assert next_batch(coordinator) is not None
    coordinator.batch_trained()
    coordinator.announce(1)
    assert coordinator.arrivals().groups == 0
    for right in [(True, True)] * 3 + [(True, False)]:
        worker.answer(worker.take_leases(1)[0], correct=right, versions=(1, 1))
    assert coordinator.arrivals()[:4] == (4, 0, 3, 1)
    worker.answer(worker.take_leases(1)[0], correct=(True, True), versions=(1, 1))
    with pytest.raises(
        StallError, match=r"4 groups were filtered and no batch formed.*0 all wrong, 4 all right, 1 kept"
    ):
        next_batch(coordinator)


def test_an_evaluation_that_goes_on_is_no_stall(start: Any, workers: Any) -> None:
    """It may hold training up for longer than ``stall_timeout_s``; only silence is a stall."""
    coordinator = start(run={"stall_timeout_s": 1.0})
    worker = workers(coordinator)
    job = evaluation(*range(8))
    coordinator.evaluate(job)
    worker.hello()
    leases = [lease for lease in worker.take_leases(12) if lease.kind == "eval"]

    def tick(cause: str) -> None:  # about four times a second
        if leases:
            worker.answer(leases.pop())

    with pytest.raises(StallError):
        coordinator.next_batch(tick, lambda: False)
    assert job.done


def test_waiting_without_workers_has_its_own_name(start: Any) -> None:
    with pytest.raises(StallError, match=r"\(workers\)(.|\n)*no worker is connected"):
        next_batch(start(run={"stall_timeout_s": 0.3}))


def test_a_restored_hub_takes_what_was_sampled_before_and_nothing_of_a_future_that_is_gone(
    start: Any, workers: Any
) -> None:
    coordinator = start()
    worker = workers(coordinator)
    worker.hello()
    leases = worker.take_leases(4)
    worker.answer(leases[0])
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(coordinator.state()))

    again = make_coordinator(settings(), life="1")
    try:
        again.restore(state)
        again.start()
        assert (again.schedule.in_flight, again.schedule.buffered) == (3, 1)
        back = workers(again, "w0")
        back.hello(capacity=8, incarnation="run.0", holding=[1, 2, 3])
        back.expect(Welcome)
        assert back.answer(leases[1]).outcome == "accepted"  # complete before the learner died
        assert back.answer(leases[0]).outcome == "duplicate"
        assert back.answer(leases[2], versions=(0, 1)).outcome == "refused"  # version 1 is of the lost future
        drawn = next_batch(again)
        assert [rollout.lease for rollout in drawn.groups] == [0, 1]
        np.testing.assert_array_equal(drawn.groups[0].group.token_ids, np.arange(6))
        again.batch_trained()
        again.announce(1)
        # This life has a version 1 and a lease 4 of its own by now; those of the former life stay foreign.
        wait_until(lambda: again.schedule.leased > 4)
        for number, versions in ((3, (0, 1)), (4, (0, 0))):
            ack = back.answer(leases[3], lease=number, versions=versions)
            assert (ack.outcome, ack.detail.partition(":")[0]) == ("refused", "incarnation")
    finally:
        again.close()


def test_a_worker_ahead_of_the_checkpoint_is_leased_what_it_can_serve(start: Any, workers: Any) -> None:
    """It outlived a learner that had trained further than its last checkpoint: those weights are gone."""
    coordinator = start()
    worker = workers(coordinator)
    worker.hello(version=12)
    assert {lease.min_version for lease in worker.take_leases(4)} == {0}


def test_what_was_sampled_for_a_future_that_is_gone_does_not_stop_its_worker(start: Any, workers: Any) -> None:
    coordinator = start(schedule={"groups_per_batch": 4, "max_staleness": 1})
    worker = workers(coordinator)
    worker.hello()
    for lease in worker.take_leases(8):
        assert worker.answer(lease, incarnation="run.former", versions=(0, 9)).outcome == "refused"
    assert [worker.name for worker in coordinator.workers()] == ["w0"]
    coordinator.check()


def test_an_old_answer_does_not_take_a_lease_from_its_new_holder(start: Any, workers: Any) -> None:
    coordinator = start(schedule={"groups_per_batch": 1, "max_staleness": 1})
    slow, quick = workers(coordinator, "slow"), workers(coordinator, "quick")
    slow.hello(capacity=1)
    (lease,) = slow.take_leases(1)
    quick.hello(capacity=1)
    (other,) = quick.take_leases(1)
    quick.hello(capacity=0)  # no lease for it until it has the new weights
    assert quick.answer(other).outcome == "accepted"
    next_batch(coordinator)
    coordinator.batch_trained()
    coordinator.announce(1)
    coordinator.worker_ended("slow")
    quick.hello(capacity=1, version=1)
    (again,) = quick.take_leases(1)
    assert (again.lease, again.min_version) == (lease.lease, 1)
    slow.hello(capacity=0)
    assert slow.answer(lease).outcome == "duplicate"
    assert quick.answer(again, versions=(1, 1)).outcome == "accepted"


def test_cancellations_leave_by_the_thread_that_owns_the_socket(start: Any, workers: Any) -> None:
    """``withdraw``, ``evaluate`` and ``next_batch`` are called by the learner's thread, the coordinator's waits."""
    coordinator = start()
    senders: set[str] = set()
    send = coordinator._listener.send

    def spy(worker: bytes, frames: Any) -> bool:
        senders.add(threading.current_thread().name)
        return bool(send(worker, frames))

    coordinator._listener.send = spy  # type: ignore[method-assign]
    worker = workers(coordinator)
    worker.hello()
    worker.take_leases(4)
    coordinator.withdraw()
    worker.expect(Cancel)
    assert senders == {"coordinator"}


def test_a_group_that_an_older_release_saved_is_read() -> None:
    """Up to protocol 5 a group told how long it took."""
    group = Group(
        lease=3,
        incarnation="run.0",
        completions=[Completion(num_tokens=2, spans=[(1, 2)], finish="stop", correct=True)],
        token_ids=np.array([4, 5], np.int32),
        logprobs=np.array([-1.0, -2.0], np.float32),
    )
    head, *arrays = [bytes(frame) for frame in Codec(FROM_WORKER).encode(group)]
    fields = msgspec.msgpack.decode(head) | {"protocol": 5, "seconds": 1.5}
    saved = {"position": 7, "worker": "w0", "frames": [msgspec.msgpack.encode(fields), *arrays]}
    rollout = GroupStore(Prompts()).decode(saved)
    assert (rollout.lease, rollout.position, rollout.worker, rollout.correct) == (3, 7, "w0", [True])
    np.testing.assert_array_equal(rollout.group.logprobs, [-1.0, -2.0])


def test_counts_of_an_older_release_are_read() -> None:
    """They stood in three places, and a duplicate in two of them."""
    coordinator = make_coordinator(settings())
    state = coordinator.state()
    del state["counts"]
    state |= {"tally": {"groups": 9}, "drops": {"duplicate": 2, "refused_spans": 1}, "workers_lost": 4}
    del state["schedule"]["counts"]
    state["schedule"] |= {"settled": {"trained": 8}, "events": {"duplicate": 2}}
    coordinator.restore(state)
    counts = coordinator.counts()
    coordinator._listener.close()
    assert {name: counts[name] for name in ("groups", "duplicate", "refused_spans", "workers_lost", "trained")} == {
        "groups": 9, "duplicate": 2, "refused_spans": 1, "workers_lost": 4, "trained": 8,
    }  # fmt: skip
