"""Rewards of a group, made on the learner's side from the facts a worker sent: verdicts and lengths.

Owns the soft overlong punishment and the shaped reward. Does not own the verdict itself (``verifier``), nor which
groups are dropped (``dynamic_sampling``, which goes by verdict). Imports no torch.

Dimension key: G = completions of one group.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def soft_overlong_punishment(
    num_tokens_G: ArrayLike, *, max_tokens: int, overlong_cache_tokens: int
) -> NDArray[np.float64]:
    """Punishment in [-1, 0] of each length, in reward units; float64 [G].

        0                                  if n <= max_tokens - cache
        ((max_tokens - cache) - n) / cache if n <= max_tokens
        -1                                 beyond

    ``num_tokens_G`` [G] counts every generated token, the stop token included. A cache of 0 turns the
    punishment off. Raises ``ValueError`` if a length is negative or the cache does not lie in
    0 .. ``max_tokens``. Source: DAPO, arXiv:2503.14476, Eq. 13.
    """
    if not 0 <= overlong_cache_tokens <= max_tokens:
        raise ValueError(f"overlong_cache_tokens must lie in 0 .. {max_tokens} tokens, got {overlong_cache_tokens}")
    lengths_G = np.asarray(num_tokens_G, dtype=np.float64)
    if lengths_G.ndim != 1 or not (lengths_G >= 0).all():
        raise ValueError(f"num_tokens must be one-dimensional and not negative, got {lengths_G.tolist()}")
    if overlong_cache_tokens == 0:
        return np.zeros_like(lengths_G)
    excess_G = lengths_G - (max_tokens - overlong_cache_tokens)
    # 0.0 minus, not a sign in front: a punishment of -0.0 would be printed as such.
    return 0.0 - np.clip(excess_G / overlong_cache_tokens, 0.0, 1.0)


def group_rewards(
    correct_G: ArrayLike,
    num_tokens_G: ArrayLike,
    *,
    max_tokens: int,
    overlong_cache_tokens: int,
    overlong_penalty: float,
) -> NDArray[np.float64]:
    """Shaped reward of each completion: +1 if right, -1 if wrong, plus ``overlong_penalty`` x Eq. 13; float64 [G].

    ``correct_G`` [G] holds booleans. A truncated completion keeps its verdict, normally -1, and gets the
    full punishment on top. Raises ``ValueError`` if the two differ in length or hold nothing, and whatever
    ``soft_overlong_punishment`` raises. Source: DAPO, arXiv:2503.14476, sections 2.4 and 3.4.
    """
    punishment_G = soft_overlong_punishment(
        num_tokens_G, max_tokens=max_tokens, overlong_cache_tokens=overlong_cache_tokens
    )
    verdict_G = np.where(_verdicts(correct_G), 1.0, -1.0)
    if verdict_G.shape != punishment_G.shape:
        raise ValueError(f"got {len(verdict_G)} verdicts for {len(punishment_G)} lengths")
    return verdict_G + overlong_penalty * punishment_G


def _verdicts(correct_G: ArrayLike) -> NDArray[np.bool_]:
    correct = np.asarray(correct_G)
    if correct.dtype != np.bool_ or correct.ndim != 1 or correct.size == 0:
        raise ValueError(f"verdicts must be a non-empty list of booleans, got {correct.dtype} of shape {correct.shape}")
    return correct
