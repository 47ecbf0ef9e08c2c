"""Deltas: lossless for every bit pattern, and nothing that was tampered with passes."""

import itertools
import random
from collections.abc import Callable, Collection

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dapo_async.errors import ProtocolError, WeightsError
from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsDelta
from dapo_async.weight_sync import delta
from dapo_async.weight_sync.delta import GAP_TYPES, Delta, apply_delta, decode_gaps, encode_gaps, make_delta
from dapo_async.weight_sync.encoding import SERVING_DTYPES, bytes_of, digest_of, tensor_infos

Set = dict[str, Tensor]
BITS = {2: (torch.int16, 1 << 16), 4: (torch.int32, 1 << 32)}
NAN_PAYLOADS = {2: [0x7FC1, 0xFFFF, 0x8000, 0x0001, 0x7C01], 4: [0x7FC00001, 0xFFFFFFFF, 0x80000000, 1, 0x7F800001]}


def of_bits(bits: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of exactly these bits, given as unsigned integers."""
    kind, size = BITS[dtype.itemsize]
    signed = [bit - size if bit >= size // 2 else bit for bit in bits]
    return torch.tensor(signed, dtype=kind).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bytes(bytes_of(one)) == bytes(bytes_of(other))


def step(base: int, old: Set, new: Set) -> Delta:
    infos = tensor_infos(old.items())
    made = make_delta(base, base + 1, infos, *([bytes_of(t) for t in side.values()] for side in (old, new)))
    assert made is not None
    return made


def message_of(steps: list[Delta], result: Set) -> tuple[WeightsDelta, list[bytes]]:
    """The message as a worker decodes it, and its frames."""
    infos = tensor_infos(result.items())
    sent = WeightsDelta(
        version=steps[-1].version,
        base=steps[0].base,
        incarnation="life",
        digest=digest_of(infos, [bytes_of(tensor) for tensor in result.values()]),
        steps=[one.parts for one in steps],
    )
    frames = [frame for one in steps for frame in (one.gaps, one.values)]
    return Codec(ON_WEIGHTS).decode([bytes(f) for f in [*Codec(ON_WEIGHTS).encode(sent), *frames]]), frames


def over_the_wire(sets: list[Set], base: Set | None = None, unread: Collection[str] = ()) -> Set:
    """The last set, made of ``base`` (else of the first itself) by deltas from each to the next."""
    steps = [step(number, *pair) for number, pair in enumerate(itertools.pairwise(sets))]
    message, frames = message_of(steps, sets[-1])
    return apply_delta(message, frames, tensor_infos(sets[0].items()), sets[0] if base is None else base, unread)


@st.composite
def chains(draw: st.DrawFn) -> list[Set]:
    """Two to four sets of the same layout, with few or many changes and every kind of bits."""
    layout = draw(st.lists(st.tuples(st.sampled_from(list(SERVING_DTYPES.values())), st.integers(0, 700)), min_size=1))
    sets: list[Set] = []
    for _ in range(draw(st.integers(2, 4))):
        tensors: Set = {}
        for number, (dtype, size) in enumerate(layout):
            top = BITS[dtype.itemsize][1] - 1
            bits = st.one_of(st.sampled_from(NAN_PAYLOADS[dtype.itemsize]), st.integers(0, top))
            old = sets[-1][str(number)] if sets else of_bits([0] * size, dtype)
            tensors[str(number)] = old.clone()
            for place, value in draw(st.dictionaries(st.integers(0, max(0, size - 1)), bits, max_size=20)).items():
                if size:
                    tensors[str(number)][place] = of_bits([value], dtype)[0]
        sets.append(tensors)
    return sets


@settings(max_examples=150, deadline=None)
@given(chains())
def test_every_bit_survives_a_chain(sets: list[Set]) -> None:
    before = [{name: tensor.clone() for name, tensor in one.items()} for one in sets]
    result = over_the_wire(sets)
    assert list(result) == list(sets[-1])
    for name, tensor in sets[-1].items():
        assert same_bits(result[name], tensor)
        assert same_bits(sets[0][name], before[0][name])  # an engine may be reading the base


@settings(max_examples=150, deadline=None)
@given(chains(), st.data())
def test_what_nobody_reads_is_changed_where_it_is_and_the_rest_is_not_touched(
    sets: list[Set], data: st.DataObject
) -> None:
    unread = data.draw(st.sets(st.sampled_from(list(sets[0]))))
    base = {name: tensor.clone() for name, tensor in sets[0].items()}
    result = over_the_wire(sets, base, unread)
    for name, tensor in sets[-1].items():
        assert same_bits(result[name], tensor)
        assert result[name] is base[name] if name in unread else same_bits(base[name], sets[0][name])


@pytest.mark.parametrize("dtype", SERVING_DTYPES.values(), ids=SERVING_DTYPES.keys())
def test_special_values_are_told_apart_by_their_bits(dtype: torch.dtype) -> None:
    old = {"w": of_bits([0, 0, 0, 0, 0, 0x7FC1], dtype)}
    new = {"w": of_bits([*NAN_PAYLOADS[dtype.itemsize], 0x7FC1], dtype)}
    assert step(0, old, new).parts[0].changed == 5  # +0.0 and -0.0 differ, a NaN equals itself
    assert same_bits(over_the_wire([old, new])["w"], new["w"])


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 300_000), min_size=1, max_size=50), st.sampled_from(list(GAP_TYPES.values())))
def test_gaps_are_positions(positions: set[int], width: np.dtype) -> None:
    rising = np.array(sorted(positions))
    encoded = encode_gaps(rising, width)
    assert encoded.dtype == width
    assert decode_gaps(encoded).tolist() == rising.tolist()


@pytest.mark.parametrize(
    ("positions", "encoded"),
    [
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([0, 1], [0, 0]),
        ([3, 514], [3, 255, 255, 0]),
        ([510], [255] * 2 + [0]),
    ],
)
def test_gaps_by_hand(positions: list[int], encoded: list[int]) -> None:
    assert encode_gaps(np.array(positions), GAP_TYPES[1]).tolist() == encoded


@pytest.mark.parametrize(("every", "gap_bytes"), [(10, 1), (200, 1), (2000, 2)])
def test_the_smaller_width_is_taken(every: int, gap_bytes: int) -> None:
    old = {"w": torch.zeros(100_000, dtype=torch.bfloat16)}
    new = {"w": old["w"].clone()}
    new["w"][::every] = 1.0
    delta = step(0, old, new)
    assert delta.parts[0].gap_bytes == gap_bytes
    assert delta.num_bytes <= 100_000 / every * (2 + 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 1000), st.sampled_from(["dense", "even", "anywhere"]), st.integers(0, 99))
def test_no_other_width_would_be_smaller(size: int, every: int, where: str, seed: int) -> None:
    num_changed = -(-size // every)
    places = {
        "dense": range(num_changed),  # short gaps, though there are few changes for so many elements
        "even": range(0, size, every),
        "anywhere": sorted(random.Random(seed).sample(range(size), num_changed)),
    }[where]
    old = {"w": torch.zeros(size, dtype=torch.bfloat16)}
    new = {"w": old["w"].clone()}
    new["w"][list(places)] = 1.0
    made = step(0, old, new)
    widths = [encode_gaps(np.array(places), width).nbytes for width in GAP_TYPES.values()]
    assert len(made.gaps) == min(widths)


def test_what_did_not_change_is_not_copied() -> None:
    old = {"a": torch.zeros(3), "b": torch.zeros(3)}
    new = {"a": torch.zeros(3), "b": torch.ones(3)}
    message, frames = message_of([step(0, old, new)], new)
    result = apply_delta(message, frames, tensor_infos(old.items()), old)
    assert result["a"] is old["a"]
    assert old["b"].tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chains(), st.sampled_from([1, 2, 3, 7]))
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, sets: list[Set], chunk: int) -> None:
    whole = [step(base, *pair) for base, pair in enumerate(itertools.pairwise(sets))]
    with monkeypatch.context() as patch:
        patch.setattr(delta, "CHUNK", chunk)
        assert [step(base, *pair) for base, pair in enumerate(itertools.pairwise(sets))] == whole


def test_what_cannot_be_smaller_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = {"a": torch.zeros(8), "b": torch.zeros(8)}, {"a": torch.ones(8), "b": torch.ones(8)}
    infos = tensor_infos(old.items())
    sides = [[bytes_of(t) for t in side.values()] for side in (old, new)]
    made = make_delta(0, 1, infos, *sides, limit_bytes=81)  # 16 values of 4 bytes and 16 gaps of one
    assert made is not None
    assert made.num_bytes == 80
    monkeypatch.setattr(delta, "_encode", None)  # not even begun
    assert make_delta(0, 1, infos, *sides, limit_bytes=80) is None


def test_equal_sets_differ_in_nothing() -> None:
    one = {"a": torch.randn(5), "e": torch.empty(0)}
    assert step(0, one, one).num_bytes == 0
    assert same_bits(over_the_wire([one, one])["a"], one["a"])


# --- refusals --------------------------------------------------------------------------------------------


def case() -> tuple[WeightsDelta, list[bytes], Set]:
    old = {"a": torch.zeros(600), "b": torch.zeros(4, dtype=torch.bfloat16)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a"][[2, 400]] = 1.0
    new["b"][3] = 2.0
    message, frames = message_of([step(6, old, new)], new)
    assert [part.gaps for part in message.steps[0]] == [3, 1]
    return message, frames, old


def with_gap(at: int, value: int) -> Callable[[WeightsDelta, list[bytes]], None]:
    def tamper(message: WeightsDelta, frames: list[bytes]) -> None:
        frames[0] = frames[0][:at] + bytes([value]) + frames[0][at + 1 :]

    return tamper


def drop_frame(message: WeightsDelta, frames: list[bytes]) -> None:
    frames.pop()


def add_frame(message: WeightsDelta, frames: list[bytes]) -> None:
    frames.append(b"")


def shorten_values(message: WeightsDelta, frames: list[bytes]) -> None:
    frames[1] = frames[1][:-1]


def shorten_gaps(message: WeightsDelta, frames: list[bytes]) -> None:
    frames[0] = frames[0][:-1]


def lengthen_gaps(message: WeightsDelta, frames: list[bytes]) -> None:
    frames[0] += b"\0"


def unknown_tensor(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0][1].tensor = 2


def same_tensor(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0][1].tensor = 0


def backwards(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0].reverse()


def other_values(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0][0].value_bytes, message.steps[0][0].changed = 2, 4


def miscount(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0][0].gaps, message.steps[0][1].gaps = 2, 2


def huge(message: WeightsDelta, frames: list[bytes]) -> None:
    message.steps[0][0].changed = 2**52


def flip_value(message: WeightsDelta, frames: list[bytes]) -> None:
    frames[1] = bytes([frames[1][0] ^ 1]) + frames[1][1:]


def forge_digest(message: WeightsDelta, frames: list[bytes]) -> None:
    message.digest += "0"


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (with_gap(0, 254), "changes element 652 of 600"),
        (with_gap(3, 4), "b changes element 4 of 4"),
        (with_gap(0, 255), "a has 1 positions for 2 values"),
        (with_gap(2, 255), "a has 1 positions for 2 values"),
        (with_gap(1, 254), "a has 3 positions for 2 values"),
        (with_gap(0, 3), "has digest"),
        (drop_frame, "1 steps has two frames each, got 1"),
        (add_frame, "got 3"),
        (shorten_values, r"should have \[4, 10\] bytes, got \[4, 9\]"),
        (shorten_gaps, r"got \[3, 10\]"),
        (lengthen_gaps, r"got \[5, 10\]"),
        (unknown_tensor, "names tensor 2 of 2"),
        (same_tensor, "name each tensor once, in order"),
        (backwards, "name each tensor once, in order"),
        (other_values, "a is float32, a delta brings values of 2 bytes"),
        (miscount, "a has 1 positions for 2 values|ends within a gap"),
        (huge, "should have"),
        (flip_value, "has digest"),
        (forge_digest, "its message says"),
    ],
)
def test_what_was_tampered_with_is_refused(tamper: Callable[[WeightsDelta, list[bytes]], None], told: str) -> None:
    message, frames, base = case()
    infos = tensor_infos(base.items())
    assert apply_delta(message, frames, infos, base)["b"].tolist() == [0, 0, 0, 2]
    tamper(message, frames)
    with pytest.raises(WeightsError, match=told):
        apply_delta(message, frames, infos, base)
    assert not any(bool(tensor.any()) for tensor in base.values())


def test_a_gap_that_does_not_end_is_refused() -> None:
    message, frames, base = case()
    message.steps[0][0].gaps += 1
    frames[0] = frames[0][:3] + b"\xff" + frames[0][3:]
    with pytest.raises(WeightsError, match="a ends within a gap"):
        apply_delta(message, frames, tensor_infos(base.items()), base)


@pytest.mark.parametrize(
    "wrong",
    [{"changed": 0}, {"gaps": 0}, {"gap_bytes": 3}, {"value_bytes": 8}, {"tensor": -1}, {"changed": 2**53}, {"x": 1}],
)
def test_fields_out_of_range_are_not_decoded(wrong: dict[str, int]) -> None:
    message, frames, _ = case()
    plain = msgspec.to_builtins(message)
    plain["steps"][0][0] |= wrong
    with pytest.raises(ProtocolError, match="malformed"):
        Codec(ON_WEIGHTS).decode([msgspec.msgpack.encode(plain), *frames])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1), st.binary(min_size=1, max_size=12), st.integers(0, 12))
def test_random_damage_is_refused_or_harmless(frame: int, noise: bytes, at: int) -> None:
    message, frames, base = case()
    good = apply_delta(message, frames, tensor_infos(base.items()), base)
    frames[frame] = frames[frame][:at] + noise + frames[frame][at + len(noise) :]
    try:
        found = apply_delta(message, frames, tensor_infos(base.items()), base)
    except WeightsError:
        return
    assert all(same_bits(found[name], good[name]) for name in good)
