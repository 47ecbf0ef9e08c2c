"""A set of weights as one message: tensors to frames and back, with a digest that both ends compute.

It owns the byte layout and its checks, and knows no socket: ``publisher`` sends what is encoded here from the
learner's process, ``subscriber`` decodes it in a worker's. ``delta`` and ``shared_memory`` carry the same set in other
ways; the digest is of the whole set of tensors, so it is the judge of all of them.

The digest (xxh3, 128 bits) finds damage: bits that flip, frames that mix, a set that was changed while it was read. It
is no protection against somebody who forges weights; he could as well forge the digest, which travels beside them.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import msgspec
import torch
import xxhash
from torch import Tensor

from dapo_async.errors import ConfigError, WeightsError
from dapo_async.transport.messages import Frame, TensorInfo, WeightsPush

DtypeName = Literal["float32", "bfloat16", "float16"]
SERVING_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in SERVING_DTYPES.items()}

MAX_NAME = 200  # characters, as in protocol.Name
MAX_DIMENSIONS = 16
CHUNK_BYTES = 1 << 20  # digested as one piece; fits a core's cache, so that a copy is digested while it is there
PARALLEL_BYTES = 64 << 20  # below this the start of threads costs more than it gains
MAX_THREADS = 4
STAMP_BYTES = 16
ALIGNMENT = 64  # bytes, of each tensor in a buffer that holds a whole set

Piece = TypeVar("Piece")


def live_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's own floating-point tensors that workers serve, not copied.

    Names are those of ``model.state_dict()``, hence of its checkpoint. Of names that share one storage (tied
    embeddings) only the first appears. Tensors of other types are constants that every engine has already.
    """
    seen: set[tuple[object, ...]] = set()
    live = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        live[name] = tensor.detach()
    return live


def serving_tensors(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of ``live_tensors`` as workers serve them: on the CPU, contiguous, in ``dtype``."""
    return {
        name: tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in live_tensors(model).items()
    }


def tensor_infos(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> list[TensorInfo]:
    """Names, types and shapes of a set whose values travel in ``dtype`` (None: each tensor's own).

    Raises ``WeightsError`` if a tensor cannot travel: not a serving dtype, a name twice, empty or too long.
    """
    infos: list[TensorInfo] = []
    for name, tensor in tensors:
        if not 1 <= len(name) <= MAX_NAME:
            raise WeightsError(f"the name of a tensor must have 1 to {MAX_NAME} characters, got {name!r}")
        served = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        if served not in NAMES_OF_DTYPES or tensor.device.type == "meta" or tensor.dim() > MAX_DIMENSIONS:
            raise WeightsError(
                f"{name} cannot be published: {tensor.dtype} on {tensor.device}, {tensor.dim()} dimensions; it must be "
                f"{', '.join(SERVING_DTYPES)} with values and at most {MAX_DIMENSIONS} dimensions"
            )
        infos.append(TensorInfo(name=name, dtype=NAMES_OF_DTYPES[served], shape=list(tensor.shape)))
    check_names(infos)
    return infos


def check_frame_sizes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_message_bytes: int) -> None:
    """Raise ``ConfigError`` if a tensor, served in ``dtype`` (None: its own), is larger than a frame may be."""
    for name, tensor in tensors.items():
        size = tensor.numel() * (tensor.dtype if dtype is None else dtype).itemsize
        if size > max_message_bytes:
            raise ConfigError(
                f"network.max_message_mb = {max_message_bytes >> 20} is too small for the weights: "
                f"{name} has {size / (1 << 20):.1f} MiB"
            )


def size_of(info: TensorInfo) -> int:
    """Bytes of a tensor."""
    return math.prod(info.shape) * SERVING_DTYPES[info.dtype].itemsize


def offsets_of(infos: Sequence[TensorInfo]) -> tuple[list[int], int]:
    """Where each tensor begins in a buffer that holds them all, and the size of that buffer, in bytes."""
    offsets, end = [], 0
    for info in infos:
        offsets.append(end)
        end += -(-size_of(info) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the CPU; a view if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encode_weights(
    version: int, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], incarnation: str
) -> tuple[WeightsPush, list[memoryview]]:
    """The message of a set of weights on the CPU and its frames, one per tensor.

    The frames are views: the tensors must not change as long as the frames are in use. Raises ``WeightsError`` as
    ``tensor_infos`` does.
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    infos = tensor_infos(pairs)
    frames = [bytes_of(tensor) for _, tensor in pairs]
    digest = digest_of(infos, frames)
    return WeightsPush(version=version, incarnation=incarnation, digest=digest, tensors=infos), frames


def decode_weights(push: WeightsPush, frames: Sequence[Frame]) -> dict[str, Tensor]:
    """The tensors of ``push``, whose bytes are ``frames`` (those after the message's own).

    Tensors share the memory of writable frames and keep it alive; read-only frames are copied. Raises
    ``WeightsError`` if names, count, sizes or digest do not agree.
    """
    check_names(push.tensors)
    if len(frames) != len(push.tensors):
        raise WeightsError(f"version {push.version} has {len(push.tensors)} tensors but {len(frames)} frames came")
    for info, frame in zip(push.tensors, frames, strict=True):
        expected = size_of(info)
        if memoryview(frame).nbytes != expected or len(info.shape) > MAX_DIMENSIONS:
            raise WeightsError(
                f"{info.name} of version {push.version} should have {expected} bytes ({info.dtype} {info.shape}), "
                f"got {memoryview(frame).nbytes}"
            )
    check_digest(push.version, push.digest, push.tensors, frames)
    return {info.name: _tensor(info, frame) for info, frame in zip(push.tensors, frames, strict=True)}


def check_digest(version: int, expected: str, infos: Sequence[TensorInfo], frames: Sequence[Frame]) -> None:
    """Raise ``WeightsError`` unless this set has the digest ``expected``."""
    digest = digest_of(infos, frames)
    if digest != expected:
        raise WeightsError(f"version {version} has digest {digest}, its message says {expected}")


def digest_of(infos: Sequence[TensorInfo], frames: Sequence[Frame]) -> str:
    """xxh3-128 over names, dtypes, shapes and the digests of the bytes, taken in pieces and in parallel."""
    pieces = list(_pieces(frames))
    size = sum(memoryview(frame).nbytes for frame in frames)
    return combine(infos, in_parallel(digest_piece, pieces, size))


def digest_piece(piece: Frame) -> bytes:
    """The digest of at most ``CHUNK_BYTES`` of one tensor."""
    return xxhash.xxh3_128_digest(piece)


def combine(infos: Sequence[TensorInfo], parts: Iterable[bytes]) -> str:
    """The digest of a set from those of its pieces, in order."""
    whole = xxhash.xxh3_128(_layout(infos))
    for part in parts:
        whole.update(part)
    return f"xxh3-128:{whole.hexdigest()}"


def stamp_of(infos: Sequence[TensorInfo], digest: str) -> bytes:
    """``STAMP_BYTES`` that name a set where it lies in shared memory: its digest, and which tensors it is of."""
    return xxhash.xxh3_128_digest(_layout(infos) + digest.encode())


def tensor_digest(tensor: Tensor) -> str:
    """xxh3-128 of the bytes of one tensor, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor.cpu()))


def in_parallel(function: Callable[[Piece], bytes], pieces: Sequence[Piece], num_bytes: int) -> list[bytes]:
    """``function`` of each piece, in order, by several threads if the pieces are ``num_bytes`` large together.

    It must leave the interpreter's lock, as copying and digesting do. Each thread gets a run of neighbouring pieces.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    if num_bytes < PARALLEL_BYTES or threads == 1:
        return [function(piece) for piece in pieces]
    share = -(-len(pieces) // threads)
    runs = [pieces[start : start + share] for start in range(0, len(pieces), share)]
    with ThreadPoolExecutor(threads, "weights pieces") as pool:
        done = pool.map(lambda run: [function(piece) for piece in run], runs)
        return [part for run in done for part in run]


def check_names(infos: Sequence[TensorInfo]) -> None:
    """Raise ``WeightsError`` if there is no tensor, or two of one name."""
    if not infos:
        raise WeightsError("a set of weights needs at least one tensor")
    name, times = Counter(info.name for info in infos).most_common(1)[0]
    if times > 1:
        raise WeightsError(f"a set of weights names each tensor once, but {name} comes {times} times")


def _layout(infos: Sequence[TensorInfo]) -> bytes:
    return msgspec.msgpack.encode([(info.name, info.dtype, info.shape) for info in infos])


def _pieces(frames: Sequence[Frame]) -> Iterator[memoryview]:
    for frame in frames:
        if size := memoryview(frame).nbytes:  # an empty view cannot be cast
            view = memoryview(frame).cast("B")
            yield from (view[start : start + CHUNK_BYTES] for start in range(0, size, CHUNK_BYTES))


def _tensor(info: TensorInfo, frame: Frame) -> Tensor:
    dtype = SERVING_DTYPES[info.dtype]
    if not memoryview(frame).nbytes:
        return torch.empty(0, dtype=dtype).reshape(info.shape)
    # Engines may load in place, and torch has no read-only tensors.
    writable = bytearray(frame) if memoryview(frame).readonly else frame
    return torch.frombuffer(writable, dtype=dtype).reshape(info.shape)
