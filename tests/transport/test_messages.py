"""Messages: every type makes the round trip, the bytes are pinned, and nothing malformed gets through."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.errors import ProtocolError
from dapo_async.transport.messages import (
    FROM_WORKER,
    PROTOCOL,
    Codec,
    Message,
    TensorInfo,
    WeightsPush,
    WeightsRequest,
)
from tests.transport.message_cases import DIRECTIONS, EXAMPLES, a_group, a_lease, changed, plain, refusal, wire


def test_the_examples_cover_every_message() -> None:
    for direction, union in DIRECTIONS.items():
        assert {type(message) for where, message in EXAMPLES if where == direction} == set(union.__args__)


@pytest.mark.parametrize(
    ("direction", "message"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_round_trip(direction: str, message: Message) -> None:
    decoded = Codec(DIRECTIONS[direction]).decode(wire(message, direction))
    assert type(decoded) is type(message)
    assert plain(decoded) == plain(message)
    assert plain(decoded)["protocol"] == PROTOCOL


def test_arrays_are_read_only_views_of_their_frames() -> None:
    frames = [bytearray(frame) for frame in wire(a_group())]
    group = Codec(FROM_WORKER).decode(frames)
    assert group.token_ids[0] == 5
    frames[1][0] = 77
    assert group.token_ids[0] == 77
    with pytest.raises(ValueError, match="read-only"):
        group.token_ids[0] = 1


def test_any_memory_layout_is_encoded_alike() -> None:
    ids = a_group().token_ids
    strided = np.repeat(ids, 2)[::2]
    assert not strided.flags.c_contiguous
    assert wire(a_group(token_ids=strided)) == wire(a_group())
    assert wire(a_group(token_ids=ids.astype(">i4"))) == wire(a_group())


@pytest.mark.parametrize(
    "array", [np.zeros(5, np.int64), np.zeros((5, 1), np.int32), [1, 2, 3, 4, 5], np.zeros(5, bool)]
)
def test_what_is_no_array_of_the_wire_is_not_encoded(array: Any) -> None:
    message = a_group(token_ids=array)
    if isinstance(array, list):
        assert refusal(wire(message)).reason == "malformed"
        return
    with pytest.raises(TypeError, match="one-dimensional int32 or float32"):
        wire(message)


# --- golden bytes: a change here is a change of the wire format, and needs a new PROTOCOL ---------------------


def test_golden_bytes_from_worker() -> None:
    head, ids, logprobs = wire(a_group())
    assert head == (
        b"\x88\xa4type\xa5group\xa8protocol\x06\xa5lease\x07\xa4kind\xa5train\xabincarnation\xa5run.0"
        b"\xabcompletions\x92"
        b"\x87\xaanum_tokens\x03\xa5spans\x92\x92\x04\x01\x92\x06\x02\xa6finish\xa4stop\xa7correct\xc3"
        b"\xa7verdict\xa2ok\xa9predicted\xa215\xa6second\xa0"
        b"\x87\xaanum_tokens\x02\xa5spans\x91\x92\x04\x02\xa6finish\xa6length\xa7correct\xc2"
        b"\xa7verdict\xa7timeout\xa9predicted\xa0\xa6second\xa5wrong"
        b"\xa9token_ids\x82\xa5frame\x01\xa5dtype\xa3<i4\xa8logprobs\x82\xa5frame\x02\xa5dtype\xa3<f4"
    )
    assert ids.hex() == "0500000006000000020000000900000000000000"
    assert logprobs.hex() == "000000bf000080bf00000000000000c00000f0c1"


def test_golden_bytes_from_learner() -> None:
    assert wire(a_lease(), "learner") == [
        b"\x8d\xa4type\xa5lease\xa8protocol\x06\xa5lease\x07\xa4kind\xa5train\xabincarnation\xa5run.0"
        b"\xa5truth\xa215\xaaprompt_ids\x82\xa5frame\x01\xa5dtype\xa3<i4"
        b"\xabnum_samples\x08\xa4seed\xcf\x7f\xff\xff\xff\xff\xff\xff\xff\xabmin_version\x04\xaamax_tokens\x40"
        b"\xabtemperature\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\xa5top_p\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00",
        bytes.fromhex("010000000200000003000000"),
    ]


def test_golden_bytes_on_weights() -> None:
    assert wire(WeightsRequest(worker="w0", reader="r", incarnation="run.0", have=-1), "weights") == [
        b"\x88\xa4type\xafweights_request\xa8protocol\x06\xa6worker\xa2w0\xa6reader\xa1r\xabincarnation\xa5run.0\xa4have\xff"
        b"\xa4base\xff\xa8unshared\xa0"
    ]
    tensors = [TensorInfo(name="w", dtype="bfloat16", shape=[2, 300])]
    assert wire(WeightsPush(version=3, incarnation="run.0", digest="d", tensors=tensors), "weights") == [
        b"\x86\xa4type\xa7weights\xa8protocol\x06\xa7version\x03\xabincarnation\xa5run.0\xa6digest\xa1d"
        b"\xa7tensors\x91\x83\xa4name\xa1w\xa5dtype\xa8bfloat16\xa5shape\x92\x02\xcd\x01\x2c"
    ]


# --- fuzz -----------------------------------------------------------------------------------------------------


CODECS = [Codec(union) for union in DIRECTIONS.values()]
REASONS = {"empty", "malformed", "protocol", "lengths", "spans", "logprobs", "tokens"}


def decodes_or_refuses(frames: list[bytes]) -> None:
    for codec in CODECS:
        reason = None
        try:
            assert isinstance(codec.decode(frames), Message)
        except ProtocolError as error:
            reason = error.reason
        assert reason is None or reason in REASONS


@given(st.lists(st.binary(max_size=80), max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_random_bytes_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    decodes_or_refuses(frames)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
def test_messages_with_any_field_replaced_raise_nothing_but_protocol_errors(
    example: tuple[str, Message], data: st.DataObject
) -> None:
    direction, message = example
    name = data.draw(st.sampled_from(["type", "extra", *message.__struct_fields__]))
    decodes_or_refuses(changed(message, direction, **{name: data.draw(VALUES)}))


@given(st.sampled_from(EXAMPLES), st.integers(0, 3), st.integers(0, 400), st.binary(min_size=0, max_size=4))
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
def test_messages_with_bytes_replaced_raise_nothing_but_protocol_errors(
    example: tuple[str, Message], index: int, start: int, patch: bytes
) -> None:
    direction, message = example
    frames = wire(message, direction)
    index %= len(frames)
    start %= len(frames[index]) + 1
    frames[index] = frames[index][:start] + patch + frames[index][start + len(patch) :]
    decodes_or_refuses(frames)
