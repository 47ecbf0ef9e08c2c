"""Whether an answer is mathematically equal to the truth.

Both are found and written alike (``extraction``, ``notation``), taken apart (``structure``), and their expressions read
to the last sign (``grammar``); calculus and products of matrices are left to math-verify's parser. What cannot be read
to its end is no mathematics: it is equal to the same text, and to nothing else. May compute for ever: for child
processes with a time limit.

Decided here, as a strict but fair grader would:

* Decimals are exact: 0.5 is 1/2, and 0.333 is not 1/3.
* ``x = 5`` is 5 if the other side names nothing, and not ``y = 5``; a chain of equalities is its last term.
* Lists and sets have no order, tuples have one; a tuple is equal to a bare list in the same order, a set is not.
* A unit, currency or base that only one side gives is no difference; two that differ are. A percentage is equal to its
  value and, if that is the truth's unit or its number cannot be a share, to the number of percent.
* An inequality is the interval that it describes.
* Ratios are equal if their terms are in proportion; sequences with dots are equal term by term.
"""

import re
from collections.abc import Sequence

import sympy

from dapo_async.verify.dapo_math import NO_ANSWER
from dapo_async.verify.extraction import boxed_answer, find_answer
from dapo_async.verify.notation import normalise, plain_text
from dapo_async.verify.phrases import spoken
from dapo_async.verify.structure import (
    Group,
    Leaf,
    Node,
    Ratio,
    Relation,
    Table,
    Unbalanced,
    Union,
    readings,
)
from dapo_async.verify.units import lone_number, split_unit
from dapo_async.verify.values import exactly_equal, expression, expressions_equal, numeric

NAME = re.compile(r"(?:\\(?!frac|sqrt|begin|pi(?![a-zA-Z]))[a-zA-Z]+|[A-Za-z])(?:_\{[^{}]*\}|_\w|[A-Za-z'{}|() ,\\])*")
CONDITION = re.compile(  # k \in \mathbb{Z}, behind what depends on k
    r"[,;]?\s*(?:\\text\s*\{\s*)?(?:(?:where|for|with)\s*\}?)?\s*"
    r"(?<![a-zA-Z\\])([a-zA-Z](?:\s*,\s*[a-z])*\s*\\in\s*\\mathbb\{[A-Z]\}\S*)$"
)
MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
EQUALITIES = ("=", "\\approx")


def check_equivalence(text: str, truth: str) -> tuple[bool, str]:
    """Whether the answer in ``text`` equals ``truth``, and the answer that was seen (``[INVALID]``: none).

    Raises ``ValueError`` if ``truth`` is empty. May take for ever.
    """
    truth = boxed_answer(truth) or truth
    if not normalise(truth):
        raise ValueError("the truth is empty")
    answer = find_answer(text)
    if answer is None:
        return False, NO_ANSWER
    return is_equal(truth, answer), answer


def is_equal(truth: str, answer: str) -> bool:
    """Whether two texts, each an answer by itself, are equal."""
    return any(texts_equal(normalise(one), normalise(other)) for one in spoken(truth) for other in spoken(answer))


def texts_equal(truth: str, answer: str) -> bool:
    """Of two normalised texts."""
    if not truth or not answer:
        return False
    if plain_text(truth) == plain_text(answer):
        return True
    conditions = [CONDITION.search(text) for text in (truth, answer)]
    if conditions[0] and conditions[1] and plain_text(conditions[0][1]) != plain_text(conditions[1][1]):
        return False
    truth, answer = (
        text[: found.start()] if found and found.start() else text
        for text, found in zip((truth, answer), conditions, strict=True)
    )
    try:
        return any(nodes_equal(one, other) for one in readings(truth) for other in readings(answer))
    except Unbalanced:
        return False


# --- structures --------------------------------------------------------------------------------------------


def nodes_equal(truth: Node, answer: Node) -> bool:
    if isinstance(truth, Leaf) and isinstance(answer, Leaf):
        return leaves_equal(truth.text, answer.text)
    if isinstance(truth, Relation) and isinstance(answer, Relation):
        return relations_equal(truth, answer)
    if isinstance(answer, Relation):
        value = (interval(answer) if is_region(truth) else None) or last_term(answer)
        return value is not None and nodes_equal(truth, value)
    if isinstance(truth, Relation):
        value = (interval(truth) if is_region(answer) else None) or (
            last_term(truth) if is_name(truth.terms[0]) else None
        )
        return value is not None and nodes_equal(value, answer)
    if isinstance(truth, Table) and isinstance(answer, Table):
        return tables_equal(truth, answer)
    if isinstance(truth, Ratio) or isinstance(answer, Ratio):
        return ratios_equal(truth, answer)
    if isinstance(truth, Union) or isinstance(answer, Union):
        return same_members(regions(truth), regions(answer))
    if isinstance(truth, Group) and isinstance(answer, Group):
        return groups_equal(truth, answer)
    return any(
        len(one.parts) == 1 and one.opener == "\\{" and nodes_equal(*pair) for one, pair in singletons(truth, answer)
    )


def singletons(truth: Node, answer: Node) -> list[tuple[Group, tuple[Node, Node]]]:
    """Each side that is a group, with both sides as they are if its one member stands for it."""
    found: list[tuple[Group, tuple[Node, Node]]] = []
    if isinstance(truth, Group) and not isinstance(answer, Group):
        found.append((truth, (truth.parts[0], answer)))
    if isinstance(answer, Group) and not isinstance(truth, Group):
        found.append((answer, (truth, answer.parts[0])))
    return found


def groups_equal(truth: Group, answer: Group) -> bool:
    """Lists, tuples, intervals and sets."""
    kinds = {truth.opener + truth.closer, answer.opener + answer.closer}
    if kinds == {"\\{\\}"}:
        return is_subset(truth.parts, answer.parts) and is_subset(answer.parts, truth.parts)
    if kinds == {""}:
        return lists_equal(truth.parts, answer.parts)
    if kinds == {"", "\\{\\}"} or (kinds == {"[]", "\\{\\}"} and len(truth.parts) > 2):
        return same_members(truth.parts, answer.parts)
    if len(kinds) == 1 or kinds == {"", "()"} or (kinds == {"", "[]"} and len(truth.parts) > 2):
        return in_order(truth.parts, answer.parts)
    return False


def lists_equal(truth: Sequence[Node], answer: Sequence[Node]) -> bool:
    """Bare lists: in any order, but where places mean something (names on one side only, dots)."""
    named = [names(truth), names(answer)]
    dots = any(isinstance(part, Leaf) and "\\ldots" in part.text for part in [*truth, *answer])
    if dots or (any(len(set(found)) > 1 for found in named) and not all(named)):
        return in_order(truth, answer)
    for found, parts, others in ((named[0], truth, answer), (named[1], answer, truth)):
        first = parts[0]
        if (
            len(found) == 1
            and len(parts) > 1
            and isinstance(first, Relation)
            and not any(isinstance(o, Relation) for o in others)
        ):
            value = last_term(first)  # "x = 1, 2" names both
            return value is not None and same_members([value, *parts[1:]], others)
    return same_members(truth, answer)


def names(parts: Sequence[Node]) -> list[str]:
    """What the parts of a list are named: "x" and "y" of "x=1, y=2"."""
    first = [part.terms[0] for part in parts if isinstance(part, Relation) and part.signs[0] in EQUALITIES]
    return [plain_text(term.text) for term in first if isinstance(term, Leaf) and is_name(term)]


def in_order(truth: Sequence[Node], answer: Sequence[Node]) -> bool:
    return len(truth) == len(answer) and all(map(nodes_equal, truth, answer))


def same_members(truth: Sequence[Node], answer: Sequence[Node]) -> bool:
    """Whether each part of one is equal to a part of its own of the other."""
    left = list(answer)
    if len(truth) != len(left):
        return False
    for part in truth:
        place = next((place for place, other in enumerate(left) if nodes_equal(part, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def is_subset(parts: Sequence[Node], others: Sequence[Node]) -> bool:
    return all(any(nodes_equal(part, other) for other in others) for part in parts)


def tables_equal(truth: Table, answer: Table) -> bool:
    """Matrices whatever their brackets, determinants, case distinctions (whose rows have no order)."""
    kinds = [
        "cases" if "cases" in one.environment else one.environment[:1] in "vV" and one.environment
        for one in (truth, answer)
    ]
    if kinds[0] != kinds[1] or [len(row) for row in truth.rows] != [len(row) for row in answer.rows]:
        return False
    if kinds[0] == "cases":
        return same_members([Group("(", row, ")") for row in truth.rows], [Group("(", row, ")") for row in answer.rows])
    return all(map(in_order, truth.rows, answer.rows))


def ratios_equal(truth: Node, answer: Node) -> bool:
    """In proportion where all terms are numbers; a ratio of two is their quotient, unless both look like times."""
    if not isinstance(truth, Ratio) or not isinstance(answer, Ratio):
        texts = [quotient(node) for node in (truth, answer)]
        return all(texts) and leaves_equal(*texts)
    if len(truth.parts) != len(answer.parts):
        return False
    if in_order(truth.parts, answer.parts):
        return True
    clocks = [re.fullmatch(r"\d{1,2}:[0-5]\d", ":".join(map(text_of, node.parts))) for node in (truth, answer)]
    values = [[numeric(text_of(part)) for part in node.parts] for node in (truth, answer)]
    if all(clocks) or any(value is None or value.is_zero for side in values for value in side):
        return False
    return all(exactly_equal(a * values[1][0], b * values[0][0]) for a, b in zip(*values, strict=True))  # type: ignore[operator]


def quotient(node: Node) -> str:
    if isinstance(node, Ratio) and len(node.parts) == 2:
        return f"({text_of(node.parts[0])})/({text_of(node.parts[1])})"
    return node.text if isinstance(node, Leaf) else ""


def text_of(node: Node) -> str:
    return node.text if isinstance(node, Leaf) else ""


# --- relations ---------------------------------------------------------------------------------------------


def is_name(node: Node) -> bool:
    """Whether this names something (``x``, ``f(x)``, ``\\angle ABC``, ``(x, y)``) rather than being a value."""
    if isinstance(node, Group):
        return all(map(is_name, node.parts))
    return isinstance(node, Leaf) and bool(NAME.fullmatch(node.text.strip("|"))) and node.text not in ("e", "i")


def last_term(relation: Relation) -> Node | None:
    """What a chain of equalities comes to; None if it is none, or says of a number that it is another one."""
    terms, signs = relation.terms, relation.signs
    if signs == ["\\in"] and is_name(terms[0]):
        return terms[1]
    if any(sign not in EQUALITIES for sign in signs):
        return None
    if signs[-1] == "\\approx" and not is_name(terms[-2]):  # the value stands before its approximation
        terms = terms[:-1]
    known = [value for term in terms[:-1] if (value := numeric(text_of(term))) is not None]
    last = numeric(text_of(terms[-1]))
    if known and (last is None or not all(exactly_equal(value, last) for value in known)):
        return None
    return terms[-1]


def relations_equal(truth: Relation, answer: Relation) -> bool:
    if is_equality(truth) and is_equality(answer):
        names_equal = nodes_equal(truth.terms[0], answer.terms[0])
        ends = last_term(truth), last_term(answer)
        if names_equal and None not in ends and nodes_equal(ends[0], ends[1]):  # type: ignore[arg-type]
            return True
    if len(truth.terms) == len(answer.terms) == 2:
        return pair_equal(truth, answer)
    for other in (answer, mirrored(answer)):
        if truth.signs == other.signs and in_order(truth.terms, other.terms):
            return True
    return False


def is_equality(relation: Relation) -> bool:
    return all(sign in EQUALITIES for sign in relation.signs)


def mirrored(relation: Relation) -> Relation:
    return Relation(relation.terms[::-1], [MIRRORED.get(sign, sign) for sign in relation.signs[::-1]])


def pair_equal(truth: Relation, answer: Relation) -> bool:
    """Two sides each: the differences of their sides are proportional, by a positive factor for inequalities."""
    for other in (answer, mirrored(answer)):
        if truth.signs == other.signs and in_order(truth.terms, other.terms):
            return True
    if truth.signs[0] not in ("=", "\\ne", *MIRRORED):
        return False
    sides = [[expression(text_of(term)) for term in one.terms] for one in (truth, answer)]
    if any(side is None for pair in sides for side in pair):
        return False
    differences = [pair[0] - pair[1] for pair in sides]  # type: ignore[operator]
    if any(exactly_equal(difference, sympy.Integer(0)) for difference in differences):
        return False
    factor = sympy.simplify(differences[0] / differences[1])
    if not factor.is_number or not differences[0].free_symbols:
        return False
    if truth.signs[0] == answer.signs[0]:
        return bool(truth.signs[0] in ("=", "\\ne") or factor.is_positive)
    return MIRRORED.get(truth.signs[0]) == answer.signs[0] and bool(factor.is_negative)


def interval(relation: Relation) -> Group | None:
    """The interval of ``x > 5`` or ``1 \\le x < 2``; None of what is no such inequality."""
    if any(sign not in MIRRORED for sign in relation.signs):
        return None
    upward = relation if relation.signs[0] in ("<", "\\le") else mirrored(relation)
    if any(sign not in ("<", "\\le") for sign in upward.signs):
        return None
    brackets = [("[", "]") if sign == "\\le" else ("(", ")") for sign in upward.signs]
    match upward.terms:
        case [low, name, high] if is_name(name):
            return Group(brackets[0][0], [low, high], brackets[1][1])
        case [low, name] if is_name(name):
            return Group(brackets[0][0], [low, Leaf("\\infty")], ")")
        case [name, high] if is_name(name):
            return Group("(", [Leaf("-\\infty"), high], brackets[0][1])
    return None


def is_region(node: Node) -> bool:
    """Whether this may be a set of numbers: a union, or brackets that an interval can have."""
    return isinstance(node, Union) or (isinstance(node, Group) and len(node.parts) == 2 and node.opener in ("(", "["))


def regions(node: Node) -> list[Node]:
    """The parts of a union, also where they are listed as inequalities."""
    if isinstance(node, Union):
        return list(node.parts)
    parts = node.parts if isinstance(node, Group) and not node.opener else [node]
    return [interval(part) or part if isinstance(part, Relation) else part for part in parts]


# --- leaves ------------------------------------------------------------------------------------------------


def leaves_equal(truth: str, answer: str) -> bool:
    if plain_text(truth) == plain_text(answer):
        return bool(truth)
    real = not re.search(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", truth + " " + answer)
    if expressions_equal(expression(truth, real), expression(answer, real)):
        return True
    wanted, given = split_unit(truth), split_unit(answer)
    if wanted.unit or given.unit:
        return quantities_equal(wanted.value, wanted.unit, given.value, given.unit, real)
    numbers = lone_number(truth), lone_number(answer)
    return bool(numbers[0]) != bool(numbers[1]) and leaves_equal(numbers[0] or truth, numbers[1] or answer)


def quantities_equal(truth: str, wanted: str, answer: str, given: str, real: bool) -> bool:
    """Of two values with their units."""
    sides = expression(truth.replace(",", ""), real), expression(answer.replace(",", ""), real)
    if wanted == given or not (wanted and given):
        same = expressions_equal(*sides) or plain_text(truth) == plain_text(answer)
    else:
        same = False
    if sides[0] is None or sides[1] is None or {wanted, given} != {"%", ""}:
        return same
    if wanted == "%":
        return same or expressions_equal(sides[0] / 100, sides[1])
    counts_percent = sides[0].is_number and bool(abs(sides[0]) >= 1)
    return expressions_equal(sides[0], sides[1] / 100) or (same and counts_percent)
