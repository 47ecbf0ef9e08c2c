"""How a normalised answer is put together: lists, brackets, relations, unions, ratios, tables, and leaves.

Reads no expression: a leaf is text. What does not balance has no structure (``Unbalanced``).

| the text | its structure |
|---|---|
| ``3, 5; 7`` | a list of three; so is ``2 \\pm \\sqrt{3}``, of two |
| ``(1,2)`` ``[1,2)`` ``\\{1,2\\}`` | brackets of that kind: a tuple or an open interval, an interval, a set |
| ``1,234`` | a number, or a list of two, whichever the other side is; in brackets always two |
| ``x = 5``, ``1 < x \\le 2``, ``x \\in [1,2]`` | a chain of terms and signs |
| ``[1,2) \\cup (3,4]`` | a union |
| ``1:2:3`` | a ratio |
| ``\\{x \\mid x > 1\\}`` | its condition |
| a matrix, determinant or case distinction | a table of its cells |
"""

import re
from typing import NamedTuple

MAX_DEPTH = 20
MAX_PARTS = 500

OPENERS = ("(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\begin")
CLOSERS = (")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\end")
PIECES = re.compile(r"\\[a-zA-Z]+|\\.|\d{1,3}(?:,\d{3})+(?![\d,])|\d+|.", re.S)
RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\in", "\\notin", "\\equiv", "\\subset", "\\subseteq")
SIGNS = {"\\pm": ("+", "-"), "\\mp": ("-", "+")}
SUCH_THAT = re.compile(r"\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]\s*(?=.*\1)", re.S)  # { x | x > 1 }
TABLE = re.compile(r"\\begin\s*\{([a-zA-Z]*matrix|array|cases)\*?\}(?:\s*\{[lcr|@ ]*\})?(.*)\\end\s*\{\1\*?\}", re.S)


class Unbalanced(ValueError):
    """Brackets open or close alone: the text is cut off, or means something else."""


class Leaf(NamedTuple):
    """One expression, or words."""

    text: str


class Group(NamedTuple):
    """Parts between brackets; a bare list has none."""

    opener: str
    parts: "list[Node]"
    closer: str


class Relation(NamedTuple):
    """Terms with a sign between each two."""

    terms: "list[Node]"
    signs: list[str]


class Union(NamedTuple):
    """Sets joined by ``\\cup``."""

    parts: "list[Node]"


class Ratio(NamedTuple):
    """Terms with colons between them."""

    parts: "list[Node]"


class Table(NamedTuple):
    """Rows of cells, and the environment they stood in."""

    environment: str
    rows: "list[list[Node]]"


Node = Leaf | Group | Relation | Union | Ratio | Table


def bare_list(parts: list[Node]) -> Group:
    return Group("", parts, "")


def readings(text: str) -> list[Node]:
    """The structures that ``text`` may have: two where a comma may part thousands or a list. Raises ``Unbalanced``."""
    plain = read(text, thousands=False)
    grouped = read(text, thousands=True)
    return [plain] if plain == grouped else [plain, grouped]


def read(text: str, thousands: bool, depth: int = 0) -> Node:
    """The structure of ``text``; with ``thousands`` the commas of ``1,234`` part no list."""
    text = text.strip()
    if not text or depth > MAX_DEPTH:
        raise Unbalanced("a part is empty, or nested too deeply")

    def inner(part: str) -> Node:
        return read(part, thousands, depth + 1)

    parts, _ = split(text, (",", ";"), thousands)
    if len(parts) > 1:
        return bare_list([one for part in parts for one in flat(inner(part))])
    if any(sign in re.findall(r"\\[a-zA-Z]+", text) for sign in SIGNS):
        return bare_list([inner(choose_sign(text, place)) for place in (0, 1)]) if one_choice(text) else Leaf(text)
    parts, _ = split(text, ("\\cup",))
    if len(parts) > 1:
        return Union([inner(part) for part in parts])
    parts, signs = split(text, RELATIONS)
    if len(parts) > 1:
        return Relation([inner(part) for part in parts], signs)
    parts, _ = split(text, (":",))
    if len(parts) > 1:
        return Ratio([inner(part) for part in parts])
    return read_bracketed(text, thousands, depth)


def read_bracketed(text: str, thousands: bool, depth: int) -> Node:
    """A table, something in brackets, or a leaf."""
    table = TABLE.fullmatch(text)
    if table and "\\begin" not in table[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", table[2].replace("\\hline", "")) if row.strip()]
        cells = [[read_cell(cell, thousands, depth) for cell in row.split("&")] for row in rows]
        return Table(table[1], cells)
    opener, inside, closer = in_brackets(text)
    if opener == "{":
        return read(inside, thousands, depth + 1)
    described = SUCH_THAT.match(inside) if opener == "\\{" else None
    if described:
        return read(inside[described.end() :], thousands, depth + 1)
    if not opener:
        return Leaf(without_commas(text) if thousands else text)
    parts, _ = split(inside, (",", ";"), thousands)
    if len(parts) == 1 and thousands:
        parts, _ = split(inside, (",", ";"))  # (1,234) has two components
        thousands = thousands and len(parts) == 1
    if len(parts) == 1 and (opener, closer) == ("(", ")") and re.search(r"\\(?:cup|begin)", inside):
        return read(inside, thousands, depth + 1)
    if len(parts) == 1 and (opener, closer) != ("\\{", "\\}"):
        table = TABLE.fullmatch(inside.strip())
        return read(inside, thousands, depth + 1) if table or re.fullmatch(r"\(\s*[A-Za-z]\s*\)", text) else Leaf(text)
    nodes = [one for part in parts for one in flat(read(part, thousands, depth + 1))]
    return Group(opener, nodes, closer)


def read_cell(text: str, thousands: bool, depth: int) -> Node:
    """One cell of a table; an empty one is an empty leaf. "if" and "for" before a condition say nothing."""
    text = re.sub(r"^\s*,?\s*(?:\\text\s*\{\s*(?:if|for|when|where)\s*\}|\b(?:if|for|when|where)\b)", "", text)
    text = re.sub(r"[\s,;.]+$", "", text)
    return read(text, thousands, depth + 1) if text.strip() else Leaf("")


def flat(node: Node) -> list[Node]:
    """The parts of a bare list, which lists within lists are; else the node alone."""
    return node.parts if isinstance(node, Group) and not node.opener else [node]


def one_choice(text: str) -> bool:
    """Whether all signs ± and ∓ of ``text`` go together: one ±, or ± with ∓. ``\\pm 3, \\pm 4`` was split before."""
    signs = [sign for sign in re.findall(r"\\[a-zA-Z]+", text) if sign in SIGNS]
    return len(signs) == 1 or set(signs) == set(SIGNS)


def choose_sign(text: str, place: int) -> str:
    for sign, choices in SIGNS.items():
        text = re.sub(rf"\{sign}(?![a-zA-Z])", choices[place], text)
    return re.sub(r"^\s*\+|(?<=[=(,])\s*\+", "", text)


def in_brackets(text: str) -> tuple[str, str, str]:
    """Opener, content and closer if one pair of brackets holds all of ``text``; else an empty opener."""
    opener = next((one for one in ("\\{", "{", "(", "[") if text.startswith(one)), "")
    closer = next((one for one in ("\\}", "}", ")", "]") if text.endswith(one)), "")
    if not (opener and closer) or any((opener == f"{kind}{{") != (closer == f"{kind}}}") for kind in ("", "\\")):
        return "", text, ""
    depth = place = 0
    for piece in PIECES.findall(text):
        place += len(piece)
        depth += (piece in OPENERS) - (piece in CLOSERS)
        if depth == 0:
            break
    return (opener, text[len(opener) : -len(closer)], closer) if place == len(text) else ("", text, "")


def split(text: str, separators: tuple[str, ...], thousands: bool = False) -> tuple[list[str], list[str]]:
    """``text`` cut at the separators outside of all brackets, and these. Raises ``Unbalanced``."""
    parts, found = [""], []
    depth = 0
    for piece in PIECES.findall(text):
        depth += (piece in OPENERS) - (piece in CLOSERS)
        if depth < 0:
            raise Unbalanced(f"{piece!r} closes what was not opened")
        pieces = [piece] if thousands or "," not in piece else re.findall(r"\d+|,", piece)
        for one in pieces:
            if depth == 0 and one in separators:
                found.append(one)
                parts.append("")
            else:
                parts[-1] += one
    if depth:
        raise Unbalanced("a bracket is never closed")
    if len(parts) > MAX_PARTS:
        raise Unbalanced("too many parts")
    return parts, found


def without_commas(text: str) -> str:
    """``text`` with the commas between thousands removed."""
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), text)
