"""The chains of the demo: texts by hand, every chain once, and nothing held out that is trained on."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_async.demo import sums
from dapo_async.errors import ConfigError

CHAIN = "3+5-2+9="


@st.composite
def chains(draw: st.DrawFn) -> str:
    terms = draw(st.integers(2, 9))
    return sums.chain_at(draw(st.integers(0, sums.num_chains(terms) - 1)), terms)


def test_texts_by_hand() -> None:
    assert sums.running_totals(CHAIN) == [3, 8, 6, 15]
    assert sums.terse_answer(CHAIN) == "#15"
    assert sums.worked_answer(CHAIN) == "3+5=8;8-2=6;6+9=15;#15"
    assert sums.worked_answer("9-9+1=") == "9-9=0;0+1=1;#1"


@given(chains())
def test_any_chain_is_of_digits_stays_above_zero_and_is_spelled_in_the_alphabet(chain: str) -> None:
    assert all(c in "123456789" for c in chain[:-1:2])
    assert min(sums.running_totals(chain)) >= 0
    assert sums.running_totals(chain)[-1] == eval(chain[:-1])
    assert set(chain + sums.worked_answer(chain)) <= set(sums.ALPHABET)


@given(chains())
def test_every_worked_step_is_true_and_starts_where_the_last_one_ended(chain: str) -> None:
    *steps, total = sums.worked_answer(chain).split(";")
    ends = [step.split("=") for step in steps]
    assert all(eval(left) == int(right) for left, right in ends)
    assert [left[:-2] for left, _ in ends] == [chain[0], *(right for _, right in ends[:-1])]
    assert "".join([chain[0], *(left[-2:] for left, _ in ends)]) + "=" == chain
    assert total == sums.terse_answer(chain) == f"#{ends[-1][1]}"


def test_each_rank_is_one_chain_and_all_chains_have_a_rank() -> None:
    ranked = [sums.chain_at(rank, 3) for rank in range(sums.num_chains(3))]
    by_force = [
        f"{a}{s}{b}{t}{c}="
        for a in range(1, 10)
        for s in "+-"
        for b in range(1, 10)
        for t in "+-"
        for c in range(1, 10)
        if eval(f"{a}{s}{b}") >= 0 and eval(f"{a}{s}{b}{t}{c}") >= 0
    ]
    assert len(ranked) == 1899
    assert sorted(ranked) == sorted(by_force)


def test_drawn_chains_have_every_number_of_terms_equally_often() -> None:
    rng = random.Random(0)
    lengths = Counter(len(sums.draw_chain(rng, 3, 7)) // 2 for _ in range(5000))
    assert set(lengths) == {3, 4, 5, 6, 7}
    assert all(900 < count < 1100 for count in lengths.values())


def test_split_is_disjoint_free_of_duplicates_and_equal_over_terms() -> None:
    train, heldout = sums.split_chains(2000, 512, 3, 7, random.Random(0))
    assert (len(set(train)), len(set(heldout)), len(set(train + heldout))) == (2000, 512, 2512)
    assert set(Counter(len(chain) for chain in train).values()) == {400}
    assert set(Counter(len(chain) for chain in heldout).values()) == {102, 103}


def test_split_takes_what_exists_of_short_chains_and_more_of_the_others() -> None:
    train, heldout = sums.split_chains(1000, 300, 2, 3, random.Random(0))
    assert Counter(len(chain) // 2 for chain in heldout) == {2: 63, 3: 237}
    assert Counter(len(chain) // 2 for chain in train) == {2: 63, 3: 937}
    assert not set(train) & set(heldout)


def test_split_is_fixed_by_its_generator() -> None:
    assert sums.split_chains(50, 20, 3, 7, random.Random(1)) == sums.split_chains(50, 20, 3, 7, random.Random(1))
    assert sums.split_chains(50, 20, 3, 7, random.Random(1)) != sums.split_chains(50, 20, 3, 7, random.Random(2))


@pytest.mark.parametrize(
    ("train", "heldout", "words"),
    [(10, 64, "demo.heldout_prompts = 64: there are only 63"), (67, 60, "demo.train_prompts = 67: there are only 66")],
)
def test_more_chains_than_exist_are_refused(train: int, heldout: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sums.split_chains(train, heldout, 2, 2, random.Random(0))
