"""Copying weights off a GPU beside training: on a stream of its own, into memory that the GPU can write to.

On the learner's stream every piece would wait for all the work that training has queued there; on another stream it
waits for the weights only. And memory that is not pinned is filled through a bounce buffer of the driver.
On a CPU nothing here is used.
"""

import functools
import logging
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PIECE = 16 << 20  # elements that are rounded at a time: 32 MiB in bfloat16
PORTABLE = 1  # of cudaHostRegister: pinned for every GPU


def moment(tensors: Iterable[Tensor]) -> torch.cuda.Event | None:
    """Now on this thread's stream: what it has queued so far makes ``tensors``. None if they are on no GPU."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One per device and process: PyTorch keeps the memory freed on a stream for that stream."""
    return torch.cuda.Stream(device)


def copy_out(pairs: Sequence[tuple[Tensor, Tensor]], ready: torch.cuda.Event | None) -> None:
    """Copy the first of each pair, on a GPU, to the second, flat, after ``ready`` and waiting for nothing queued later.

    All is complete on return. Values are rounded on the GPU, so that no more bytes travel than are served: in pieces,
    so that this takes no more memory there than a piece or two (a copy of a tensor that is not contiguous comes on
    top).
    """
    stream = _stream(pairs[0][0].device)
    if ready is not None:
        stream.wait_event(ready)
    try:
        with torch.cuda.stream(stream):  # whatever is made on the way, too
            for source, target in pairs:
                pieces = zip(source.reshape(-1).split(PIECE), target.split(PIECE), strict=True)
                for from_gpu, to_host in pieces:
                    to_host.copy_(from_gpu, non_blocking=True)
    finally:
        stream.synchronize()  # nothing is written once the caller goes on


def pin(memory: Tensor, owner: object, device: torch.device) -> bool:
    """Let GPUs write straight to ``memory``, until ``owner`` is gone. False, and a line in the log, if forbidden."""
    address, num_bytes = memory.data_ptr(), memory.nbytes
    if not num_bytes:
        return True
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(address, num_bytes, PORTABLE))
        if code == 0:
            weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
            return True
        log.warning("%d MiB cannot be pinned (CUDA error %d): weights leave the GPU more slowly", num_bytes >> 20, code)
        try:
            torch.zeros(1, device=device)  # CUDA tells an error once more to the next who asks
        except RuntimeError as error:
            log.debug("as was said: %s", error)
    return False
