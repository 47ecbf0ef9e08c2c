"""Sets of weights as messages: bits survive, and nothing that was tampered with passes."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsPush
from dapo_async.weight_sync import encoding as weights
from dapo_async.weight_sync.encoding import SERVING_DTYPES, decode_weights, digest_of, encode_weights, serving_tensors

BIT_TYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Tied(torch.nn.Module):
    """Embedding and head share one storage, as in small language models; plus a constant that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BIT_TYPES[tensor.dtype]) if tensor.numel() else tensor


def every_bit_pattern(dtype: torch.dtype) -> Tensor:
    """All 65,536 patterns of a 16-bit type; for float32 those of its upper half, lower bits set (NaN payloads)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        return ((patterns << 16) | 0x1234).view(dtype)
    return patterns.to(torch.int16).view(dtype)


def over_the_wire(version: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    push, frames = encode_weights(version, tensors, "life")
    codec = Codec(ON_WEIGHTS)
    sent = [bytes(frame) for frame in [*codec.encode(push), *frames]]
    decoded = codec.decode(sent)
    assert decoded == push
    return decode_weights(decoded, sent[1:])


@pytest.mark.parametrize("dtype", SERVING_DTYPES.values(), ids=SERVING_DTYPES.keys())
def test_every_bit_survives(dtype: torch.dtype) -> None:
    sent = {
        "patterns": every_bit_pattern(dtype),
        "matrix": torch.randn(5, 7).to(dtype),
        "transposed": torch.randn(5, 7).to(dtype).T,
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "four_d": torch.randn(2, 1, 3, 2).to(dtype),
    }
    received = over_the_wire(3, sent)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].shape == tensor.shape
        assert received[name].dtype == dtype
        assert torch.equal(bits(received[name]), bits(tensor)), name


def test_serving_tensors_are_copies_without_tied_duplicates_under_checkpoint_names() -> None:
    model = Tied()
    served = serving_tensors(model, torch.float32)
    assert list(served) == ["embed.weight", "norm.weight", "norm.bias"]
    assert set(served) <= set(model.state_dict())
    before = served["embed.weight"].clone()
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    assert torch.equal(served["embed.weight"], before)
    assert not any(tensor.requires_grad for tensor in served.values())


@pytest.mark.parametrize("dtype", SERVING_DTYPES.values(), ids=SERVING_DTYPES.keys())
def test_serving_tensors_are_rounded_to_the_serving_precision(dtype: torch.dtype) -> None:
    model = Tied()
    served = serving_tensors(model, dtype)
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in served.values())
    assert torch.equal(served["embed.weight"], model.embed.weight.detach().to(dtype))


def test_two_tensors_that_merely_are_equal_both_travel() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].load_state_dict(model[0].state_dict())
    assert len(serving_tensors(model, torch.float32)) == 4


def test_decoded_tensors_can_be_written_and_outlive_their_message() -> None:
    push, frames = encode_weights(0, {"w": torch.arange(6.0).reshape(2, 3)}, "life")
    for copy in (bytes(frames[0]), bytearray(frames[0])):
        tensor = decode_weights(push, [copy])["w"]
        del copy
        tensor.add_(1.0)
        assert tensor.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_writable_frames_are_not_copied() -> None:
    push, frames = encode_weights(0, {"w": torch.arange(6.0)}, "life")
    buffer = bytearray(frames[0])
    place = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert decode_weights(push, [memoryview(buffer)])["w"].data_ptr() == place
    assert np.frombuffer(frames[0], np.float32).tolist() == [0, 1, 2, 3, 4, 5]


# --- the digest ------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_content_alone() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    digests = {
        encode_weights(1, tensors, "life")[0].digest,
        encode_weights(2, tensors, "another")[0].digest,
        encode_weights(2, iter(tensors.items()), "another")[0].digest,
    }
    assert len(digests) == 1


def test_each_part_of_the_content_changes_the_digest() -> None:
    variants: list[dict[str, Tensor]] = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(8, dtype=torch.bfloat16)},
        {"a": torch.zeros(8, dtype=torch.float16)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.zeros(2), "b": torch.zeros(2)},
        {"b": torch.zeros(2), "a": torch.zeros(2)},
    ]
    assert len({encode_weights(0, variant, "life")[0].digest for variant in variants}) == len(variants)


def test_the_digest_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    push, frames = encode_weights(0, {"a": torch.randn(1000), "e": torch.empty(0), "b": torch.randn(777)}, "life")
    monkeypatch.setattr(weights, "CHUNK_BYTES", 100)
    alone = digest_of(push.tensors, frames)
    monkeypatch.setattr(weights, "PARALLEL_BYTES", 0)
    assert digest_of(push.tensors, frames) == alone


@pytest.mark.parametrize("chunk_bytes", [7, 19, 20])
def test_every_single_bit_counts(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    push, frames = encode_weights(0, {"a": torch.randn(5), "b": torch.randn(2).bfloat16()}, "life")
    for index, frame in enumerate(frames):
        for bit in range(8 * frame.nbytes):
            changed = [bytearray(f) for f in frames]
            changed[index][bit // 8] ^= 1 << bit % 8
            with pytest.raises(WeightsError, match="has digest"):
                decode_weights(push, changed)


# --- refusals --------------------------------------------------------------------------------------------


def rename(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[0].name = "other"


def drop_last_frame(push: WeightsPush, frames: list[bytes]) -> None:
    frames.pop()


def add_frame(push: WeightsPush, frames: list[bytes]) -> None:
    frames.append(b"")


def truncate(push: WeightsPush, frames: list[bytes]) -> None:
    frames[1] = frames[1][:-1]


def swap_frames(push: WeightsPush, frames: list[bytes]) -> None:
    frames[0], frames[1] = frames[1], frames[0]


def reshape(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[0].shape = [3, 2]


def enlarge(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[0].shape = [2**52, 2**52]


def nest(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[0].shape = [2, 3] + [1] * 100


def retype(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[0].dtype = "bfloat16"
    push.tensors[0].shape = [4, 3]


def repeat_name(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors[1].name = push.tensors[0].name


def forge_digest(push: WeightsPush, frames: list[bytes]) -> None:
    push.digest = push.digest.replace("128", "256")


def forget_everything(push: WeightsPush, frames: list[bytes]) -> None:
    push.tensors.clear()
    frames.clear()


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (rename, "has digest"),
        (drop_last_frame, "2 tensors but 1 frames"),
        (add_frame, "2 tensors but 3 frames"),
        (truncate, r"b of version 7 should have 24 bytes \(float32 \[6\]\), got 23"),
        (swap_frames, "has digest"),
        (reshape, "has digest"),
        (enlarge, "a of version 7 should have"),
        (nest, "a of version 7"),
        (retype, "has digest"),
        (repeat_name, "a comes 2 times"),
        (forge_digest, "its message says xxh3-256"),
        (forget_everything, "at least one tensor"),
    ],
)
def test_what_was_tampered_with_is_refused(tamper: Callable[[WeightsPush, list[bytes]], None], told: str) -> None:
    push, views = encode_weights(7, {"a": torch.randn(2, 3), "b": torch.randn(6)}, "life")
    frames = [bytes(view) for view in views]
    assert set(decode_weights(push, frames)) == {"a", "b"}
    tamper(push, frames)
    with pytest.raises(WeightsError, match=told):
        decode_weights(push, frames)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "at least one tensor"),
        ({"": torch.ones(1)}, "1 to 200 characters"),
        ({"n" * 201: torch.ones(1)}, "1 to 200 characters"),
        ({"w": torch.ones(1, dtype=torch.float64)}, "torch.float64 on cpu"),
        ({"w": torch.ones(1, dtype=torch.int32)}, "w cannot be published"),
        ({"w": torch.ones(1, device="meta")}, "on meta"),
        ({"w": torch.ones([1] * 17)}, "17 dimensions"),
        ([("w", torch.ones(1)), ("w", torch.ones(1))], "w comes 2 times"),
    ],
)
def test_what_cannot_travel_is_refused(tensors: dict[str, Tensor], told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        encode_weights(0, tensors, "life")
