"""``batching``: properties of the plan, and the layout of a microbatch token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.batching import MicroBatch, TrainSequence, build_microbatch, plan_microbatches

torch.set_num_threads(1)


def make_sequence(prompt: list[int], tokens: list[int], **fields: float) -> TrainSequence:
    return TrainSequence(
        np.array(prompt, np.int32),
        np.array(tokens, np.int32),
        -np.arange(1, len(tokens) + 1, dtype=np.float32),
        **({"advantage": 0.0, "group": 0} | fields),  # type: ignore[arg-type]
    )


def cost(plan: list[list[int]], lengths: list[int], padded: bool) -> list[int]:
    return [len(run) * max(lengths[i] for i in run) if padded else sum(lengths[i] for i in run) for run in plan]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 300), st.booleans())
def test_every_sequence_once_within_budget_and_always_the_same(lengths: list[int], budget: int, padded: bool) -> None:
    plan = plan_microbatches(lengths, budget, padded=padded)
    assert sorted(index for run in plan for index in run) == list(range(len(lengths)))
    assert all(run for run in plan)
    assert all(size <= budget for size in cost(plan, lengths, padded))
    assert plan == plan_microbatches(list(lengths), budget, padded=padded)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(60, 300))
def test_padded_plan_has_the_fewest_runs_of_the_sorted_order(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget, padded=True)
    sizes = sorted(lengths, reverse=True)
    fewest = [0] + [len(sizes) + 1] * len(sizes)  # fewest[n]: runs that the n longest need, by trying every last run
    for end in range(1, len(sizes) + 1):
        fits = [start for start in range(end) if (end - start) * sizes[start] <= budget]
        fewest[end] = 1 + min(fewest[start] for start in fits)
    assert len(plan) == fewest[-1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(60, 300))
def test_packed_plan_wastes_little(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget, padded=False)
    # The emptiest-first deal overflows a bin only when every bin is above budget - longest.
    room = budget - max(lengths) + 1
    assert len(plan) <= max(-(-sum(lengths) // room), 1)


def test_plans_by_hand() -> None:
    # Sorted 5 4 3 3 2: rows x longest within 10 are (5 4), (3 3 2).
    assert plan_microbatches([3, 5, 2, 4, 3], 10, padded=True) == [[1, 3], [0, 4, 2]]
    # 17 tokens need two bins, each token run to the emptier: 5 | 4, then 3 to the 4, 3 to the 5, 2 to the 7.
    assert plan_microbatches([3, 5, 2, 4, 3], 10, padded=False) == [[1, 4], [3, 0, 2]]
    # Three runs are needed; even ones are preferred to two full ones and a rest.
    assert [len(run) for run in plan_microbatches([10] * 9, 40, padded=True)] == [3, 3, 3]
    assert plan_microbatches([], 10, padded=True) == plan_microbatches([], 10, padded=False) == []


@pytest.mark.parametrize("length", [0, 11])
@pytest.mark.parametrize("padded", [True, False])
def test_refuses_a_length_no_microbatch_can_hold(length: int, padded: bool) -> None:
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens: must be 1 to 10"):
        plan_microbatches([4, length], 10, padded=padded)


BATCH = [
    make_sequence([1], [2]),
    make_sequence([3, 4], [5, 6, 7], advantage=1.5, group=1, weight=0.5),
    make_sequence([8, 9, 1], [2, 3], advantage=-2.0, group=1, masked=True),
]


def test_padded_layout_by_hand() -> None:
    micro = build_microbatch(BATCH, [1, 2], padded=True)
    assert micro.input_ids.tolist() == [[3, 4, 5, 6], [8, 9, 1, 2]]
    assert micro.position_ids is None
    assert micro.cu_seqlens is None
    assert micro.max_length == 4
    assert micro.predict_T.tolist() == [1, 2, 3, 6, 7]
    check_columns(micro)


def test_packed_layout_by_hand() -> None:
    micro = build_microbatch(BATCH, [1, 2], padded=False)
    assert micro.input_ids.tolist() == [[3, 4, 5, 6, 8, 9, 1, 2]]
    assert micro.position_ids is not None
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert micro.cu_seqlens is not None
    assert micro.cu_seqlens.tolist() == [0, 4, 8]
    assert micro.cu_seqlens.dtype == torch.int32
    assert micro.predict_T.tolist() == [1, 2, 3, 6, 7]
    check_columns(micro)


def check_columns(micro: MicroBatch) -> None:
    assert micro.indices == [1, 2]
    assert micro.target_T.tolist() == [5, 6, 7, 2, 3]
    assert micro.behaviour_T.tolist() == [-1, -2, -3, -1, -2]
    assert micro.advantage_T.tolist() == [1.5, 1.5, 1.5, -2, -2]
    assert micro.weight_T.tolist() == [0.5, 0.5, 0.5, 1, 1]
    assert micro.mask_T.tolist() == [True, True, True, False, False]
    assert micro.sequence_T.tolist() == [0, 0, 0, 1, 1]
    assert micro.batch_T.tolist() == [1, 2, 3, 4, 5]
    floats = (micro.behaviour_T, micro.advantage_T, micro.weight_T)
    assert {column.dtype for column in floats} == {torch.float32}
    integers = (micro.input_ids, micro.predict_T, micro.target_T, micro.sequence_T, micro.batch_T)
    assert {column.dtype for column in integers} == {torch.int64}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=20), st.booleans())
def test_every_token_is_predicted_from_the_one_before_it_and_finds_its_place_in_the_batch(
    shapes: list[tuple[int, int]], padded: bool
) -> None:
    rng = np.random.default_rng(0)
    batch = [make_sequence(rng.integers(100, size=p).tolist(), rng.integers(100, size=t).tolist()) for p, t in shapes]
    wanted = np.concatenate([sequence.token_ids for sequence in batch])
    before = np.concatenate([np.append(s.prompt_ids, s.token_ids)[len(s.prompt_ids) - 1 : -1] for s in batch])
    targets, inputs = np.full(len(wanted), -1), np.full(len(wanted), -1)
    for indices in plan_microbatches([sequence.num_inputs for sequence in batch], 40, padded=padded):
        micro = build_microbatch(batch, indices, padded=padded)
        targets[micro.batch_T] = micro.target_T
        inputs[micro.batch_T] = micro.input_ids.flatten()[micro.predict_T]
        assert [micro.indices[i] for i in micro.sequence_T.unique().tolist()] == indices
    np.testing.assert_array_equal(targets, wanted)
    np.testing.assert_array_equal(inputs, before)


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        (make_sequence([], [1]), "needs a prompt and a completion"),
        (make_sequence([1], []), "needs a prompt and a completion"),
        (make_sequence([1], [2, 3])._replace(behaviour_logp=np.zeros(1, np.float32)), "2 tokens but 1 behaviour"),
    ],
)
def test_refuses_malformed_sequences(sequence: TrainSequence, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_microbatch([BATCH[0], sequence], [0, 1], padded=True)


def test_refuses_an_empty_microbatch() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        build_microbatch(BATCH, [], padded=True)
