"""Memory that is lent to readers, and how one learns that none of them is left.

It owns the one trick for it: views are made over an object that stands for the memory and that every one of them, and
every view of theirs, keeps alive. So the object ends with its last reader, at once and in that reader's thread.

Not owned: what is done with memory that is free again. ``snapshot`` writes the next set to it, ``subscriber`` applies
the next delta to it, and ``shared_memory`` tells the learner.
"""

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


def lend(
    address: int, num_bytes: int, memory: object, on_return: Callable[[], object] | None = None
) -> ctypes.Array[ctypes.c_char]:
    """A writable buffer over ``num_bytes`` at ``address``, which keeps their owner ``memory`` alive.

    ``on_return`` is called, in any thread, once this object and all that was made of it is gone; not at exit.
    """
    loan = (ctypes.c_char * num_bytes).from_address(address)
    loan.memory = memory  # type: ignore[attr-defined]
    if on_return is not None:
        weakref.finalize(loan, on_return).atexit = False
    return loan


class Lender:
    """A contiguous tensor of the CPU that others read through views. Lent by one thread, let go of in any."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # not to be handed out itself
        self._loan: weakref.ref[ctypes.Array[ctypes.c_char]] | None = None

    @property
    def is_read(self) -> bool:
        """Whether anything is left of what was lent. Once false it stays so until ``lend``."""
        return self._loan is not None and self._loan() is not None

    def lend(self) -> Tensor:
        """The tensor, in the same memory."""
        if not self.tensor.nbytes:  # torch makes no view of nothing
            return torch.empty_like(self.tensor)
        loan = None if self._loan is None else self._loan()
        if loan is None:
            loan = lend(self.tensor.data_ptr(), self.tensor.nbytes, self.tensor)
            self._loan = weakref.ref(loan)
        return torch.frombuffer(loan, dtype=self.tensor.dtype).reshape(self.tensor.shape)
