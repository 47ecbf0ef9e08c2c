"""Layout of completions that share their prompts: every prompt is computed once, and nothing is padded.

Owned here: which flat rows a microbatch has, the order of them, and where attention finds each sequence among them.
Pure index arithmetic; knows no model and no loss.

A microbatch is a list of flat rows: for each distinct prompt its tokens, then the completions that answer it, each
without its last token (which predicts nothing). Only attention needs sequences side by side: it gathers them into
blocks of similar length [b, L], prompts repeated, and takes one copy of every row back.

Dimension key: N = flat rows, b = sequences of a block, L = its longest, M = rows whose home is the block, E = further
copies of a prompt's rows in it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A block takes sequences down to this share of its longest: the places wasted cost as much as another block's calls.
SHORTEST_SHARE = 0.75
# Places in blocks per row that a microbatch may have, padding included: bounds memory where prompts are long.
MOST_PLACES = 2.0


class Block(NamedTuple):
    """Sequences that attend side by side. Arrays are int64."""

    row_bL: np.ndarray  # flat row of each place; padding stands behind a sequence and names row 0
    home_row_M: np.ndarray  # flat rows that are computed in this block
    home_M: np.ndarray  # their places in row_bL.flatten()
    copy_row_E: np.ndarray  # flat rows of prompts that are here again: keys and values are used, queries are not
    copy_E: np.ndarray  # their places


class SharedLayout(NamedTuple):
    """All flat rows of a microbatch."""

    ids_N: np.ndarray  # int64
    positions_N: np.ndarray  # int64: place within its sequence
    rows: list[np.ndarray]  # of each sequence: the flat row of each of its positions
    blocks: list[Block]


def lay_out(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> SharedLayout:
    """Flat rows and attention blocks of sequences, given by their prompt and completion ids."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    shared: dict[bytes, np.ndarray] = {}
    rows, size = [], 0

    def append(tokens: np.ndarray, first: int) -> np.ndarray:
        nonlocal size
        ids.append(tokens)
        positions.append(np.arange(first, first + len(tokens)))
        size += len(tokens)
        return np.arange(size - len(tokens), size)

    for prompt, completion in zip(prompts, completions, strict=True):
        key = prompt.tobytes()
        if key not in shared:
            shared[key] = append(prompt, 0)
        rows.append(np.concatenate((shared[key], append(completion[:-1], len(prompt)))))
    return SharedLayout(np.concatenate(ids).astype(np.int64), np.concatenate(positions), rows, _blocks(rows, size))


def row_cost(prompt_tokens: int, completions: Sequence[int]) -> int:
    """What completions of one prompt take of the token budget, given numbers of tokens: their flat rows.

    More where their places in blocks would otherwise exceed ``MOST_PLACES`` times the budget.
    """
    rows = prompt_tokens + sum(completions) - len(completions)
    places = len(completions) * (prompt_tokens - 1) + sum(completions)
    return max(rows, math.ceil(places / (MOST_PLACES * SHORTEST_SHARE)))


def _blocks(rows: Sequence[np.ndarray], size: int) -> list[Block]:
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    blocks, seen = [], np.zeros(size, dtype=bool)
    start = 0
    while start < len(order):
        longest = len(rows[order[start]])
        end = start
        while end < len(order) and len(rows[order[end]]) >= SHORTEST_SHARE * longest:
            end += 1
        blocks.append(_block([rows[index] for index in order[start:end]], longest, seen))
        start = end
    return blocks


def _block(rows: Sequence[np.ndarray], longest: int, seen: np.ndarray) -> Block:
    """``seen`` says which flat rows have their home in a block before; updated."""
    table = np.zeros((len(rows), longest), dtype=np.int64)
    for line, own in zip(table, rows, strict=True):
        line[: len(own)] = own
    lengths = np.array([len(own) for own in rows])
    places = np.flatnonzero(np.arange(longest) < lengths[:, None])
    of_places = table.reshape(-1)[places]
    _, first = np.unique(of_places, return_index=True)
    home = np.zeros(len(places), dtype=bool)
    home[first] = ~seen[of_places[first]]
    seen[of_places] = True
    return Block(table, of_places[home], places[home], of_places[~home], places[~home])
