"""Copying weights off a GPU beside training: on a stream of its own, into memory that the GPU can write to.

On the learner's stream every piece would wait for all the work that training has queued there; on another stream it
waits for the weights only. And memory that is not pinned is filled through a bounce buffer of the driver. Called by
``publisher`` (the moment) and ``snapshot`` (the copy). On a CPU nothing here is used.
"""

import logging
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def moment(tensors: Iterable[Tensor]) -> torch.cuda.Event | None:
    """Now on this thread's stream: what it has queued so far makes ``tensors``. None if they are on no GPU."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def copy_out(pairs: Sequence[tuple[Tensor, Tensor]], ready: torch.cuda.Event | None) -> None:
    """Copy the first of each pair, on a GPU, to the second, after ``ready`` and waiting for nothing queued later.

    All is complete on return. Values are rounded on the GPU, so that no more bytes travel than are served.
    """
    stream = torch.cuda.Stream(pairs[0][0].device)
    if ready is not None:
        stream.wait_event(ready)
    with torch.cuda.stream(stream):
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
    stream.synchronize()


def pin(memory: Tensor, owner: object) -> bool:
    """Let GPUs write straight to ``memory``, until ``owner`` is gone. False, and a line in the log, if forbidden."""
    address, num_bytes = memory.data_ptr(), memory.nbytes
    runtime = torch.cuda.cudart()
    if not num_bytes or (code := int(runtime.cudaHostRegister(address, num_bytes, 0))) == 0:
        if num_bytes:
            weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
        return True
    log.warning("%d MiB cannot be pinned (CUDA error %d): weights leave the GPU more slowly", num_bytes >> 20, code)
    try:
        torch.zeros(1, device="cuda")  # CUDA tells an error once more to the next who asks
    except RuntimeError as error:
        log.debug("as was said: %s", error)
    return False
