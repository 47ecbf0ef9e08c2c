"""``batching``: properties of the plan, and the layout of a microbatch token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.model.batching import (
    MicroBatch,
    TrainSequence,
    build_microbatch,
    build_shared,
    plan_microbatches,
    plan_shared,
)
from dapo_async.model.prompt_sharing import MOST_PLACES

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


# --- every prompt once -----------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> list[TrainSequence]:
    """Groups with a prompt each (some alike), of completions of any length, mixed up."""
    batch = []
    for group in range(draw(st.integers(1, 6))):
        prompt = [draw(st.integers(0, 2))] * draw(st.integers(1, 20))
        lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
        batch += [make_sequence(prompt, list(range(length)), group=group) for length in lengths]
    return draw(st.permutations(batch))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(groups(), st.integers(50, 300))
def test_a_shared_plan_bounds_rows_and_places(batch: list[TrainSequence], budget: int) -> None:
    plan = plan_shared(batch, budget)
    assert sorted(index for run in plan for index in run) == list(range(len(batch)))
    assert plan == plan_shared(batch, budget)
    for indices in plan:
        micro = build_shared(batch, indices)
        assert micro.blocks is not None
        assert micro.input_ids.numel() <= budget
        assert sum(block.row_bL.size for block in micro.blocks) <= MOST_PLACES * budget


@settings(max_examples=100, deadline=None, derandomize=True)
@given(groups())
def test_shared_rows_are_those_of_each_sequence(batch: list[TrainSequence]) -> None:
    """Followed through the blocks, every sequence reads its own tokens; every row has one home."""
    indices = list(range(len(batch)))
    micro, plain = build_shared(batch, indices), build_microbatch(batch, indices, padded=False)
    assert micro.blocks is not None
    assert micro.position_ids is not None
    ids, positions = micro.input_ids[0].numpy(), micro.position_ids[0].numpy()
    found = []
    for block in micro.blocks:
        places = np.concatenate((block.home_M, block.copy_E))
        assert (block.row_bL.reshape(-1)[places] == np.concatenate((block.home_row_M, block.copy_row_E))).all()
        there = np.zeros(block.row_bL.size, dtype=bool)
        there[places] = True
        for rows, real in zip(block.row_bL, there.reshape(block.row_bL.shape), strict=True):
            found.append(ids[rows[real]].tolist())
            assert positions[rows[real]].tolist() == list(range(real.sum()))
    inputs = [[*sequence.prompt_ids.tolist(), *sequence.token_ids[:-1].tolist()] for sequence in batch]
    assert sorted(found) == sorted(inputs)
    homes = np.concatenate([block.home_row_M for block in micro.blocks])
    assert sorted(homes.tolist()) == list(range(len(ids)))
    assert len(ids) == sum({s.prompt_ids.tobytes(): len(s.prompt_ids) for s in batch}.values()) + sum(
        len(s.token_ids) - 1 for s in batch
    )
    assert (ids[micro.predict_T] == plain.input_ids[0].numpy()[plain.predict_T]).all()
    assert torch.equal(micro.target_T, plain.target_T)


def test_a_shared_plan_by_hand() -> None:
    """Prompts of 4: two answers of 5 take 4 + 4 + 4 rows; three of 3, 2 and 1 take 7, but 15 / 1.5 for places."""
    short = [make_sequence([1, 2, 3, 4], list(range(n)), group=0) for n in (2, 3, 1)]
    long = [make_sequence([5, 6, 7, 8], list(range(5)), group=1) for _ in range(2)]
    assert plan_shared([*short, *long], 22) == [[3, 4, 1, 0, 2]]
    assert plan_shared([*short, *long], 21) == [[3, 4], [1, 0, 2]]
    assert plan_shared([*short, *long], 8) == [[1, 0], [3], [4], [2]]
    with pytest.raises(ValueError, match="sequence 3 has 8 tokens: must be 1 to 7"):
        plan_shared([*short, *long], 7)


def test_long_prompts_take_more_than_their_rows() -> None:
    """8 answers of one token to a prompt of 90: 90 rows, but 720 places for attention, which need memory too."""
    batch = [make_sequence([1] * 90, [2], group=0) for _ in range(8)]
    plan = plan_shared(batch, 100)
    assert len(plan) == 8
    assert [len(run) for run in plan_shared(batch, 240)] == [4, 4]
