"""What prompts ask of a cluster: how long the answers of a group are, and whether the filter drops it.

Owns the distributions that ``simulate`` draws from, and the groups of a run. Everything comes from the lease's number
and the ``random.Random`` that a workload is given, so a seed fixes it.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

MIXED: tuple[bool, ...] = (True, False)  # verdicts of a group, as far as the filter looks at them
ALL_RIGHT: tuple[bool, ...] = (True,)
ALL_WRONG: tuple[bool, ...] = (False,)


class GroupSpec(NamedTuple):
    """One group: the tokens of each of its completions, and its verdicts."""

    lengths: tuple[int, ...]
    verdicts: tuple[bool, ...]


Workload = Callable[[random.Random, int], GroupSpec]  # given the number of the lease


def lognormal(median: float, sigma: float, limit: int, group_size: int, mixed: float, shared: float = 0.5) -> Workload:
    """Log-normal lengths, cut off at ``limit`` tokens. ``sigma``: of the logarithm.

    ``mixed`` is the probability that a group passes the filter; ``shared`` the part of the variance that the
    completions of a prompt have in common (0 to 1).
    """
    of_prompt, own = sigma * math.sqrt(shared), sigma * math.sqrt(1.0 - shared)

    def draw(rng: random.Random, lease: int) -> GroupSpec:
        centre = math.log(median) + of_prompt * rng.gauss(0.0, 1.0)
        lengths = (round(math.exp(centre + own * rng.gauss(0.0, 1.0))) for _ in range(group_size))
        return GroupSpec(tuple(max(1, min(length, limit)) for length in lengths), _verdicts(rng, mixed))

    return draw


def replayed(groups: Sequence[GroupSpec]) -> Workload:
    """What leases 0, 1, 2, ... of a run asked, in their order, and again: no draw, hence no noise.

    Each lap begins one group later than the one before, so that the same groups do not always share a batch.
    """
    if not groups:
        raise ValueError("a replayed workload needs at least one group")
    return lambda rng, lease: groups[(lease + lease // len(groups)) % len(groups)]


def _verdicts(rng: random.Random, mixed: float) -> tuple[bool, ...]:
    if mixed >= 1.0 or rng.random() < mixed:
        return MIXED
    return ALL_WRONG if rng.random() < 0.5 else ALL_RIGHT
