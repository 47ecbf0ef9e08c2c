"""The worker against a real listener. The learner's side is spoken by the test, in the order a learner might say it."""

import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dapo_async.config import settings as config
from dapo_async.config.toml import build_config, plain
from dapo_async.demo.demo import make_model, make_tokenizer
from dapo_async.errors import ConfigError, DapoError
from dapo_async.system.background import Background
from dapo_async.transport.messages import (
    FROM_LEARNER,
    FROM_WORKER,
    Ack,
    Beat,
    Cancel,
    Codec,
    Group,
    Hello,
    Lease,
    Message,
    Refused,
    Released,
    Stop,
    Welcome,
)
from dapo_async.transport.sockets import Listener
from dapo_async.weight_sync.encoding import serving_tensors
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.subscriber import Subscriber
from tests import ROOT
from workers import connection
from workers.connection import Connection, seen_from_here
from workers.rollout import Rollout
from workers.start import main

DEADLINE_S = 60.0
SMALL = config.Demo(hidden_size=32, layers=1)
SETTINGS: dict[str, Any] = {
    "data": {"train": "unused", "max_prompt_tokens": 8},
    "sampling": {"group_size": 4, "max_tokens": 6, "stop_token_ids": [1]},
    "schedule": {"groups_per_batch": 2, "max_staleness": 1},
    "reward": {"verifier": "sums"},
    "workers": {"slots": 3, "prefetch_groups": 1},
    "network": {"heartbeat_s": 0.1, "silence_s": 20.0},
}


class Learner:
    """A learner's end of the control socket."""

    def __init__(self) -> None:
        self.listener = Listener("tcp://127.0.0.1:*", max_message_bytes=1 << 24)
        self.encoder, self.decoder = Codec(FROM_LEARNER), Codec(FROM_WORKER)
        self.peer = b""

    def say(self, message: Message) -> None:
        assert self.listener.send(self.peer, self.encoder.encode(message))

    def expect(self, kind: type[Any], where: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message of this kind; its arrays are copies."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            received = self.listener.receive(timeout_s=0.1)
            if received is None:
                continue
            self.peer = received[0]
            message = self.decoder.decode(received[1])
            if isinstance(message, kind) and where(message):
                return message
        raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def learner() -> Iterator[Learner]:
    made = Learner()
    yield made
    made.listener.close()


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A tiny model with random weights, and settings for it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, SMALL).save_pretrained(folder)
    return build_config({**SETTINGS, "model": {"path": str(folder)}}, "test")


@pytest.fixture
def draining_cfg(cfg: config.Config) -> config.Config:
    """The same, for a worker that lets completions end before it swaps; slow, so that weights come while it decodes."""
    workers = msgspec.structs.replace(cfg.workers, in_flight=False, step_delay_s=0.05)
    return msgspec.structs.replace(cfg, workers=workers)


@pytest.fixture
def publisher(cfg: config.Config) -> Iterator[Publisher]:
    made = Publisher("tcp://127.0.0.1:*", incarnation="run.0", max_message_bytes=1 << 24, heartbeat_s=0.1)
    torch.manual_seed(0)
    model = make_model(make_tokenizer(), SMALL)
    made.publish(3, serving_tensors(model, torch.float32))
    yield made
    made.close()


class Worker:
    """A worker in a thread of this process, and how it ended."""

    def __init__(self, address: str) -> None:
        self.rollout = Rollout(address, "w0")
        self.error: DapoError | None = None
        self.thread = Background("worker", self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.rollout.run()
        except DapoError as error:
            self.error = error

    def end(self) -> DapoError | None:
        """Wait for its end; the error that a user would read, if any."""
        self.thread.join(DEADLINE_S)
        return self.error


@pytest.fixture
def worker(learner: Learner, publisher: Publisher, cfg: config.Config) -> Iterator[Worker]:
    """A worker that has joined ``learner`` and serves the published weights."""
    made = Worker(learner.listener.address)
    try:
        assert learner.expect(Hello).capacity == 0
        learner.say(Welcome(incarnation="run.0", weights_address=publisher.address, config=plain(cfg)))
        assert learner.expect(Hello, lambda hello: hello.capacity).capacity == 2  # 3 slots by 4, and one to fetch ahead
        learner.expect(Beat, lambda beat: beat.version == 3)
        yield made
    finally:
        made.rollout.stop("the test is over")
        made.end()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {DEADLINE_S:g} s"
        time.sleep(0.01)


def lease(number: int = 0, prompt_tokens: int = 5, **changes: Any) -> Lease:
    facts: dict[str, Any] = {
        "lease": number,
        "incarnation": "run.0",
        "truth": "7",
        "prompt_ids": np.arange(3, 3 + prompt_tokens, dtype=np.int32),
        "num_samples": 4,
        "seed": number,
        "min_version": 3,
        "max_tokens": 6,
        "temperature": 1.0,
    }
    return Lease(**facts | changes)


# --- a process: signals and refusals ---------------------------------------------------------------------


def start(address: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "workers.start", "--connect", address, "--name", "w0"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_worker_that_waits_for_a_learner(number: signal.Signals) -> None:
    with start("tcp://127.0.0.1:9") as process:
        try:
            assert process.stderr is not None
            assert "worker w0 is waiting for a learner at tcp://127.0.0.1:9" in process.stderr.readline()
            process.send_signal(number)
            assert process.wait(timeout=connection.KNOCK_S / 20) == 0
            [last] = process.stderr.read().splitlines()
            assert last.endswith(f"ends: {number.name}")
        finally:
            process.kill()


def test_an_address_that_is_none_is_refused_in_one_sentence() -> None:
    with start("foo") as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert re.fullmatch('.* ERROR cannot connect to "foo": .*; an address looks like "tcp://.*"\n', errors)
    assert process.returncode == 2


def test_a_learner_that_never_answers(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "KNOCK_S", 0.3)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process are pytest's
    place = learner.listener.address
    with caplog.at_level(logging.INFO):
        assert main(["--connect", place, "--name", "w0"]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"worker w0 is waiting for a learner at {place}",
        f"worker w0 waited 0.3 s for a learner at {place}",
    ]


@pytest.mark.parametrize("readable", [True, False])
def test_who_answers_but_is_no_learner_of_this_release_is_told_from_silence(learner: Learner, readable: bool) -> None:
    """For example the learner's weights socket, which refuses every hello."""
    made = Worker(learner.listener.address)
    learner.expect(Hello)
    if readable:
        learner.say(Refused(reason="unexpected", detail="Hello is not for a publisher"))
    else:
        learner.listener.send(learner.peer, [b"\x00 of another release"])
    error = made.end()
    assert isinstance(error, ConfigError)
    assert re.match(
        rf"{learner.listener.address} refuses this worker: .+; --connect must name the learner's network\.control, and "
        "both need the same release",
        str(error),
    )


def test_a_learner_that_comes_back_with_other_rewards_does_not_get_answers_judged_by_the_old_ones(
    worker: Worker, learner: Learner, publisher: Publisher, cfg: config.Config
) -> None:
    settings = plain(cfg)
    settings["workers"]["count"] = 7  # no answer depends on it
    settings["schedule"]["max_staleness"] = 5
    learner.say(Welcome(incarnation="run.1", weights_address=publisher.address, config=settings))
    wait_until(lambda: worker.rollout._incarnation == "run.1")
    settings["reward"]["verifier"] = "exact"
    settings["sampling"]["stop_token_ids"] = [2]
    learner.say(Welcome(incarnation="run.2", weights_address=publisher.address, config=settings))
    error = worker.end()
    assert isinstance(error, ConfigError)
    assert "other settings for its workers (sampling.stop_token_ids, reward.verifier): start this" in str(error)


# --- the normal course, and how it ends ------------------------------------------------------------------


def test_a_group_larger_than_the_slots_is_answered_whole(worker: Worker, learner: Learner) -> None:
    learner.say(lease(0))
    learner.say(lease(0))  # once more: it is answered once
    learner.say(lease(1))
    num_tokens = 0
    for number in (0, 1):
        group = learner.expect(Group)
        num_tokens += len(group.token_ids)
        assert (group.lease, group.incarnation, len(group.completions)) == (number, "run.0", 4)
        assert all(completion.spans == [(3, completion.num_tokens)] for completion in group.completions)
        learner.say(Ack(lease=number, outcome="accepted"))
    # Nothing is under way any more, so every token came from a counted step.
    beat = learner.expect(Beat, lambda beat: beat.decode.rows == num_tokens)
    assert beat.decode.rows <= 3 * beat.decode.steps  # slots
    assert beat.decode.rows_squared >= beat.decode.rows
    assert 0.0 < beat.decode.seconds <= beat.decode.rows_seconds
    learner.say(Stop(reason="done"))
    assert worker.end() is None


def test_unanswered_leases_go_back_when_it_is_asked_to_end(worker: Worker, learner: Learner) -> None:
    learner.say(lease(4, min_version=9))  # waits for weights that never come
    learner.say(lease(2, min_version=9))
    learner.say(lease(7, min_version=9))
    learner.say(lease(8, min_version=9, kind="eval"))
    learner.say(Cancel(leases=[7]))
    learner.say(lease(1))
    learner.expect(Group)  # hence the others have arrived
    worker.rollout.stop("SIGTERM")
    released = learner.expect(Released)
    assert released.reason == "SIGTERM"
    assert worker.end() is None


def test_no_newer_weights_until_the_evaluation_of_these_is_acknowledged(
    worker: Worker, learner: Learner, publisher: Publisher
) -> None:
    learner.say(lease(0, kind="eval"))
    answer = learner.expect(Group)
    publisher.publish(5, serving_tensors(make_model(make_tokenizer(), SMALL), torch.float32))
    wait_until(lambda: worker.rollout._subscriber._newest is not None)  # they are there
    learner.say(lease(1))
    group = learner.expect(Group)
    for completion in (*answer.completions, *group.completions):
        assert completion.spans == [(3, completion.num_tokens)]
    learner.say(Ack(lease=1, outcome="accepted"))
    learner.say(lease(2, min_version=5))  # training that needs them does not wait for ever
    learner.say(Ack(lease=0, kind="eval", outcome="accepted"))
    group = learner.expect(Group)
    assert all(completion.spans == [(5, completion.num_tokens)] for completion in group.completions)


def test_an_evaluation_lease_of_older_weights_is_dropped_and_one_of_newer_ones_waits(
    worker: Worker, learner: Learner, publisher: Publisher
) -> None:
    learner.say(lease(0, kind="eval", min_version=2))
    learner.say(lease(1, kind="eval", min_version=5))
    learner.expect(Beat, lambda beat: beat.holding == [("eval", 1)])
    publisher.publish(5, serving_tensors(make_model(make_tokenizer(), SMALL), torch.float32))
    group = learner.expect(Group)
    assert (group.lease, group.kind) == (1, "eval")
    assert all(completion.spans == [(5, completion.num_tokens)] for completion in group.completions)


def test_draining_ends_what_runs_starts_nothing_and_evaluates_first(
    learner: Learner, publisher: Publisher, draining_cfg: config.Config
) -> None:
    newer = serving_tensors(make_model(make_tokenizer(), SMALL), torch.float32)
    worker = Worker(learner.listener.address)
    try:
        learner.expect(Hello)
        welcome = Welcome(incarnation="run.0", weights_address=publisher.address, config=plain(draining_cfg))
        learner.say(welcome)
        learner.expect(Beat, lambda beat: beat.version == 3)
        learner.say(lease(0))
        wait_until(lambda: worker.rollout._engine.running > 0)
        publisher.publish(5, newer)
        wait_until(lambda: worker.rollout._draining)
        learner.say(lease(1))  # these weights could answer it, but the next ones shall
        first, second = learner.expect(Group), learner.expect(Group)
        assert {span[0][0] for span in spans(first)} == {3}
        assert {span[0][0] for span in spans(second)} == {5}
        assert {len(span) for span in spans(first) + spans(second)} == {1}
        learner.say(lease(2))
        wait_until(lambda: worker.rollout._engine.running > 0)
        publisher.publish(6, newer)
        wait_until(lambda: worker.rollout._draining)
        learner.say(lease(3, kind="eval", min_version=5))  # of the weights in service: no swap may overtake it
        groups = [learner.expect(Group), learner.expect(Group)]
        assert {span[0][0] for group in groups for span in spans(group)} == {5}
    finally:
        worker.rollout.stop("the test is over")
        assert worker.end() is None


def test_draining_takes_nothing_that_comes_between_two_looks(
    learner: Learner, publisher: Publisher, draining_cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(learner.listener.address)
    try:
        learner.expect(Hello)
        learner.say(Welcome(incarnation="run.0", weights_address=publisher.address, config=plain(draining_cfg)))
        learner.expect(Beat, lambda beat: beat.version == 3)
        monkeypatch.setattr(Subscriber, "has_newer", False)  # as if it came just after the look
        learner.say(lease(0))
        wait_until(lambda: worker.rollout._engine.running > 0)
        publisher.publish(5, serving_tensors(make_model(make_tokenizer(), SMALL), torch.float32))
        assert {len(span) for span in spans(learner.expect(Group))} == {1}
    finally:
        worker.rollout.stop("the test is over")
        assert worker.end() is None


def spans(group: Group) -> list[list[tuple[int, int]]]:
    return [completion.spans for completion in group.completions]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt_tokens": 9}, r"prompt \(9 tokens\) and max_tokens \(6\) .* longest sequence \(14 tokens\)"),
        ({"prompt_ids": np.array([500], np.int32)}, "must be token ids in 0 .. "),
    ],
)
def test_a_lease_that_the_engine_refuses_ends_it_with_a_sentence(
    worker: Worker, learner: Learner, changes: dict[str, Any], problem: str
) -> None:
    learner.say(lease(6, **changes))
    error = worker.end()
    assert isinstance(error, ConfigError)
    assert re.match(f"the engine cannot serve train lease 6: .*{problem}", str(error))


def test_stop_instead_of_a_welcome(learner: Learner) -> None:
    worker = Worker(learner.listener.address)
    learner.expect(Hello)
    learner.say(Stop(reason="the run has ended"))
    assert str(worker.end()) == f"the learner at {learner.listener.address} says stop: the run has ended"


TAKEN = Refused(reason="name_taken", detail="a worker named w0 is connected already")


def test_a_name_that_is_taken_ends_it_as_the_users_mistake(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process are pytest's
    codes: list[int] = []
    thread = Background("worker", lambda: codes.append(main(["--connect", learner.listener.address, "--name", "w0"])))
    thread.start()
    learner.expect(Hello)
    learner.say(TAKEN)
    thread.join(DEADLINE_S)
    assert codes == [2]
    assert caplog.records[-1].getMessage() == (
        f"the learner at {learner.listener.address} refuses worker w0: a worker named w0 is connected already"
    )


def test_a_name_that_was_taken_meanwhile_ends_it_too(worker: Worker, learner: Learner) -> None:
    learner.say(TAKEN)
    assert isinstance(worker.end(), ConfigError)


def test_a_model_that_this_machine_does_not_have(learner: Learner, cfg: config.Config, tmp_path: Path) -> None:
    worker = Worker(learner.listener.address)
    learner.expect(Hello)
    settings = plain(cfg) | {"model": {"path": str(tmp_path)}}
    learner.say(Welcome(incarnation="run.0", weights_address="tcp://127.0.0.1:9", config=settings))
    error = worker.end()
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f'model.path = "{tmp_path}" holds no tokenizer that transformers can load: ')


# --- where the weights are -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "connected_to", "expected"),
    [
        ("tcp://0.0.0.0:7", "tcp://node1:5", "tcp://node1:7"),
        ("tcp://[::]:7", "tcp://10.0.0.1:5", "tcp://10.0.0.1:7"),
        ("tcp://*:7", "tcp://10.0.0.1:5", "tcp://10.0.0.1:7"),
        ("tcp://127.0.0.1:7", "tcp://[fd00::1]:5", "tcp://[fd00::1]:7"),
        ("tcp://localhost:7", "tcp://node1:5", "tcp://node1:7"),
        ("tcp://[::1]:7", "tcp://node1:5", "tcp://node1:7"),
        ("tcp://[::ffff:127.0.0.1]:7", "tcp://node1:5", "tcp://node1:7"),
        ("tcp://10.0.0.2:7", "tcp://10.0.0.1:5", "tcp://10.0.0.2:7"),  # a host of its own is kept
        ("tcp://0.0.0.0:7", "tcp://0.0.0.0:5", "tcp://0.0.0.0:7"),  # the same machine
        ("tcp://127.0.0.1:7", "tcp://localhost:5", "tcp://127.0.0.1:7"),
    ],
)
def test_seen_from_here(address: str, connected_to: str, expected: str) -> None:
    assert seen_from_here(address, connected_to) == expected


def test_every_welcome_names_an_address_that_works_here(learner: Learner) -> None:
    worker = Connection(learner.listener.address, "w0")
    try:
        worker.introduce(engine="", capacity=0, version=-1)
        learner.expect(Hello)
        worker._address = "tcp://node1:5"  # as if it had come from another machine
        learner.say(Welcome(incarnation="run.0", weights_address="tcp://0.0.0.0:7", config={}))
        [welcome] = worker.messages(timeout_s=DEADLINE_S)
        assert isinstance(welcome, Welcome)
        assert welcome.weights_address == "tcp://node1:7"
    finally:
        worker.close()


def test_weights_that_do_not_fit_are_told_with_the_reason_until_some_do(
    worker: Worker, learner: Learner, publisher: Publisher
) -> None:
    good = serving_tensors(make_model(make_tokenizer(), SMALL), torch.float32)
    name = next(iter(good))
    publisher.publish(5, {**good, name: torch.full_like(good[name], float("inf"))})
    told = learner.expect(Beat, lambda beat: beat.refusal)
    assert told.refusal == f"5: {name} holds values that are not finite"
    assert (told.version, told.refused_weights) == (3, 1)
    publisher.publish(6, good)
    assert learner.expect(Beat, lambda beat: beat.version == 6).refusal == ""
