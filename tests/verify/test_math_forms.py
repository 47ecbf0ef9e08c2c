"""Families of answers and truths (``tests/data/math``): what is right is right, what is wrong is wrong.

Each file is a family of one JSON object a line: a text, a truth, and whether the text's answer is right. The functions
run in this process, without the time limit of ``VerifierPool``: no row needs it.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_async.verify.extraction import find_answer
from dapo_async.verify.grammar import NotMathematics, read_expression
from dapo_async.verify.math_equivalence import check_equivalence, is_equal
from dapo_async.verify.notation import canonical, normalise, plain_text
from dapo_async.verify.structure import Group, Leaf, Unbalanced, readings
from tests import ROOT

FAMILIES = sorted((ROOT / "tests/data/math").glob("*.jsonl"))
PIECES = [
    *"0123456789 xyei+-=/^_(){}[],.;:!|$\n%'½²",
    *(
        "\\",
        "\\$",
        "\\frac",
        "\\sqrt",
        "\\text{",
        "\\left",
        "\\right",
        "\\boxed{",
        "\\{",
        "\\}",
        "\\pm",
        "\\ldots",
        "\\cup",
    ),
    *("\\\\", "\\begin{array}", "\\end{array}", "Answer:", " and ", "cm"),
]


@cache
def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truths() -> list[str]:
    return list(dict.fromkeys(row["truth"] for path in FAMILIES for row in rows(path)))


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_what_is_right_is_right_and_what_is_wrong_is_wrong(path: Path) -> None:
    found = [(row, check_equivalence(row["answer"], row["truth"])[0]) for row in rows(path)]
    assert [row for row, correct in found if correct != row["right"]] == []


def test_every_family_has_many_members_of_both_kinds() -> None:
    assert len(FAMILIES) == 14
    for path in FAMILIES:
        right = [row["right"] for row in rows(path)]
        assert right.count(True) >= 10, path
        assert right.count(False) >= (0 if path.stem == "truths" else 10), path


def test_every_truth_is_right_for_itself() -> None:
    assert [truth for truth in truths() if not is_equal(truth, truth)] == []


def test_what_is_cut_off_in_its_brackets_is_never_right() -> None:
    wrong = []
    for truth in truths():
        for end in range(1, len(truth)):
            try:
                readings(normalise(truth[:end]))
            except Unbalanced:
                wrong += [(truth[:end], truth)] if is_equal(truth, truth[:end]) else []
    assert wrong == []


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_has_an_answer_or_none_and_one_spelling(text: str) -> None:
    answer = find_answer(text)
    assert answer is None or answer == answer.strip() != ""
    spelling = normalise(text)
    assert not spelling or is_equal(text, text)
    assert canonical(text) == canonical(text + " ")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 5\nanswer :  **$7$**. \n", "$7$**."),
        (r"\boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"1, \frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("Answer: " + "1" * 5000, "1" * 2000),
        ("33", None),
    ],
)
def test_which_part_is_the_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


# --- the grammar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2(3)", "6"),
        (r"\frac12", "1/2"),
        (r"2\binom{4}{2}", "12"),
        ("0.1", "1/10"),
        ("-3^2", "-9"),
        ("2^10", "1024"),
        ("1/2x", "1/(2*x)"),
        ("1/2 x", "x/2"),
        ("f(2x)", "f(2*x)"),
        (r"\sin^2 x\cos x", "sin(x)**2*cos(x)"),
        ("||x|-1|", "Abs(Abs(x) - 1)"),
        (r"\log_2 8", "log(8)/log(2)"),
        ("x'", "x'"),
    ],
)
def test_what_the_grammar_reads(text: str, value: str) -> None:
    assert str(read_expression(text)) == value


REFUSED = (
    *(
        "",
        "1+",
        "2 3",
        "x2",
        "(1",
        "1)",
        r"\frac{1}",
        r"\sqrt",
        r"\unknown x",
        "1=1",
        "1,2",
        "2^",
        "2^3^2",
        "1/0",
        "5!!!!!!",
    ),
    *(r"x\ldots y", r"9^{9^{9^9}}", "100000!", r"\binom{99999}{50000}", "(" * 99 + "1" + ")" * 99),
)


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_grammar_refuses(text: str) -> None:
    with pytest.raises(NotMathematics):
        read_expression(text)


# --- structures and spellings ----------------------------------------------------------------------------


def test_a_comma_between_thousands_has_two_readings_but_for_in_brackets() -> None:
    assert readings("1,234") == [Group("", [Leaf("1"), Leaf("234")], ""), Leaf("1234")]
    assert readings("(1,234)") == [Group("(", [Leaf("1"), Leaf("234")], ")")]


@pytest.mark.parametrize("text", ["(1", "1)", "\\{1", r"\begin{cases}1", "1,,2", "", "(" * 30 + "1" + ")" * 30 + ","])
def test_what_does_not_balance_has_no_structure(text: str) -> None:
    with pytest.raises(Unbalanced):
        readings(text)


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        (r"\$1{,}234.00", "1234"),
        ("2468/2", "1234"),
        (r"\boxed{1234}", "1234"),
        ("$1,234$", "1234"),
        ("3½", "7/2"),
        (r"x = \dfrac{7}{2}", "7/2"),
        ("5!", "5!"),
        ("1/0", "1/0"),
        (r"\text{Friday}.", "friday"),
        ("(1,234)", "(1,234)"),
        ("[INVALID]", "[INVALID]"),
        ("", ""),
    ],
)
def test_canonical_spellings(text: str, spelling: str) -> None:
    assert canonical(text) == spelling


def test_a_text_without_mathematics_keeps_what_parts_it() -> None:
    assert plain_text(r"\frac{1}{23}") != plain_text(r"\frac{12}{3}")
    assert plain_text("4 5") != plain_text("45")
    assert plain_text("n!") != plain_text("n")
