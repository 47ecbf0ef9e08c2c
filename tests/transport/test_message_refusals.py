"""Nothing malformed gets through the decoder, and each refusal says why."""

from typing import Any

import msgspec
import numpy as np
import pytest

from dapo_async.errors import ProtocolError
from dapo_async.transport.messages import (
    FROM_WORKER,
    PROTOCOL,
    Beat,
    Codec,
    Message,
    Reintroduce,
    Welcome,
)
from tests.transport.message_cases import DIRECTIONS, EXAMPLES, a_group, a_lease, changed, plain, refusal, wire

# --- refusals: the head ---------------------------------------------------------------------------------------


def test_no_frame_at_all() -> None:
    assert refusal([]).reason == "empty"


@pytest.mark.parametrize(
    ("direction", "message"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_a_head_cut_anywhere_is_refused(direction: str, message: Message) -> None:
    head, *arrays = wire(message, direction)
    for length in range(len(head)):
        assert refusal([head[:length], *arrays], direction).reason in ("malformed", "protocol")


@pytest.mark.parametrize(
    "protocol", [0, 1, PROTOCOL - 1, PROTOCOL + 1, 2**63, -1, "1", None, 1.5, [1], {"a": "b" * 10_000}]
)
def test_another_protocol_version_is_told_as_such(protocol: Any) -> None:
    told = refusal(changed(a_group(), protocol=protocol))
    assert told.reason == "protocol"
    assert f"this side speaks protocol {PROTOCOL}" in told.detail


def test_another_protocol_version_is_told_even_if_its_fields_are_unknown() -> None:
    assert refusal(changed(a_group(), protocol=PROTOCOL + 1, temperature=1.0)).reason == "protocol"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"type": "weights"}, "Invalid value 'weights'"),
        ({"type": "x" * 10_000}, "Invalid value"),
        ({"type": "removed"}, "type"),
        ({"type": 3}, "type"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"lease": "removed"}, "missing required field `lease`"),
        ({"lease": "7"}, r"Expected `int`, got `str` - at `\$.lease`"),
        ({"lease": -1}, r">= 0 - at `\$.lease`"),
        ({"lease": 2**53}, r"at `\$.lease`"),
        ({"lease": 2**64 - 1}, r"at `\$.lease`"),
        ({"lease": True}, r"at `\$.lease`"),
        ({"lease": 1.5}, r"at `\$.lease`"),
        ({"kind": "test"}, "Invalid enum value 'test'"),
        ({"incarnation": b"run.0"}, "Expected `str`, got `bytes`"),
        ({"completions": []}, "length >= 1"),
        ({"completions": {}}, "Expected `array`"),
        ({"token_ids": [5, 6, 2, 9, 0]}, "array reference"),
        ({"token_ids": None}, "array reference"),
        ({"token_ids": {"frame": 1}}, "array reference"),
        ({"token_ids": {"frame": 1, "dtype": "<i4", "shape": [5]}}, "array reference"),
        ({"token_ids": {"frame": 0, "dtype": "<i4"}}, "frame 0 .* does not exist"),
        ({"token_ids": {"frame": 3, "dtype": "<i4"}}, "frame 3 .* does not exist"),
        ({"token_ids": {"frame": -1, "dtype": "<i4"}}, "frame -1"),
        ({"token_ids": {"frame": True, "dtype": "<i4"}}, "frame True"),
        ({"token_ids": {"frame": 2**64 - 1, "dtype": "<i4"}}, "frame 18446744073709551615"),
        ({"token_ids": {"frame": 1, "dtype": "<i8"}}, "type <i8"),
        ({"token_ids": {"frame": 1, "dtype": "O"}}, "type O"),
        ({"token_ids": {"frame": 1, "dtype": ["<i4"]}}, "unhashable"),
        ({"token_ids": {"frame": 2, "dtype": "<i4"}}, "used twice"),
        ({"token_ids": {"frame": 1, "dtype": "<f4"}}, "token_ids must be int32"),
        ({"logprobs": {"frame": 2, "dtype": "<i4"}}, "logprobs float32"),
    ],
)
def test_a_malformed_head_is_refused_with_its_path(fields: dict[str, Any], told: str) -> None:
    error = refusal(changed(a_group(), **fields))
    assert error.reason == "malformed"
    with pytest.raises(ProtocolError, match=told):
        raise error


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 10**9}, "num_tokens"),
        ({"spans": []}, "spans"),
        ({"spans": [[4, 0], [6, 3]]}, "spans"),
        ({"spans": [[-1, 3]]}, "spans"),
        ({"spans": [[2**53, 3]]}, "spans"),
        ({"spans": [[4, 1, 2]]}, "spans"),
        ({"finish": "abort"}, "finish"),
        ({"correct": 1}, "correct"),
        ({"verdict": "maybe"}, "verdict"),
        ({"predicted": "x" * 501}, "predicted"),
        ({"reward": 1.0}, "reward"),
    ],
)
def test_a_malformed_completion_is_refused_with_its_path(fields: dict[str, Any], told: str) -> None:
    content = msgspec.msgpack.decode(wire(a_group())[0])
    content["completions"][0] |= fields
    error = refusal(changed(a_group(), completions=content["completions"]))
    assert error.reason == "malformed"
    assert told in error.detail


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -0.1])
def test_seconds_that_are_none_are_refused_with_their_path(seconds: float) -> None:
    error = refusal(wire(Beat(version=0, running=0, holding=[], seconds={"decode": seconds})))
    assert error.reason == "malformed"
    assert "$.seconds" in error.detail


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_message_of_the_other_direction_is_refused(direction: str) -> None:
    for where, message in EXAMPLES:
        if type(message) not in DIRECTIONS[direction].__args__:
            assert refusal(wire(message, where), direction).reason == "malformed"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa4type\xa1\xff",
        b"\x81\x90\x01",
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\x80",
        b"\x01",
    ],
    ids=[
        "empty",
        "reserved",
        "lists",
        "maps",
        "huge-list",
        "huge-map",
        "utf8",
        "list-key",
        "time",
        "no-type",
        "number",
    ],
)
def test_bytes_made_to_break_a_decoder_are_refused(head: bytes) -> None:
    assert refusal([head, b"1234"]).reason in ("malformed", "protocol")


def test_nesting_inside_a_free_field_is_refused() -> None:
    head = wire(Welcome(incarnation="r", weights_address="a", config={"x": 1}), "learner")[0]
    assert refusal([head.replace(b"\xa1x\x01", b"\xa1x" + b"\x91" * 100_000)], "learner").reason == "malformed"


# --- refusals: the arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("index", [1, 2])
def test_an_array_cut_within_a_number_is_refused(index: int, cut: int) -> None:
    frames = wire(a_group())
    frames[index] = frames[index][:-cut]
    error = refusal(frames)
    assert error.reason == "malformed"
    assert f"array frame {index} is truncated" in error.detail


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("size", [0, 16, 24])
def test_an_array_of_another_length_is_refused(index: int, size: int) -> None:
    frames = wire(a_group())
    frames[index] = frames[index].ljust(24, b"\0")[:size]
    assert refusal(frames).reason == "lengths"


def test_lengths_that_agree_with_each_other_but_not_with_the_completions() -> None:
    assert refusal([wire(a_group())[0], bytes(24), bytes(24)]).reason == "lengths"


def test_a_missing_array_and_an_array_too_many_are_refused() -> None:
    frames = wire(a_group())
    assert "does not exist" in refusal(frames[:-1]).detail
    assert "does not exist" in refusal(frames[:1]).detail
    assert "3 array frames came, the message has 2" in refusal([*frames, b"1234"]).detail
    assert "1 array frames came, the message has 0" in refusal([*wire(Reintroduce(), "learner"), b""], "learner").detail


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 0.01, 1e30])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_log_probs_that_are_none_are_refused(value: float, position: int) -> None:
    logprobs = a_group().logprobs
    logprobs[position] = value
    assert refusal(wire(a_group(logprobs=logprobs))).reason == "logprobs"


def test_a_signalling_nan_is_refused() -> None:
    head, ids, logprobs = wire(a_group())
    assert refusal([head, ids, bytes.fromhex("0100807f") + logprobs[4:]]).reason == "logprobs"


def test_rounding_above_zero_and_the_lowest_finite_value_pass() -> None:
    logprobs = np.array([1e-6, 0.0, -0.0, -1e-45, np.finfo(np.float32).min], np.float32)
    assert len(Codec(FROM_WORKER).decode(wire(a_group(logprobs=logprobs))).logprobs) == 5


@pytest.mark.parametrize("position", [0, 4])
def test_negative_token_ids_are_refused(position: int) -> None:
    ids = a_group().token_ids
    ids[position] = -1
    assert refusal(wire(a_group(token_ids=ids))).reason == "tokens"


@pytest.mark.parametrize(
    "spans", [[(4, 2)], [(4, 4)], [(6, 1), (4, 2)], [(4, 1), (4, 2)], [(4, 1), (6, 2), (7, 1)], [(4, 2**64 - 1)]]
)
def test_spans_out_of_order_or_not_summing_are_refused(spans: list[tuple[int, int]]) -> None:
    group = a_group()
    group.completions[0].spans = spans
    assert refusal(wire(group)).reason == "spans"


def test_very_many_spans_do_not_make_a_very_long_refusal() -> None:
    group = a_group()
    group.completions[0].spans = [(9, 1)] * 10_000
    assert refusal(wire(group)).reason == "spans"


@pytest.mark.parametrize(
    ("prompt_ids", "reason"),
    [
        (np.array([], np.int32), "tokens"),
        (np.array([1, -2], np.int32), "tokens"),
        (np.array([1.0], np.float32), "malformed"),
    ],
)
def test_a_lease_without_a_usable_prompt_is_refused(prompt_ids: np.ndarray, reason: str) -> None:
    assert refusal(wire(a_lease(prompt_ids=prompt_ids), "learner"), "learner").reason == reason


def test_a_codec_survives_what_it_refused() -> None:
    codec = Codec(FROM_WORKER)
    frames = wire(a_group())
    for bad in ([], [b"junk"], frames[:2], [frames[0], frames[2], frames[2]]):
        with pytest.raises(ProtocolError):
            codec.decode(bad)
        assert plain(codec.decode(frames)) == plain(a_group())
