"""The ``sums`` task: chains of additions and subtractions, their answers, and a split without overlap.

Owns the texts only, not the files (``demo``) nor what judges an answer (``verifier``).
A chain is ``3+5-2+9=``: terms of one digit from 1 to 9, the running total never below 0. It may be answered at
once (terse, ``#15``) or step by step (worked, ``3+5=8;8-2=6;6+9=15;#15``).
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

from dapo_async.errors import ConfigError

ALPHABET = "0123456789+-=;#"
DIGITS = range(1, 10)


def running_totals(chain: str) -> list[int]:
    """The total after each term: ``3+5-2+9=`` gives ``[3, 8, 6, 15]``."""
    totals = [int(chain[0])]
    for step in _operations(chain):
        totals.append(totals[-1] + int(step))
    return totals


def terse_answer(chain: str) -> str:
    """The total at once: ``#15``."""
    return f"#{running_totals(chain)[-1]}"


def worked_answer(chain: str) -> str:
    """One step per operation, then the total: ``3+5=8;8-2=6;6+9=15;#15``."""
    steps = zip(_operations(chain), pairwise(running_totals(chain)), strict=True)
    return "".join(f"{before}{step}={after};" for step, (before, after) in steps) + terse_answer(chain)


def num_chains(terms: int) -> int:
    """How many chains have exactly this many terms."""
    return sum(_num_endings(digit, terms - 1) for digit in DIGITS)


def chain_at(rank: int, terms: int) -> str:
    """The chain with this rank, ``0 <= rank < num_chains(terms)``. Each chain has one rank: no rank, no duplicate."""
    text, total = "", 0
    for left in reversed(range(terms)):
        for step in _steps(total) if text else DIGITS:
            endings = _num_endings(total + step, left)
            if rank < endings:
                break
            rank -= endings
        text += f"{step:+d}" if text else str(step)
        total += step
    return text + "="


def draw_chain(rng: random.Random, min_terms: int, max_terms: int) -> str:
    """A chain of a uniformly drawn number of terms, uniform among the chains of that many terms."""
    terms = rng.randint(min_terms, max_terms)
    return chain_at(rng.randrange(num_chains(terms)), terms)


def split_chains(
    num_train: int, num_heldout: int, min_terms: int, max_terms: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Distinct chains to train on, and others to hold out, in random order; no chain is in both.

    Each number of terms gets an equal part, as far as there are that many chains; half of them at most are held
    out. Raises ``ConfigError`` if there are fewer chains than asked for.
    """
    terms = range(min_terms, max_terms + 1)
    existing = [num_chains(n) for n in terms]
    heldout_parts = _equal_parts(num_heldout, [number // 2 for number in existing], "heldout", terms)
    remaining = [number - part for number, part in zip(existing, heldout_parts, strict=True)]
    train_parts = _equal_parts(num_train, remaining, "train", terms)
    train, heldout = [], []
    for n, number, train_part, heldout_part in zip(terms, existing, train_parts, heldout_parts, strict=True):
        ranks: dict[int, None] = {}
        while len(ranks) < train_part + heldout_part:
            ranks[rng.randrange(number)] = None
        chains = [chain_at(rank, n) for rank in ranks]
        heldout += chains[:heldout_part]
        train += chains[heldout_part:]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def _operations(chain: str) -> list[str]:
    """``3+5-2+9=`` gives ``["+5", "-2", "+9"]``."""
    return [chain[at : at + 2] for at in range(1, len(chain) - 1, 2)]


def _steps(total: int) -> Iterator[int]:
    """What may be added to a running total of ``total``."""
    yield from DIGITS
    yield from (-digit for digit in DIGITS if digit <= total)


@cache
def _num_endings(total: int, terms: int) -> int:
    """Ways to go on from a running total of ``total`` for ``terms`` more terms."""
    return sum(_num_endings(total + step, terms - 1) for step in _steps(total)) if terms else 1


def _equal_parts(num: int, limits: Sequence[int], name: str, terms: range) -> list[int]:
    """Split ``num`` into parts that are equal, or at their limit."""
    if num > sum(limits):
        raise ConfigError(
            f"demo.{name}_prompts = {num}: there are only {sum(limits)} chains of {terms[0]} to {terms[-1]} terms to "
            f"choose from; ask for fewer, or raise demo.max_terms"
        )
    parts = [0] * len(limits)
    smallest_first = sorted(range(len(limits)), key=limits.__getitem__)
    for done, index in enumerate(smallest_first):
        parts[index] = min(limits[index], num // (len(limits) - done))
        num -= parts[index]
    return parts
