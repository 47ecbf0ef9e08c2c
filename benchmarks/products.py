"""The matrix products of a piece of code, recorded while it runs and then run again alone: its limit in arithmetic.

Owned here: which operations count as matrix products, their shapes, and the time of the very same calls without
anything between them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Signature = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, type of an operand
ADD, PLAIN = torch.ops.mkldnn._linear_pointwise.binary, torch.ops.mkldnn._linear_pointwise.default
MM, BMM = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
ADDMM, BADDBMM = torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default
# Where the two factors are among the arguments, and whether the second is a weight [out, in].
FACTORS = {PLAIN: (0, 1, True), ADD: (0, 2, True), MM: (0, 1, False), BMM: (0, 1, False)}
FACTORS |= {ADDMM: (1, 2, False), BADDBMM: (1, 2, False)}


class Products(NamedTuple):
    """Matrix products, alike ones counted."""

    calls: Counter[tuple[Any, tuple[Signature | None, ...]]]

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiplication and addition."""
        total = 0
        for (operation, signatures), times in self.calls.items():
            one, other, weight = FACTORS[operation]
            left, right = signatures[one], signatures[other]
            assert left is not None
            assert right is not None
            total += times * 2 * math.prod(left[0]) * right[0][0 if weight else -1]
        return total

    def seconds(self, repeats: int) -> float:
        """CPU seconds of all the calls, alone, the best of ``repeats``."""
        calls = [(_call(operation, signatures), times) for (operation, signatures), times in self.calls.items()]
        best = math.inf
        for _ in range(repeats + 1):
            started = time.thread_time()
            for call, times in calls:
                for _ in range(times):
                    call()
            best = min(best, time.thread_time() - started)
        return best


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, tuple[Signature | None, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FACTORS:
            signatures = tuple(
                (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else None for x in args[:4]
            )
            self.calls[func, signatures] += 1
        return func(*args, **(kwargs or {}))


def record(run: Callable[[], object]) -> Products:
    """The matrix products that ``run`` calls in this thread, backward passes included."""
    with _Recorder() as recorder:
        run()
    return Products(recorder.calls)


def _call(operation: Any, signatures: tuple[Signature | None, ...]) -> Callable[[], object]:
    """The same operation on random operands of the same layout."""
    operands = [None if s is None else torch.randn(_extent(s), dtype=s[2]).as_strided(s[0], s[1]) for s in signatures]
    pointwise = {PLAIN: ("none", [], ""), ADD: ("add",)}.get(operation, ())
    needed = {PLAIN: 3, ADD: 4, MM: 2, BMM: 2, ADDMM: 3, BADDBMM: 3}[operation]

    def call() -> object:
        with torch.no_grad():
            return operation(*operands[:needed], *pointwise)

    return call


def _extent(signature: Signature) -> int:
    """Numbers that a strided tensor spans."""
    shape, strides, _ = signature
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
