"""What k judged answers to each of some prompts say about a policy: avg@k, pass@k, maj@k, lengths, intervals.

Pure functions of verdicts; no file, engine or configuration. Every score is a mean over prompts of one number per
prompt, so the bootstrap over prompts serves all of them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated as A

import numpy as np
from msgspec import Meta, Struct

from dapo_async.verify.notation import canonical

RESAMPLES = 2000
LEVEL = 0.95  # of the confidence intervals
CHUNK = 64  # resamples drawn at a time, which bounds memory


class ScoredAnswer(Struct, frozen=True, kw_only=True):
    """One answer, as far as scores need it."""

    correct: bool
    predicted: A[str, Meta(description="the answer the verifier saw; empty: it saw none, or does not say")] = ""
    num_tokens: int
    truncated: A[bool, Meta(description="ended at the length limit")]


class Score(Struct, frozen=True):
    """A mean over prompts with its confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of ``num_samples`` answers, drawn without replacement, hold a right one.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. (arXiv:2107.03374, section 2.1), as the product
    given there: factorials of n = 1,000 have no float. Raises ``ValueError`` unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right answers among {num_samples} is not defined")
    if num_samples - num_right < k:
        return 1.0
    miss = 1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - miss.prod())


def majority(answers: Sequence[ScoredAnswer]) -> float:
    """maj@k of one prompt: whether the answer given most often is right; k = ``len(answers)``.

    Right answers are equal to the truth, hence one vote, however they are spelled; wrong ones are if they have one
    canonical spelling. A tie counts as what a fair draw among the tied answers would be right on average. No answer (an
    empty string, ``[INVALID]``) is a vote like any other: a policy that mostly says nothing is not saved by its one
    guess. Should verdicts on one string differ, its share of right ones counts.
    """
    found_right = {answer.predicted for answer in answers if answer.correct}
    votes: defaultdict[str | None, list[bool]] = defaultdict(list)  # None: the right answer
    for answer in answers:
        votes[None if answer.predicted in found_right else canonical(answer.predicted)].append(answer.correct)
    most = max(map(len, votes.values()))
    winners = [verdicts for verdicts in votes.values() if len(verdicts) == most]
    return sum(sum(verdicts) / most for verdicts in winners) / len(winners)


def powers_up_to(k: int) -> list[int]:
    """1, 2, 4, ... below k, and k itself."""
    return [*(2**power for power in range(k.bit_length()) if 2**power < k), k]


def score(answers: Sequence[Sequence[ScoredAnswer]], *, seed: int) -> dict[str, Score]:
    """All scores of k answers to each prompt: [prompts][k]. Names: ``avg@k``, ``pass@1`` .. ``pass@k``, ``maj@k``
    (absent if the verifier names no answer at all), ``length_mean`` (tokens, stop token included), ``truncated_share``.

    Intervals are the percentile bootstrap over prompts, which says what other prompts of the same kind would change,
    with ``seed``. Raises ``ValueError`` without prompts, or if their numbers of answers differ.
    """
    sizes = {len(samples) for samples in answers}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every prompt needs the same number of answers, at least one; got {sorted(sizes)}")
    (k,) = sizes
    right = [sum(answer.correct for answer in samples) for samples in answers]
    columns: dict[str, list[float]] = {f"avg@{k}": [count / k for count in right]}
    for size in powers_up_to(k):
        columns[f"pass@{size}"] = [pass_at_k(k, count, size) for count in right]
    if any(answer.predicted for samples in answers for answer in samples):
        columns[f"maj@{k}"] = [majority(samples) for samples in answers]
    columns["length_mean"] = [sum(answer.num_tokens for answer in samples) / k for samples in answers]
    columns["truncated_share"] = [sum(answer.truncated for answer in samples) / k for samples in answers]
    return with_intervals(columns, seed=seed)


def with_intervals(columns: Mapping[str, Sequence[float]], *, seed: int) -> dict[str, Score]:
    """The mean of each column [prompts] with its percentile interval (Efron and Tibshirani, 1993, section 13.3).

    All columns are resampled together. Prompts are drawn from raw 64-bit words, which NumPy keeps across its versions.
    """
    values_PS = np.array(list(columns.values()), dtype=np.float64).T  # P prompts, S scores
    num_prompts = len(values_PS)
    bits = np.random.PCG64(np.random.SeedSequence([seed]))
    means = []
    for first in range(0, RESAMPLES, CHUNK):
        words = bits.random_raw(min(CHUNK, RESAMPLES - first) * num_prompts).reshape(-1, num_prompts)
        drawn = ((words >> np.uint64(11)) * 2.0**-53 * num_prompts).astype(np.int64)
        counts = np.stack([np.bincount(row, minlength=num_prompts) for row in drawn])
        means.append(counts @ values_PS / num_prompts)
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail], axis=0)
    return {
        name: Score(float(np.mean(values)), float(low[column]), float(high[column]))
        for column, (name, values) in enumerate(columns.items())
    }
