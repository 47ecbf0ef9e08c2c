"""Group-relative advantages: how much better one completion is than the other answers to the same prompt.

Owns the statistics of one group. Does not own rewards (``rewards``) nor masks: statistics are taken over the
whole group before any completion is masked out of the loss. Imports no torch.

Dimension key: G = completions of one group.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Added to the standard deviation, as in the published reproduction of DAPO (verl).
STD_EPS = 1e-6


def group_advantages(rewards_G: ArrayLike, *, divide_by_std: bool) -> NDArray[np.float64]:
    """Advantage of each completion of one group; float64 [G].

        (R - mean) / (std + 1e-6) with Bessel's correction, or R - mean if not ``divide_by_std``

    ``rewards_G`` [G] are shaped rewards. Equal rewards give exactly zero, so such a group has exactly zero
    gradient. A group of one has nothing to compare with: mean 0 and std 1 are used, as verl does. Raises
    ``ValueError`` for an empty group or a reward that is not finite. Sources: GRPO, arXiv:2402.03300,
    section 4.1; DAPO, arXiv:2503.14476, Eq. 9; without std: Dr. GRPO, arXiv:2503.20783, section 3.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1 or rewards.size == 0 or not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be a non-empty list of finite numbers, got {rewards.tolist()}")
    if rewards.size == 1:
        centred, std = rewards, 1.0
    elif (rewards == rewards[0]).all():
        # Not left to arithmetic: the mean of equal numbers can differ from them in the last bit.
        return np.zeros_like(rewards)
    else:
        centred, std = rewards - rewards.mean(), float(rewards.std(ddof=1))
    return centred / (std + STD_EPS) if divide_by_std else centred.copy()
