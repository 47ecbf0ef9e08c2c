"""Drawing one token per row, and the random numbers for it. Owned here: the counter-based uniforms, nucleus
truncation, inverse-CDF sampling and the log-probs of what was drawn. Not owned: where logits come from.

The uniform of token ``t`` of completion ``i`` is a hash of ``(seed, i, t)`` and of nothing else, so a completion
draws the same tokens whatever shares its batch.
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd step that makes a counter visit all 64-bit words


def mix64(words: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17): uint64 [n] to uint64 [n], bijective."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def completion_keys(seed: int, first: int, count: int) -> np.ndarray:
    """Random stream keys of completions ``first .. first + count - 1`` of a request, uint64 [count]."""
    base = mix64(np.array([seed], dtype=np.uint64) + GOLDEN)
    return mix64(base + GOLDEN * np.arange(first + 1, first + count + 1, dtype=np.uint64))


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Uniforms in [0, 1), float64 [n]: number ``counters[j]`` of stream ``keys[j]``, with 53 random bits."""
    words = mix64(keys + GOLDEN * (counters.astype(np.uint64) + np.uint64(1)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def truncate(logits: Tensor, top_p: Tensor) -> Tensor:
    """Logits [n, vocab] with -inf outside each row's nucleus: the fewest likeliest tokens whose mass reaches top_p [n].

    The likeliest token always stays; rows with ``top_p`` 1 are untouched (Holtzman et al., arXiv:1904.09751).
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
    before = mass.roll(1, -1)
    before[:, 0] = -1.0
    # Rounding may bring the mass to 1 before the last token: a full nucleus must still lose nothing.
    bound = torch.where(top_p < 1.0, top_p.double(), torch.inf)
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= bound[:, None])
    return logits.masked_fill(outside, -torch.inf)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the distribution function.

    ``logits`` float32 [n, vocab]; ``temperature`` float32 [n]; ``top_p`` float32 [n], or None where no row truncates;
    ``uniform`` float64 [n] in [0, 1). Returns tokens int64 [n] and their log-probs float32 [n] in nats, of the
    distribution drawn from (after temperature and nucleus). A token of probability zero is never drawn.
    """
    scaled = logits / temperature[:, None]
    if top_p is not None:
        scaled = truncate(scaled, top_p)
    cdf = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    # u * total is below the total for every u < 1, so the first entry above it exists and rises there: p > 0.
    target = uniform[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], scaled.log_softmax(-1).gather(1, tokens)[:, 0]
