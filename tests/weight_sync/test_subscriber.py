"""The subscriber against publishers that misbehave: refused, counted, asked for again."""

from collections.abc import Callable, Iterator

import pytest

from dapo_async.errors import DapoError, StallError
from dapo_async.transport.messages import ON_WEIGHTS, PROTOCOL, Codec, Refused, WeightsRequest, WeightsUnchanged
from dapo_async.transport.sockets import Listener
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.subscriber import Subscriber
from tests.weight_sync.weights_pair import (
    LIMIT,
    PATIENCE_S,
    Answer,
    assert_version,
    encoded,
    make_publisher,
    push_frames,
    running,
    subscribe,
)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with running(make_publisher()) as made:
        yield made


@pytest.fixture
def subscriber(publisher: Publisher) -> Iterator[Subscriber]:
    with running(subscribe(publisher.address)) as made:
        yield made


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
    own, other = bytes([PROTOCOL]), bytes([PROTOCOL + 1])
    assert b"\xa8protocol" + own in frames[0]
    frames[0] = frames[0].replace(b"\xa8protocol" + own, b"\xa8protocol" + other)
    return frames


def older(frames: Answer) -> Answer:
    return push_frames(2)


def not_for_it(frames: Answer) -> Answer:
    return encoded(WeightsRequest(worker="w", reader="r", incarnation="life", have=0))


def turned_down(frames: Answer) -> Answer:
    return encoded(Refused(reason="malformed", detail="what you said"))


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

        def answer(frames: Answer, have: int, base: int) -> None:
            received = listener.receive(PATIENCE_S)
            assert received is not None
            request = codec.decode(received[1])
            assert request == WeightsRequest(
                worker="w", reader=request.reader, incarnation="life", have=have, base=base
            )
            assert listener.send(received[0], frames)

        answer(push_frames(2), have=-1, base=-1)
        assert_version(worker.wait_first(PATIENCE_S), 2)
        answer(tamper(push_frames(3)), have=2, base=2)
        answer(tamper(push_frames(3)), have=2, base=-1)  # nothing is built on a base any more
        answer(push_frames(3), have=2, base=-1)
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
            assert listener.send(received[0], encoded(WeightsUnchanged()))
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
