"""A set of weights as one message: tensors to frames and back, with a digest that both ends compute.

It owns the byte layout and its checks, and knows no socket and no thread: ``publisher`` sends what is encoded
here from the learner's process, ``subscriber`` decodes it in a worker's. Other ways to carry the same set (only
the changed elements, shared memory) are further message types and further functions beside these; the digest is
of the whole set of tensors, so it stays the judge of all of them.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec
import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.protocol import Frame, TensorInfo, WeightsPush

DtypeName = Literal["float32", "bfloat16", "float16"]
SERVING_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in SERVING_DTYPES.items()}

MAX_NAME = 200  # characters, as in protocol.Name
MAX_DIMENSIONS = 16
CHUNK_BYTES = 8 << 20  # digested as one piece
PARALLEL_BYTES = 64 << 20  # below this the start of threads costs more than it gains
DIGEST_THREADS = 4


def serving_tensors(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the model's floating-point tensors as workers serve them: on the CPU, contiguous, in ``dtype``.

    Names are those of ``model.state_dict()``, hence of its checkpoint. Of names that share one storage (tied
    embeddings) only the first appears. Tensors of other types are constants that every engine has already.
    """
    seen: set[tuple[object, ...]] = set()
    copies = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        copies[name] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    return copies


def encode_weights(
    version: int, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], incarnation: str
) -> tuple[WeightsPush, list[memoryview]]:
    """The message of a set of weights and its frames, one per tensor.

    The frames are views: the tensors must not change as long as the frames are in use. Raises ``WeightsError`` if a
    tensor cannot travel: not on the CPU, not a serving dtype, a name twice, empty or too long.
    """
    infos: list[TensorInfo] = []
    frames: list[memoryview] = []
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not 1 <= len(name) <= MAX_NAME:
            raise WeightsError(f"the name of a tensor must have 1 to {MAX_NAME} characters, got {name!r}")
        if tensor.dtype not in NAMES_OF_DTYPES or tensor.device.type != "cpu" or tensor.dim() > MAX_DIMENSIONS:
            raise WeightsError(
                f"{name} cannot be published: {tensor.dtype} on {tensor.device}, {tensor.dim()} dimensions; it must be "
                f"{', '.join(SERVING_DTYPES)} on the CPU with at most {MAX_DIMENSIONS} dimensions"
            )
        infos.append(TensorInfo(name=name, dtype=NAMES_OF_DTYPES[tensor.dtype], shape=list(tensor.shape)))
        frames.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _check_names(infos)
    digest = digest_of(infos, frames)
    return WeightsPush(version=version, incarnation=incarnation, digest=digest, tensors=infos), frames


def decode_weights(push: WeightsPush, frames: Sequence[Frame]) -> dict[str, Tensor]:
    """The tensors of ``push``, whose bytes are ``frames`` (those after the message's own).

    Tensors share the memory of writable frames and keep it alive; read-only frames are copied. Raises
    ``WeightsError`` if names, count, sizes or digest do not agree.
    """
    _check_names(push.tensors)
    if len(frames) != len(push.tensors):
        raise WeightsError(f"version {push.version} has {len(push.tensors)} tensors but {len(frames)} frames came")
    for info, frame in zip(push.tensors, frames, strict=True):
        expected = math.prod(info.shape) * SERVING_DTYPES[info.dtype].itemsize
        if memoryview(frame).nbytes != expected or len(info.shape) > MAX_DIMENSIONS:
            raise WeightsError(
                f"{info.name} of version {push.version} should have {expected} bytes ({info.dtype} {info.shape}), "
                f"got {memoryview(frame).nbytes}"
            )
    digest = digest_of(push.tensors, frames)
    if digest != push.digest:
        raise WeightsError(f"version {push.version} has digest {digest}, its message says {push.digest}")
    return {info.name: _tensor(info, frame) for info, frame in zip(push.tensors, frames, strict=True)}


def digest_of(infos: Sequence[TensorInfo], frames: Sequence[Frame]) -> str:
    """BLAKE2b-256 over names, dtypes, shapes and the digests of the bytes, taken in pieces and in parallel.

    BLAKE2b needs no special instruction of the processor (about 1 GB/s a core), and releases the interpreter's
    lock, so that pieces are digested side by side.
    """
    head = msgspec.msgpack.encode([(info.name, info.dtype, info.shape) for info in infos])
    whole = hashlib.blake2b(head, digest_size=32, person=b"dapo-weights")
    pieces = list(_pieces(frames))
    if sum(memoryview(frame).nbytes for frame in frames) < PARALLEL_BYTES:
        parts: Iterable[bytes] = map(_digest_piece, pieces)
    else:
        with ThreadPoolExecutor(min(DIGEST_THREADS, os.cpu_count() or 1), "weights digest") as pool:
            parts = list(pool.map(_digest_piece, pieces))
    for part in parts:
        whole.update(part)
    return f"blake2b-256:{whole.hexdigest()}"


def _pieces(frames: Sequence[Frame]) -> Iterator[memoryview]:
    for frame in frames:
        if size := memoryview(frame).nbytes:  # an empty view cannot be cast
            view = memoryview(frame).cast("B")
            yield from (view[start : start + CHUNK_BYTES] for start in range(0, size, CHUNK_BYTES))


def _digest_piece(piece: memoryview) -> bytes:
    return hashlib.blake2b(piece, digest_size=32).digest()


def _tensor(info: TensorInfo, frame: Frame) -> Tensor:
    dtype = SERVING_DTYPES[info.dtype]
    if not memoryview(frame).nbytes:
        return torch.empty(0, dtype=dtype).reshape(info.shape)
    # Engines may load in place, and torch has no read-only tensors.
    writable = bytearray(frame) if memoryview(frame).readonly else frame
    return torch.frombuffer(writable, dtype=dtype).reshape(info.shape)


def _check_names(infos: Sequence[TensorInfo]) -> None:
    if not infos:
        raise WeightsError("a set of weights needs at least one tensor")
    name, times = Counter(info.name for info in infos).most_common(1)[0]
    if times > 1:
        raise WeightsError(f"a set of weights names each tensor once, but {name} comes {times} times")
