"""What the tests of the publisher and of the subscriber share: the real pair, and messages made by hand."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dapo_async.transport.messages import ON_WEIGHTS, Codec, Message
from dapo_async.transport.sockets import ZERO_COPY_BYTES
from dapo_async.weight_sync.encoding import encode_weights
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.subscriber import Subscriber

LIMIT = 1 << 20
PATIENCE_S = 30.0
Answer = list[bytes]
End = TypeVar("End", Publisher, Subscriber)


def tensors_of(version: int, size: int = ZERO_COPY_BYTES) -> dict[str, Tensor]:
    return {"big": torch.full((size // 4,), float(version)), "small": torch.tensor([float(version)])}


def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def num_pushes(publisher: Publisher) -> int:
    counts = publisher.counts
    return counts.full + counts.delta + counts.shm


def make_publisher(address: str = "tcp://127.0.0.1:*", incarnation: str = "life", **settings: Any) -> Publisher:
    settings = {"heartbeat_s": 0.05, "max_message_bytes": LIMIT, **settings}
    return Publisher(address, incarnation=incarnation, **settings)


def subscribe(address: str, incarnation: str = "life", **settings: Any) -> Subscriber:
    settings = {"heartbeat_s": 0.05, "grace_s": 30.0, "retry_s": 0.01, "worker": "w", **settings}
    return Subscriber(address, incarnation=incarnation, max_message_bytes=LIMIT, **settings)


@contextmanager
def running(made: End) -> Iterator[End]:
    """One end, which must still be well when the test is through."""
    yield made
    made.check()
    made.close()


def assert_version(received: tuple[int, dict[str, Tensor]], version: int) -> None:
    assert received[0] == version
    assert set(received[1]) == {"big", "small"}
    for name, tensor in tensors_of(version).items():
        assert torch.equal(received[1][name], tensor)


def encoded(message: Message) -> Answer:
    return [bytes(frame) for frame in Codec(ON_WEIGHTS).encode(message)]


def push_frames(version: int) -> Answer:
    push, frames = encode_weights(version, tensors_of(version), "life")
    return [*encoded(push), *(bytes(frame) for frame in frames)]
