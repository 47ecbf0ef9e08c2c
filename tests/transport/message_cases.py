"""One example of every message, and what the tests of the protocol do with messages."""

from typing import Any

import msgspec
import numpy as np
import pytest

from dapo_async.errors import ProtocolError
from dapo_async.transport.messages import (
    FROM_LEARNER,
    FROM_WORKER,
    ON_WEIGHTS,
    Ack,
    Beat,
    Cancel,
    Codec,
    Completion,
    DecodeSums,
    Group,
    Hello,
    LearnerBeat,
    Lease,
    Message,
    Refused,
    Reintroduce,
    Released,
    Stop,
    TensorDelta,
    TensorInfo,
    WeightsDelta,
    WeightsPush,
    WeightsReleased,
    WeightsRequest,
    WeightsShared,
    WeightsUnchanged,
    Welcome,
)

DIRECTIONS = {"worker": FROM_WORKER, "learner": FROM_LEARNER, "weights": ON_WEIGHTS}


def a_group(**changes: Any) -> Group:
    fields: dict[str, Any] = {
        "lease": 7,
        "incarnation": "run.0",
        "completions": [
            Completion(num_tokens=3, spans=[(4, 1), (6, 2)], finish="stop", correct=True, predicted="15"),
            Completion(num_tokens=2, spans=[(4, 2)], finish="length", correct=False, verdict="timeout", second="wrong"),
        ],
        "token_ids": np.array([5, 6, 2, 9, 0], np.int32),
        "logprobs": np.array([-0.5, -1.0, 0.0, -2.0, -30.0], np.float32),
    }
    return Group(**fields | changes)


def a_lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "lease": 7,
        "incarnation": "run.0",
        "truth": "15",
        "prompt_ids": np.array([1, 2, 3], np.int32),
        "num_samples": 8,
        "seed": 2**63 - 1,
        "min_version": 4,
        "max_tokens": 64,
        "temperature": 1.0,
    }
    return Lease(**fields | changes)


EXAMPLES: list[tuple[str, Message]] = [
    ("worker", Hello(worker="w0", pid=9, host="h", engine="torch", capacity=10, version=-1, holding=[3, 4])),
    (
        "worker",
        Beat(
            version=4,
            running=60,
            holding=[("train", 3), ("eval", 0)],
            refused_weights=2**52,
            seconds={"decode": 1.5, "idle": 0.0},
            decode=DecodeSums(steps=2, rows=7, rows_squared=25, seconds=1.5, rows_seconds=5.5),
        ),
    ),
    ("worker", a_group()),
    ("worker", a_group(kind="eval")),
    ("worker", Released(reason="ends")),
    ("learner", Welcome(incarnation="run.0", weights_address="tcp://127.0.0.1:1", config={"a": {"b": [1, 2.5, None]}})),
    ("learner", a_lease()),
    ("learner", Ack(lease=7, outcome="accepted")),
    ("learner", Cancel(leases=[7])),
    ("learner", Refused(reason="lengths", detail="why")),
    ("learner", Reintroduce()),
    ("learner", LearnerBeat()),
    ("learner", Stop(reason="done")),
    ("weights", WeightsRequest(worker="w0", reader="r", incarnation="run.0", have=-1)),
    (
        "weights",
        WeightsPush(
            version=3,
            incarnation="run.0",
            digest="xxh3-128:00",
            tensors=[
                TensorInfo(name="w", dtype="bfloat16", shape=[2, 3]),
                TensorInfo(name="s", dtype="float32", shape=[]),
            ],
        ),
    ),
    ("weights", WeightsReleased(reader="r", versions=[3, 4])),
    (
        "weights",
        WeightsShared(
            version=3,
            incarnation="run.0",
            digest="xxh3-128:00",
            tensors=[TensorInfo(name="w", dtype="bfloat16", shape=[2, 3])],
            pid=7,
            descriptor=12,
            file="f",
            files=["f", "g"],
        ),
    ),
    (
        "weights",
        WeightsDelta(
            version=3,
            base=2,
            incarnation="run.0",
            digest="xxh3-128:00",
            steps=[[TensorDelta(tensor=0, changed=2, gaps=3, gap_bytes=1, value_bytes=2)]],
        ),
    ),
    ("weights", WeightsUnchanged()),
    ("weights", Refused(reason="malformed", detail="why")),
]


def wire(message: Message, direction: str = "worker") -> list[bytes]:
    return [bytes(frame) for frame in Codec(DIRECTIONS[direction]).encode(message)]


def plain(message: Message) -> dict[str, Any]:
    """Fields of a message, arrays as (type, numbers), so that messages can be compared."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return {k: (v.dtype.str, v.tolist()) if isinstance(v, np.ndarray) else v for k, v in fields.items()}


def refusal(frames: list[Any], direction: str = "worker") -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        Codec(DIRECTIONS[direction]).decode(frames)
    assert len(str(caught.value)) < 1000
    return caught.value


def changed(message: Message, direction: str = "worker", **fields: Any) -> list[bytes]:
    """Frames of ``message`` with fields of its head replaced; None of a name removes it."""
    head, *arrays = wire(message, direction)
    content = msgspec.msgpack.decode(head) | fields
    return [msgspec.msgpack.encode({k: v for k, v in content.items() if v != "removed"}), *arrays]
