"""Publisher and subscriber as a real pair of threads over loopback, and each against a peer that misbehaves."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dapo_async.channels import ZERO_COPY_BYTES, Dialer, Listener
from dapo_async.errors import ConfigError, DapoError, StallError, WeightsError
from dapo_async.protocol import ON_WEIGHTS, Codec, Refused, WeightsPush, WeightsRequest, WeightsUnchanged
from dapo_async.publisher import Publisher
from dapo_async.subscriber import Subscriber
from dapo_async.weights import encode_weights

LIMIT = 1 << 20
PATIENCE_S = 30.0
Answer = list[bytes]


def tensors_of(version: int, size: int = ZERO_COPY_BYTES) -> dict[str, Tensor]:
    return {"big": torch.full((size // 4,), float(version)), "small": torch.tensor([float(version)])}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def make_publisher(
    address: str = "tcp://127.0.0.1:*", incarnation: str = "life", heartbeat_s: float = 0.05
) -> Publisher:
    return Publisher(address, incarnation=incarnation, max_message_bytes=LIMIT, heartbeat_s=heartbeat_s)


def subscribe(address: str, incarnation: str = "life", **settings: float) -> Subscriber:
    settings = {"heartbeat_s": 0.05, "grace_s": 30.0, "retry_s": 0.01, **settings}
    return Subscriber(address, worker="w", incarnation=incarnation, max_message_bytes=LIMIT, **settings)  # type: ignore[arg-type]


def assert_version(received: tuple[int, dict[str, Tensor]], version: int) -> None:
    assert received[0] == version
    assert set(received[1]) == {"big", "small"}
    for name, tensor in tensors_of(version).items():
        assert torch.equal(received[1][name], tensor)


@pytest.fixture(scope="module", autouse=True)
def _collector_of_sent_frames() -> None:
    """pyzmq starts one daemon thread at the first large send and keeps it: before any test counts threads."""
    with (
        Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener,
        Dialer(listener.address, max_message_bytes=LIMIT) as dialer,
    ):
        assert dialer.send([bytes(ZERO_COPY_BYTES)], PATIENCE_S)
        assert listener.receive(PATIENCE_S) is not None


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = make_publisher()
    yield made
    made.check()
    made.close()


@pytest.fixture
def subscriber(publisher: Publisher) -> Iterator[Subscriber]:
    made = subscribe(publisher.address)
    yield made
    made.check()
    made.close()


# --- the pair --------------------------------------------------------------------------------------------


def test_each_published_version_arrives_once(publisher: Publisher, subscriber: Subscriber) -> None:
    assert subscriber.newest() is None
    for version in (0, 1, 5):
        publisher.publish(version, tensors_of(version))
        assert_version(subscriber.wait_first(PATIENCE_S), version)
        assert subscriber.newest() is None
        assert publisher.published == version
        until(lambda version=version: publisher.pushed_versions == {"w": version})  # type: ignore[misc]
    assert (publisher.counts.pushes, publisher.counts.published, subscriber.refused) == (3, 3, 0)
    assert publisher.counts.pushed_bytes == 3 * (ZERO_COPY_BYTES + 4)


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
    until(lambda: publisher.pushed_versions.get("w") == 4 and subscriber._have == 4)
    newest = subscriber.newest()
    assert newest is not None
    assert_version(newest, 4)
    assert subscriber.newest() is None


def test_a_worker_that_does_not_read_is_sent_one_set_and_harms_nobody(publisher: Publisher) -> None:
    codec = Codec(ON_WEIGHTS)
    with Dialer(publisher.address, max_message_bytes=LIMIT) as sleeper:
        assert sleeper.send(codec.encode(WeightsRequest(worker="sleeper", incarnation="life", have=-1)), PATIENCE_S)
        publisher.publish(0, tensors_of(0))
        until(lambda: "sleeper" in publisher.pushed_versions)
        awake = subscribe(publisher.address)
        for version in range(1, 6):
            publisher.publish(version, tensors_of(version))
            until(lambda version=version: publisher.pushed_versions.get("w") == version)  # type: ignore[misc]
        awake.close()
        assert publisher.pushed_versions["sleeper"] == 0
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
    assert counts.pushes == 0


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


# --- the subscriber against a publisher that misbehaves --------------------------------------------------


def flipped(frames: Answer) -> Answer:
    frames[1] = bytes([frames[1][0] ^ 1]) + frames[1][1:]
    return frames


def truncated(frames: Answer) -> Answer:
    frames[1] = frames[1][:-4]
    return frames


def missing(frames: Answer) -> Answer:
    return frames[:-1]


def renamed(frames: Answer) -> Answer:
    frames[0] = frames[0].replace(b"small", b"smell")
    return frames


def garbled(frames: Answer) -> Answer:
    return [b"\xc1" + frames[0], *frames[1:]]


def other_learner(frames: Answer) -> Answer:
    frames[0] = frames[0].replace(b"life", b"lief")
    return frames


def other_protocol(frames: Answer) -> Answer:
    assert b"\xa8protocol\x01" in frames[0]
    frames[0] = frames[0].replace(b"\xa8protocol\x01", b"\xa8protocol\x02")
    return frames


def older(frames: Answer) -> Answer:
    return push_frames(2)


def not_for_it(frames: Answer) -> Answer:
    return encoded(WeightsRequest(worker="w", incarnation="life", have=0))


def turned_down(frames: Answer) -> Answer:
    return encoded(Refused(reason="malformed", detail="what you said"))


def encoded(message: WeightsRequest | WeightsPush | WeightsUnchanged | Refused) -> Answer:
    return [bytes(frame) for frame in Codec(ON_WEIGHTS).encode(message)]


def push_frames(version: int) -> Answer:
    push, frames = encode_weights(version, tensors_of(version), "life")
    return [*encoded(push), *(bytes(frame) for frame in frames)]


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (flipped, "mismatch"),
        (truncated, "mismatch"),
        (missing, "mismatch"),
        (renamed, "mismatch"),
        (garbled, "malformed"),
        (other_learner, "incarnation"),
        (other_protocol, "protocol"),
        (older, "older"),
        (not_for_it, "unexpected"),
        (turned_down, "request"),
    ],
)
def test_what_does_not_pass_is_refused_counted_and_asked_for_again(
    tamper: Callable[[Answer], Answer], reason: str
) -> None:
    codec = Codec(ON_WEIGHTS)
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener:
        worker = subscribe(listener.address)

        def answer(frames: Answer, have: int) -> None:
            received = listener.receive(PATIENCE_S)
            assert received is not None
            assert codec.decode(received[1]) == WeightsRequest(worker="w", incarnation="life", have=have)
            assert listener.send(received[0], frames)

        answer(push_frames(2), have=-1)
        assert_version(worker.wait_first(PATIENCE_S), 2)
        answer(tamper(push_frames(3)), have=2)
        answer(tamper(push_frames(3)), have=2)
        answer(push_frames(3), have=2)
        assert_version(worker.wait_first(PATIENCE_S), 3)
        assert dict(worker.refusals) == {reason: 2}
        assert worker.refused == 2
        worker.check()
        worker.close()


def test_heartbeats_keep_a_request_open_and_silence_ends_it() -> None:
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener:
        worker = subscribe(listener.address, heartbeat_s=0.05, grace_s=0.45)
        received = listener.receive(PATIENCE_S)
        assert received is not None
        for _ in range(24):  # twice the patience, spoken through
            assert listener.send(received[0], encoded(WeightsUnchanged(version=-1)))
            assert listener.receive(0.05) is None
        again = listener.receive(PATIENCE_S)
        assert again is not None
        assert again[0] != received[0]
        worker.close()


def test_waiting_in_vain_for_the_first_weights_is_a_named_stall(publisher: Publisher, subscriber: Subscriber) -> None:
    with pytest.raises(StallError, match=r"worker w waited 0\.05 s for its first weights from tcp://127\.0\.0\.1"):
        subscriber.wait_first(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_subscriber_is_told_by_check_and_by_waiting() -> None:
    worker = subscribe("tcp://nowhere")
    with pytest.raises(DapoError, match="weights subscriber thread ended: ConfigError: cannot connect"):
        worker.wait_first(PATIENCE_S)
    with pytest.raises(DapoError, match="weights subscriber"):
        worker.check()
    worker.close()


# --- the publisher against workers that misbehave --------------------------------------------------------


def test_malformed_requests_are_refused_counted_and_answered(publisher: Publisher, subscriber: Subscriber) -> None:
    codec = Codec(ON_WEIGHTS)
    messages = [[b"junk"], [b""], encoded(WeightsUnchanged(version=1)), push_frames(1)]
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
        assert dialer.send(encoded(WeightsRequest(worker="w", incarnation="past", have=8)), PATIENCE_S)
        until(lambda: publisher.pushed_versions == {"w": 1})
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
