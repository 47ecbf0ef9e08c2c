"""The value of an expression, and whether two expressions have the same one: exactly, not to some places.

Calculus and products of matrices, which ``grammar`` does not know, are read by math-verify's parser.
"""

import re
from collections.abc import Sequence

import sympy
from latex2sympy2_extended import latex2sympy
from sympy import Expr
from sympy.core.function import AppliedUndef

from dapo_async.verify.grammar import NotMathematics, read_expression

CALCULUS = re.compile(r"\\(?:i{0,2}int|oint|lim|det|begin)(?![a-zA-Z])")
DIGITS = 300  # to which values that are not rational are compared
TEST_POINTS = ((3, 7), (-5, 11), (13, 4), (-17, 6), (29, 10))  # of symbols; equal in all: equal
OF_INTEGERS = (sympy.factorial, sympy.factorial2, sympy.binomial, sympy.Sum, sympy.Product)


def expression(text: str, real: bool = True) -> Expr | None:
    """What ``text`` is from end to end; None if that is no expression."""
    try:
        return read_expression(text, real)
    except NotMathematics:
        if not CALCULUS.search(text):
            return None
    try:
        value = latex2sympy(text, is_real=real, normalization_config=None)
    except Exception:  # noqa: BLE001 - the package raises bare Exception where it cannot read
        return None
    value = value.doit() if isinstance(value, sympy.MatrixExpr) else value
    return value if isinstance(value, Expr | sympy.MatrixBase) else None


def numeric(text: str) -> Expr | None:
    """The number that ``text`` is; None if it is none."""
    value = expression(text) if text else None
    return value if value is not None and value.is_number and value.is_finite else None


def expressions_equal(truth: Expr | None, answer: Expr | None) -> bool:
    if truth is None or answer is None:
        return False
    if isinstance(truth, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        return isinstance(truth, sympy.MatrixBase) and truth == answer
    return exactly_equal(truth, answer)


def exactly_equal(one: Expr, other: Expr) -> bool:
    """Whether two expressions have one value, whatever their symbols are."""
    if one == other:
        return True
    one, other = named_calls(one).doit(), named_calls(other).doit()
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    if one.is_infinite or other.is_infinite:
        return bool(one == other)
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    return equal_at_points(one, other, symbols) if symbols else numbers_equal(one, other)


def named_calls(value: Expr) -> Expr:
    """``value`` with calls of unknown functions as symbols: of ``f(2)`` and ``f(3)`` nothing is known."""
    return value.replace(
        lambda part: isinstance(part, AppliedUndef), lambda call: sympy.Symbol(str(sympy.expand(call)))
    )


def equal_at_points(one: Expr, other: Expr, symbols: Sequence[Expr]) -> bool:
    """Whether two expressions are equal at all points where both are defined; proved if there is no such point."""
    compared = False
    whole = one.has(*OF_INTEGERS) or other.has(*OF_INTEGERS)
    for number, (above, below) in enumerate(TEST_POINTS):
        places = [(above + 2 * place + number, below + 3 * place) for place in range(len(symbols))]
        point = {
            symbol: sympy.Rational(p, q) if not whole else sympy.Integer(abs(p) + place)
            for place, (symbol, (p, q)) in enumerate(zip(symbols, places, strict=True))
        }
        values = [expr.subs(point).doit() for expr in (one, other)]
        if any(value.has(sympy.nan, sympy.zoo, sympy.oo) or not value.is_number for value in values):
            continue
        if not numbers_equal(*values):
            return False
        compared = True
    return compared or bool(sympy.simplify(one - other) == 0)


def numbers_equal(one: Expr, other: Expr) -> bool:
    """Of two expressions without symbols: exactly if rational, else to ``DIGITS`` digits of the greater one."""
    difference = one - other
    if difference.is_Rational:
        return bool(difference == 0)
    if one == 0 or other == 0:
        return difference.equals(0) is True
    scales = [abs(value.n(15)) for value in (one, other)]
    gap = abs(difference.n(15, maxn=DIGITS + 100))  # with as many digits as it takes to tell it from zero
    if not all(size.is_Float or size == 0 for size in (*scales, gap)):
        return False  # an integral, say, that nobody can evaluate
    return bool(gap <= max(scales) * sympy.Float(10) ** -DIGITS)
