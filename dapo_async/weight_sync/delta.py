"""The elements whose bits changed between two sets of weights: found, encoded, applied. Lossless.

It owns the encoding and the checks of what arrives; ``publisher`` makes deltas, ``subscriber`` applies them to the set
it keeps. Values are bits and are never computed with, so that NaN payloads, -0.0 and denormals survive.

Of each changed tensor travel the *gaps* (unchanged elements between two changed ones, and before the first) and the
new *values*, in the order of their positions. A gap is an unsigned integer of one or two bytes, whichever is smaller in
all; its largest value is an escape: so many unchanged elements, and the gap goes on. Positions therefore rise by
construction, and what remains to check of a delta is that it ends inside the tensor and that its counts agree.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import Frame, TensorDelta, TensorInfo, WeightsDelta
from dapo_async.weight_sync.encoding import SERVING_DTYPES, bytes_of, check_digest, size_of

MAX_DELTAS = 8  # kept one after the other, for workers that skipped versions; and together smaller than one set
CHUNK = 1 << 20  # elements compared at once
GAP_TYPES: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<u2")}
BIT_TYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Delta(NamedTuple):
    """The step from one set to the next: what ``WeightsDelta`` says of it, and its two frames."""

    base: int
    version: int
    parts: list[TensorDelta]
    gaps: bytes
    values: bytes

    @property
    def num_bytes(self) -> int:
        """Of both frames."""
        return len(self.gaps) + len(self.values)


def make_delta(
    base: int,
    version: int,
    infos: Sequence[TensorInfo],
    old: Sequence[Frame],
    new: Sequence[Frame],
    limit_bytes: float = math.inf,
) -> Delta | None:
    """What changed from ``old`` to ``new``, the bytes of each tensor of two sets of the same layout.

    None as soon as it cannot stay below ``limit_bytes``: then nothing of what changed has been gathered.
    """
    counts, least = [0] * len(infos), 0
    for number, info in enumerate(infos):
        size = SERVING_DTYPES[info.dtype].itemsize
        if size_of(info):
            counts[number] = _num_changed(*_bits(size, old[number], new[number]))
        least += counts[number] * (size + 1)
        if least >= limit_bytes:
            return None
    parts: list[TensorDelta] = []
    all_gaps: list[bytes] = []
    all_values: list[bytes] = []
    for number, info in enumerate(infos):
        if not counts[number]:
            continue
        size = SERVING_DTYPES[info.dtype].itemsize
        width, gaps, values = _encode(*_bits(size, old[number], new[number]), counts[number])
        parts.append(
            TensorDelta(
                tensor=number,
                changed=counts[number],
                gaps=len(gaps) // width,
                gap_bytes=1 if width == 1 else 2,
                value_bytes=2 if size == 2 else 4,
            )
        )
        all_gaps.append(gaps)
        all_values.append(values)
    return Delta(base, version, parts, b"".join(all_gaps), b"".join(all_values))


def _encode(before: np.ndarray, after: np.ndarray, num_changed: int) -> tuple[int, bytes, bytes]:
    """Bytes of a gap, the gaps of one tensor and its new values; made chunk by chunk, to need little memory."""
    # One-byte gaps have at most one escape per 255 unchanged elements. With no more of these than changes they need at
    # most two bytes a change, which two-byte gaps need at least: so the others need not be made.
    narrow = len(after) - num_changed <= np.iinfo(GAP_TYPES[1]).max * num_changed
    gaps: dict[int, list[bytes]] = {width: [] for width in GAP_TYPES if width == 1 or not narrow}
    values: list[bytes] = []
    last = -1
    for positions in _changed(before, after):
        for width, parts in gaps.items():
            parts.append(encode_gaps(positions, GAP_TYPES[width], last).tobytes())
        values.append(after[positions].tobytes())
        last = int(positions[-1])
    found = {width: b"".join(parts) for width, parts in gaps.items()}
    width = min(found, key=lambda width: len(found[width]))
    return width, found[width], b"".join(values)


def encode_gaps(positions: np.ndarray, width: np.dtype, last: int = -1) -> np.ndarray:
    """The gaps before rising ``positions`` behind ``last``, in integers of ``width``; see the module."""
    escape = np.iinfo(width).max
    gaps = np.diff(positions, prepend=last) - 1
    long = np.flatnonzero(gaps >= escape)
    if not len(long):
        return gaps.astype(width)
    escapes = np.zeros_like(gaps)
    escapes[long] = gaps[long] // escape  # division is slow, and most gaps are short
    ends = np.arange(len(gaps)) + np.cumsum(escapes)
    encoded = np.full(int(ends[-1]) + 1, escape, width)
    encoded[ends] = gaps - escapes * escape
    return encoded


def decode_gaps(encoded: np.ndarray) -> np.ndarray:
    """The positions of which these are the gaps; int64, rising."""
    escape = np.iinfo(encoded.dtype).max
    ends = np.cumsum(encoded + (encoded < escape).astype(np.int64))
    return ends[encoded < escape] - 1


def apply_delta(
    message: WeightsDelta,
    frames: Sequence[Frame],
    infos: Sequence[TensorInfo],
    base: Mapping[str, Tensor],
    unread: Collection[str] = (),
) -> dict[str, Tensor]:
    """The set that ``message`` makes of ``base``, whose tensors are named and shaped as in ``infos``.

    An engine may be reading ``base``: its tensors are not touched, but for those named in ``unread``, which must be
    contiguous. They are changed in place, as fresh memory costs many times what the changes cost. A tensor that did not
    change, or did so in place, is the same object in both. Raises ``WeightsError`` if the delta is malformed or if the
    result has another digest; what the tensors in ``unread`` hold is then of no set.
    """
    if len(frames) != 2 * len(message.steps):
        raise WeightsError(f"a delta of {len(message.steps)} steps has two frames each, got {len(frames)}")
    changed: dict[str, Tensor] = {}
    for step, parts in enumerate(message.steps):
        for part, gaps, values in _split(parts, frames[2 * step], frames[2 * step + 1]):
            if part.tensor >= len(infos):
                raise WeightsError(f"a delta names tensor {part.tensor} of {len(infos)}")
            info = infos[part.tensor]
            positions = _positions(part, info, gaps)
            if info.name not in changed:
                own = base[info.name]
                changed[info.name] = own if info.name in unread else own.clone(memory_format=torch.contiguous_format)
            np.frombuffer(bytes_of(changed[info.name]), values.dtype)[positions] = values
    result = {info.name: changed.get(info.name, base[info.name]) for info in infos}
    check_digest(message.version, message.digest, infos, [bytes_of(tensor) for tensor in result.values()])
    return result


def _bits(size: int, old: Frame, new: Frame) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a tensor in two sets, as integers of ``size`` bytes."""
    return np.frombuffer(old, BIT_TYPES[size]), np.frombuffer(new, BIT_TYPES[size])


def _num_changed(before: np.ndarray, after: np.ndarray) -> int:
    starts = range(0, len(after), CHUNK)
    return sum(int(np.count_nonzero(before[at : at + CHUNK] != after[at : at + CHUNK])) for at in starts)


def _changed(before: np.ndarray, after: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the elements that differ, int64, rising: those of one chunk at a time, where there are any."""
    for start in range(0, len(after), CHUNK):
        found = np.flatnonzero(before[start : start + CHUNK] != after[start : start + CHUNK])
        if len(found):
            yield found + start


def _split(
    parts: Sequence[TensorDelta], gaps: Frame, values: Frame
) -> Iterator[tuple[TensorDelta, np.ndarray, np.ndarray]]:
    """Each tensor's share of the two frames of a step."""
    sizes = [sum(p.gaps * p.gap_bytes for p in parts), sum(p.changed * p.value_bytes for p in parts)]
    got = [memoryview(gaps).nbytes, memoryview(values).nbytes]
    if sizes != got:
        raise WeightsError(f"the frames of a delta should have {sizes} bytes, got {got}")
    numbers = [part.tensor for part in parts]
    if numbers != sorted(set(numbers)):
        raise WeightsError("a step of a delta must name each tensor once, in order")
    at = [0, 0]
    for part in parts:
        yield (
            part,
            np.frombuffer(gaps, GAP_TYPES[part.gap_bytes], part.gaps, at[0]),
            np.frombuffer(values, BIT_TYPES[part.value_bytes], part.changed, at[1]),
        )
        at = [at[0] + part.gaps * part.gap_bytes, at[1] + part.changed * part.value_bytes]


def _positions(part: TensorDelta, info: TensorInfo, gaps: np.ndarray) -> np.ndarray:
    """The checked positions of one tensor's changes."""
    if part.value_bytes != SERVING_DTYPES[info.dtype].itemsize:
        raise WeightsError(f"{info.name} is {info.dtype}, a delta brings values of {part.value_bytes} bytes")
    positions = decode_gaps(gaps)
    if len(positions) != part.changed:
        raise WeightsError(f"a delta of {info.name} has {len(positions)} positions for {part.changed} values")
    if gaps[-1] == np.iinfo(gaps.dtype).max:
        raise WeightsError(f"a delta of {info.name} ends within a gap")
    if positions[-1] >= math.prod(info.shape):
        raise WeightsError(f"a delta of {info.name} changes element {positions[-1]} of {math.prod(info.shape)}")
    return positions
