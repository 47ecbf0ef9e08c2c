"""Publisher and subscriber as a real pair of threads over loopback, and the publisher against odd workers."""

import threading
from collections.abc import Iterator

import pytest
import torch

from dapo_async.errors import ConfigError, DapoError, WeightsError
from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsRequest, WeightsUnchanged
from dapo_async.transport.sockets import ZERO_COPY_BYTES, Dialer
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.subscriber import Subscriber
from tests.weight_sync.weights_pair import (
    LIMIT,
    PATIENCE_S,
    assert_version,
    encoded,
    make_publisher,
    num_pushes,
    push_frames,
    running,
    subscribe,
    tensors_of,
    until,
)


@pytest.fixture(params=["full", "delta", "shm"])
def publisher(request: pytest.FixtureRequest) -> Iterator[Publisher]:
    with running(make_publisher(way=request.param)) as made:
        yield made


@pytest.fixture
def subscriber(publisher: Publisher) -> Iterator[Subscriber]:
    with running(subscribe(publisher.address)) as made:
        yield made


# --- the pair --------------------------------------------------------------------------------------------


def test_each_published_version_arrives_once(publisher: Publisher, subscriber: Subscriber) -> None:
    assert subscriber.newest() is None
    for version in (0, 1, 5):
        publisher.publish(version, tensors_of(version))
        assert_version(subscriber.wait_first(PATIENCE_S), version)
        assert subscriber.newest() is None
        assert publisher.published == version
    until(lambda: num_pushes(publisher) == 3)
    counts = publisher.counts
    assert (counts.published, subscriber.refused) == (3, 0)
    assert counts.sent_bytes == counts.full * (ZERO_COPY_BYTES + 4)


def test_a_late_joiner_gets_the_newest_only(publisher: Publisher) -> None:
    for version in range(4):
        publisher.publish(version, tensors_of(version))
    until(lambda: publisher.published == 3)
    late = subscribe(publisher.address)
    assert_version(late.wait_first(PATIENCE_S), 3)
    late.close()


def test_a_worker_that_does_not_look_skips_versions(publisher: Publisher, subscriber: Subscriber) -> None:
    for version in range(5):
        publisher.publish(version, tensors_of(version))
        until(lambda version=version: publisher.published == version)  # type: ignore[misc]
    until(lambda: subscriber._have == 4)
    newest = subscriber.newest()
    assert newest is not None
    assert_version(newest, 4)
    assert subscriber.newest() is None


def test_a_worker_that_does_not_read_is_sent_one_set_and_harms_nobody(publisher: Publisher) -> None:
    codec = Codec(ON_WEIGHTS)
    with Dialer(publisher.address, max_message_bytes=LIMIT) as sleeper:
        assert sleeper.send(
            codec.encode(WeightsRequest(worker="sleeper", reader="r", incarnation="life", have=-1)), PATIENCE_S
        )
        publisher.publish(0, tensors_of(0))
        until(lambda: num_pushes(publisher) == 1)
        awake = subscribe(publisher.address)
        for version in range(1, 6):
            publisher.publish(version, tensors_of(version))
            until(lambda version=version: awake._have == version)  # type: ignore[misc]
        awake.close()
        received = sleeper.receive(PATIENCE_S)
        assert received is not None
        assert codec.decode(received).version == 0
        assert sleeper.receive(0.15) is None


def test_publishing_never_waits_for_workers_and_the_newest_wins(publisher: Publisher) -> None:
    for version in range(200):
        publisher.publish(version, tensors_of(version))
    until(lambda: publisher.published == 199)
    counts = publisher.counts
    assert counts.published + counts.superseded == 200
    assert num_pushes(publisher) == 0


def test_several_workers_are_served_alike(publisher: Publisher) -> None:
    workers = [subscribe(publisher.address) for _ in range(4)]
    publisher.publish(7, tensors_of(7))
    for worker in workers:
        assert_version(worker.wait_first(PATIENCE_S), 7)
        worker.close()


def test_an_arrival_is_announced(publisher: Publisher) -> None:
    arrived = threading.Event()
    worker = Subscriber(
        publisher.address,
        worker="w",
        incarnation="life",
        max_message_bytes=LIMIT,
        heartbeat_s=1.0,
        on_arrival=arrived.set,
    )
    publisher.publish(0, tensors_of(0))
    assert arrived.wait(timeout=PATIENCE_S)
    assert worker.newest() is not None
    worker.close()


def test_another_life_of_the_learner_at_the_same_address() -> None:
    """Without ``restart`` its weights are refused; with it, its lower version is served."""
    first = make_publisher(incarnation="life.0")
    worker = subscribe(first.address, incarnation="life.0")
    first.publish(9, tensors_of(9))
    assert_version(worker.wait_first(PATIENCE_S), 9)
    address = first.address
    first.close()
    second = make_publisher(address, incarnation="life.1")
    second.publish(4, tensors_of(4))
    worker.restart(address, "life.1")
    assert_version(worker.wait_first(PATIENCE_S), 4)
    worker.restart(address, "life.0")
    until(lambda: worker.refusals["incarnation"] >= 2)
    assert worker.newest() is None
    worker.check()
    worker.close()
    second.close()


def test_what_was_not_taken_before_a_restart_is_forgotten(publisher: Publisher, subscriber: Subscriber) -> None:
    publisher.publish(9, tensors_of(9))
    until(lambda: subscriber._have == 9)
    other = make_publisher(incarnation="other")
    subscriber.restart(other.address, "other")
    assert subscriber.newest() is None
    other.close()


def test_nothing_but_signs_of_life_waits_for_the_heartbeat() -> None:
    made = make_publisher(heartbeat_s=3600.0)
    worker = subscribe(made.address, heartbeat_s=3600.0)
    for version in range(3):
        made.publish(version, tensors_of(version))
        assert_version(worker.wait_first(PATIENCE_S), version)
    made.close(PATIENCE_S)
    worker.close(PATIENCE_S)


def test_a_learner_that_comes_back_unnoticed_is_asked_again() -> None:
    """Same address and name, but the open request was lost: silence makes the subscriber ask anew."""
    first = make_publisher()
    worker = subscribe(first.address, grace_s=0.1)
    first.publish(0, tensors_of(0))
    assert_version(worker.wait_first(PATIENCE_S), 0)
    address = first.address
    first.close()
    second = make_publisher(address)
    second.publish(1, tensors_of(1))
    assert_version(worker.wait_first(PATIENCE_S), 1)
    worker.close()
    second.close()


# --- the publisher against workers that misbehave --------------------------------------------------------


def test_malformed_requests_are_refused_counted_and_answered(publisher: Publisher, subscriber: Subscriber) -> None:
    codec = Codec(ON_WEIGHTS)
    messages = [[b"junk"], [b""], encoded(WeightsUnchanged()), push_frames(1)]
    with Dialer(publisher.address, max_message_bytes=LIMIT) as dialer:
        for message, reason in zip(messages, ["malformed", "malformed", "unexpected", "unexpected"], strict=True):
            assert dialer.send(message, PATIENCE_S)
            answer = dialer.receive(PATIENCE_S)
            assert answer is not None
            assert codec.decode(answer).reason == reason
    assert publisher.counts.refused == 4
    publisher.publish(0, tensors_of(0))
    assert_version(subscriber.wait_first(PATIENCE_S), 0)


def test_a_request_from_another_life_is_served_though_its_version_is_higher(publisher: Publisher) -> None:
    codec = Codec(ON_WEIGHTS)
    publisher.publish(1, tensors_of(1))
    with Dialer(publisher.address, max_message_bytes=LIMIT) as dialer:
        assert dialer.send(encoded(WeightsRequest(worker="w", reader="r", incarnation="past", have=8)), PATIENCE_S)
        until(lambda: num_pushes(publisher) == 1)
        answer = dialer.receive(PATIENCE_S)
        while answer is not None and isinstance(message := codec.decode(answer), WeightsUnchanged):
            answer = dialer.receive(PATIENCE_S)
        assert (message.version, message.incarnation) == (1, "life")


def test_workers_that_vanish_are_forgotten(publisher: Publisher) -> None:
    worker = subscribe(publisher.address)
    until(lambda: len(publisher._parked) == 1)
    worker.close()
    until(lambda: not publisher._parked)
    assert publisher.counts.undelivered == 1


def test_versions_must_rise(publisher: Publisher) -> None:
    publisher.publish(3, tensors_of(3))
    for version in (3, 2):
        with pytest.raises(WeightsError, match=f"{version} was published after 3"):
            publisher.publish(version, tensors_of(version))


def test_a_tensor_beyond_the_message_limit_names_the_setting(publisher: Publisher) -> None:
    with pytest.raises(ConfigError, match=r"network\.max_message_mb = 1 is too small .*big has 1\.1 MiB"):
        publisher.publish(0, tensors_of(0, size=11 * LIMIT // 10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_encoder_is_told_by_check() -> None:
    made = make_publisher()
    made.publish(0, {"counts": torch.ones(3, dtype=torch.int64)})
    until(lambda: "weights encoder" not in {thread.name for thread in threading.enumerate()})
    with pytest.raises(DapoError, match="weights encoder thread ended: WeightsError: counts cannot be published"):
        made.check()
    made.close()


def test_a_taken_port_is_refused_and_leaves_no_thread(publisher: Publisher) -> None:
    with pytest.raises(ConfigError, match="another process listens there"):
        make_publisher(publisher.address)
