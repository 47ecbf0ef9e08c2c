"""Sequences to train on, split into microbatches under a token budget, and laid out for one forward pass.

Owns the plan (which sequences share a forward pass) and the layout (padded rows, one packed row, or flat rows with
every prompt once). Knows no model and no loss. Per-token columns hold completion tokens only, so padding has no place
in them.

Dimension key: T = completion tokens of a microbatch, N = its input positions without padding, b = its sequences,
L = its longest sequence.
"""

import bisect
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dapo_async.model.prompt_sharing import Block, lay_out, row_cost

Layout = Literal["padded", "packed", "shared"]  # see ``MicroBatch``


class TrainSequence(NamedTuple):
    """One completion with everything the loss needs to know about it."""

    prompt_ids: np.ndarray  # int32 [P], P >= 1
    token_ids: np.ndarray  # int32 [T], T >= 1, stop token included
    behaviour_logp: np.ndarray  # float32 [T], nats
    advantage: float
    group: int  # index of its group in the batch
    fresh: bool = False  # sampled by the very weights it is trained on first
    masked: bool = False  # overlong filter: in the group's statistics, not in the loss
    weight: float = 1.0  # weight of each of its tokens in the loss

    @property
    def num_inputs(self) -> int:
        """Positions it takes in a forward pass: the last token predicts nothing, so it is not fed."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


class MicroBatch(NamedTuple):
    """What one forward pass needs, and the columns of its completion tokens, sequence after sequence.

    Padded: ``input_ids`` [b, L], right-padded; causal attention never lets a token see what is right of it, so
    no attention mask is needed. Packed: ``input_ids`` and ``position_ids`` [1, N], ``cu_seqlens`` int32 [b + 1].
    Shared: ``input_ids`` and ``position_ids`` [1, N], every prompt once, and ``blocks`` for attention.
    """

    input_ids: Tensor  # int64
    position_ids: Tensor | None  # int64 [1, N]; None when padded: each row counts from 0
    cu_seqlens: Tensor | None  # int32 [b + 1]; packed only
    max_length: int  # longest sequence, in input positions
    predict_T: Tensor  # int64: row of input_ids.flatten() whose hidden state predicts the token
    target_T: Tensor  # int64: the token
    behaviour_T: Tensor  # float32, nats
    advantage_T: Tensor  # float32
    weight_T: Tensor  # float32
    mask_T: Tensor  # bool: counts in the loss
    fresh_T: Tensor  # bool: sampled by the very weights it is trained on first
    sequence_T: Tensor  # int64: which of the b sequences, 0 .. b - 1
    batch_T: Tensor  # int64: position in the concatenation of all sequences' completions, in batch order
    indices: list[int]  # the b sequences, as indices into the batch
    blocks: list[Block] | None = None  # shared only


def microbatches(
    sequences: Sequence[TrainSequence], token_budget: int, *, layout: Layout, device: torch.device
) -> Iterator[MicroBatch]:
    """All of ``sequences``, planned and laid out, one forward pass after the other."""
    if layout == "shared":
        for indices in plan_shared(sequences, token_budget):
            yield build_shared(sequences, indices, device=device)
        return
    padded, lengths = layout == "padded", [sequence.num_inputs for sequence in sequences]
    for indices in plan_microbatches(lengths, token_budget, padded=padded):
        yield build_microbatch(sequences, indices, padded=padded, device=device)


def plan_microbatches(lengths: Sequence[int], token_budget: int, *, padded: bool) -> list[list[int]]:
    """Split sequences of ``lengths`` input positions into few microbatches of about equal size, none above budget.

    Padded: sequences are sorted by length and cut into runs with rows * longest <= ``token_budget``; the number
    of runs is the smallest possible for that order. Packed: the sum of lengths stays within the budget. Returns
    indices into ``lengths``, each exactly once; the same input gives the same plan, on any machine.
    Raises ``ValueError`` for a length below 1 or above the budget.
    """
    for index, length in enumerate(lengths):
        _check_length(index, length, token_budget)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    sizes = [lengths[index] for index in order]
    runs = _plan_padded(sizes, token_budget) if padded else _plan_packed(sizes, token_budget)
    return [[order[place] for place in run] for run in runs]


def _check_length(index: int, length: int, token_budget: int) -> None:
    if not 1 <= length <= token_budget:
        raise ValueError(f"sequence {index} has {length} tokens: must be 1 to {token_budget} (the token budget)")


def _plan_padded(sizes: list[int], budget: int) -> list[list[int]]:
    """Cut ``sizes`` (falling) into runs. The smallest budget that needs no more runs makes them even."""
    if not sizes:
        return []
    fewest = len(_cut(sizes, budget))
    candidates = range(sizes[0], budget + 1)
    even = bisect.bisect_left(candidates, True, key=lambda bound: len(_cut(sizes, bound)) <= fewest)
    starts = [*_cut(sizes, candidates[even]), len(sizes)]
    return [list(range(start, end)) for start, end in itertools.pairwise(starts)]


def _cut(sizes: list[int], budget: int) -> list[int]:
    """Starts of the longest runs with rows * first <= budget, from the left."""
    starts, place = [], 0
    while place < len(sizes):
        starts.append(place)
        place += budget // sizes[place]
    return starts


def _plan_packed(sizes: list[int], budget: int) -> list[list[int]]:
    """Deal ``sizes`` (falling) to the emptiest of as few bins as hold them."""
    if not sizes:
        return []
    # No two sequences above half the budget share a bin.
    lowest = max(-(-sum(sizes) // budget), sum(2 * size > budget for size in sizes))
    counts = range(max(lowest, 1), len(sizes) + 1)
    found = bisect.bisect_left(counts, True, key=lambda bins: _deal(sizes, bins, budget) is not None)
    bins = _deal(sizes, counts[found], budget)
    assert bins is not None  # as many bins as sequences always suffice
    return bins


def _deal(sizes: list[int], bins: int, budget: int) -> list[list[int]] | None:
    """Longest first, each to the emptiest bin; ``None`` if one overflows."""
    loads = [(0, number) for number in range(bins)]
    content: list[list[int]] = [[] for _ in range(bins)]
    for place, size in enumerate(sizes):
        load, number = loads[0]
        if load + size > budget:
            return None
        heapq.heapreplace(loads, (load + size, number))
        content[number].append(place)
    return [run for run in content if run]


def plan_shared(sequences: Sequence[TrainSequence], token_budget: int) -> list[list[int]]:
    """Split into few microbatches that compute each prompt once, none of more than ``token_budget`` rows.

    Completions of one prompt stay together; where they do not fit they are split, and each part computes the prompt.
    Returns and raises as ``plan_microbatches``.
    """
    answers: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        _check_length(index, sequence.num_inputs, token_budget)
        answers.setdefault(sequence.prompt_ids.tobytes(), []).append(index)
    parts = [part for indices in answers.values() for part in _parts(sequences, indices, token_budget)]
    costs = [_cost(sequences, part) for part in parts]
    order = sorted(range(len(parts)), key=lambda part: (-costs[part], part))
    bins = _plan_packed([costs[part] for part in order], token_budget)
    return [[index for place in places for index in parts[order[place]]] for places in bins]


def _parts(sequences: Sequence[TrainSequence], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Completions of one prompt, longest first, in as many parts as the budget demands."""
    parts: list[list[int]] = []
    for index in sorted(indices, key=lambda index: (-len(sequences[index].token_ids), index)):
        if not parts or _cost(sequences, [*parts[-1], index]) > budget:
            parts.append([])
        parts[-1].append(index)
    return parts


def _cost(sequences: Sequence[TrainSequence], indices: Sequence[int]) -> int:
    """Of completions of one prompt."""
    return row_cost(len(sequences[indices[0]].prompt_ids), [len(sequences[index].token_ids) for index in indices])


def _ids(sequences: Sequence[TrainSequence], indices: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompt ids and completion ids."""
    return [sequences[index].prompt_ids for index in indices], [sequences[index].token_ids for index in indices]


def build_microbatch(
    sequences: Sequence[TrainSequence], indices: Sequence[int], *, padded: bool, device: torch.device | str = "cpu"
) -> MicroBatch:
    """Lay out ``sequences[i] for i in indices`` for one forward pass on ``device``, padded or packed.

    Raises ``ValueError`` if ``indices`` is empty, or a sequence has an empty prompt or completion or a number of
    log-probs that differs from its number of tokens.
    """
    chosen = _chosen(sequences, indices)
    inputs = np.array([sequence.num_inputs for sequence in chosen])
    longest = int(inputs.max())
    starts = np.arange(len(chosen)) * longest if padded else np.cumsum(inputs) - inputs
    within_N = _ranges(inputs)
    ids = np.zeros(len(chosen) * longest if padded else int(inputs.sum()), dtype=np.int64)
    ids[np.repeat(starts, inputs) + within_N] = np.concatenate(
        [part for sequence in chosen for part in (sequence.prompt_ids, sequence.token_ids[:-1])]
    )
    edges = np.append(starts, inputs.sum()).astype(np.int32)
    predict = [start + np.arange(len(s.prompt_ids) - 1, s.num_inputs) for start, s in zip(starts, chosen, strict=True)]
    return MicroBatch(
        input_ids=_tensor(ids, device).view(-1, longest) if padded else _tensor(ids, device)[None],
        position_ids=None if padded else _tensor(within_N, device)[None],
        cu_seqlens=None if padded else _tensor(edges, device),
        max_length=longest,
        predict_T=_tensor(np.concatenate(predict), device),
        **_columns(sequences, indices, device),
    )


def build_shared(
    sequences: Sequence[TrainSequence], indices: Sequence[int], *, device: torch.device | str = "cpu"
) -> MicroBatch:
    """Lay out ``sequences[i] for i in indices`` as flat rows, every distinct prompt once. Raises as the other."""
    chosen = _chosen(sequences, indices)
    layout = lay_out(*_ids(sequences, indices))
    predict = [rows[len(s.prompt_ids) - 1 :] for rows, s in zip(layout.rows, chosen, strict=True)]
    return MicroBatch(
        input_ids=_tensor(layout.ids_N, device)[None],
        position_ids=_tensor(layout.positions_N, device)[None],
        cu_seqlens=None,
        max_length=max(sequence.num_inputs for sequence in chosen),
        predict_T=_tensor(np.concatenate(predict), device),
        **_columns(sequences, indices, device),
        blocks=layout.blocks,
    )


def _columns(sequences: Sequence[TrainSequence], indices: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """What ``MicroBatch`` knows of every completion token; nothing here depends on the layout."""
    chosen = [sequences[index] for index in indices]
    tokens = np.array([len(sequence.token_ids) for sequence in chosen])
    offsets = np.cumsum([0] + [len(sequence.token_ids) for sequence in sequences])[list(indices)]

    def column(values: Sequence[float], dtype: type) -> Tensor:
        return _tensor(np.repeat(np.array(values, dtype=dtype), tokens), device)

    return {
        "target_T": _tensor(np.concatenate([s.token_ids for s in chosen]).astype(np.int64), device),
        "behaviour_T": _tensor(np.concatenate([s.behaviour_logp for s in chosen]).astype(np.float32), device),
        "advantage_T": column([sequence.advantage for sequence in chosen], np.float32),
        "weight_T": column([sequence.weight for sequence in chosen], np.float32),
        "mask_T": column([not sequence.masked for sequence in chosen], np.bool_),
        "fresh_T": column([sequence.fresh for sequence in chosen], np.bool_),
        "sequence_T": column(range(len(chosen)), np.int64),
        "batch_T": _tensor(np.repeat(offsets, tokens) + _ranges(tokens), device),
        "indices": list(indices),
    }


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(values).to(device)


def _chosen(sequences: Sequence[TrainSequence], indices: Sequence[int]) -> list[TrainSequence]:
    if not indices:
        raise ValueError("a microbatch needs at least one sequence")
    chosen = [sequences[index] for index in indices]
    for index, sequence in zip(indices, chosen, strict=True):
        _check_sequence(index, sequence)
    return chosen


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each n of ``lengths``, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _check_sequence(index: int, sequence: TrainSequence) -> None:
    if not len(sequence.prompt_ids) or not len(sequence.token_ids):
        raise ValueError(
            f"sequence {index} needs a prompt and a completion of at least one token each, "
            f"got {len(sequence.prompt_ids)} and {len(sequence.token_ids)}"
        )
    if len(sequence.behaviour_logp) != len(sequence.token_ids):
        raise ValueError(
            f"sequence {index} has {len(sequence.token_ids)} tokens "
            f"but {len(sequence.behaviour_logp)} behaviour log-probs"
        )
