"""One mathematical expression, from normalised LaTeX to sympy: all of it, or nothing.

Strict: what is cut off, or holds one sign that the grammar does not know, is ``NotMathematics`` and never a prefix.
Numbers are exact, decimals too. Lists, relations, sets and matrices are none of this module's (``structure``).

    sum      = ["+"|"-"] product { ("+"|"-") product }
    product  = power { ["·"|"/"] power }            "·" may be left out, but not before a number
    power    = atom { "!" | "%" | "'" } [ "^" argument ]
    atom     = number | symbol [ "_" argument ] | "(" sum ")" | "|" sum "|" | command arguments
    argument = "{" sum "}" | one number, letter or command
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import sympy
from sympy import Expr, Function, Integer, Rational, Symbol

MAX_DEPTH = 50
MAX_DIGITS = 20_000  # of a power that is computed
MAX_FACTORIAL = 5_000  # of a number whose factorial is computed

TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\[^a-zA-Z]|[^\s\\])")
SYMBOLS = re.compile(
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|"
    "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|ell|hbar|angle|triangle"
)
DECORATIONS = re.compile("overline|bar|vec|hat|tilde|widehat|widetilde|overrightarrow|mathbb|mathcal|mathfrak|dot|text")
CONSTRUCTS = re.compile("pi|infty|frac|binom|sqrt|lfloor|lceil|sum|prod")
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **{name: getattr(sympy, name) for name in (*TRIGONOMETRIC, "sinh", "cosh", "tanh", "coth", "exp")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in TRIGONOMETRIC},
    "ln": sympy.log,
    "log": lambda x: sympy.log(x) / sympy.log(10),  # as math-verify has it; natural logarithms are \ln
    "gcd": sympy.gcd,
    "lcm": sympy.lcm,
    "max": sympy.Max,
    "min": sympy.Min,
}
SEVERAL_ARGUMENTS = ("gcd", "lcm", "max", "min")
# Letters that name functions where a bracket follows: f(2x) is not 2f(x). With other letters it is a product.
FUNCTION_LETTERS = frozenset("fghFGHP")
CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


class NotMathematics(ValueError):
    """The text is not, from end to end, an expression of this grammar."""


class Token(NamedTuple):
    text: str
    spaced: bool  # white space before it


def tokenise(text: str) -> list[Token]:
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise NotMathematics(f"no sign of mathematics at {text[position : position + 10]!r}")
        tokens.append(Token(match[1], match.start(1) > position))
        position = match.end()
    return tokens


def read_expression(text: str, real: bool = True) -> Expr:
    """The expression that ``text`` is. Its symbols are real unless told otherwise. Raises ``NotMathematics``."""
    parser = _Parser(tokenise(text), real)
    try:
        value = parser.sum()
    except (TypeError, ZeroDivisionError, OverflowError, AttributeError) as error:  # of sympy: log of infinity, 1/0
        raise NotMathematics(str(error)) from None
    if parser.rest():
        raise NotMathematics(f"{parser.rest()[0].text!r} is one sign too many")
    if value.has(sympy.nan, sympy.zoo):
        raise NotMathematics("the value is not defined")
    return value


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, tokens: list[Token], real: bool) -> None:
        self._tokens = tokens
        self._place = 0
        self._real = real
        self._bars = 0  # open "|"
        self._depth = 0

    # --- tokens

    def rest(self) -> list[Token]:
        return self._tokens[self._place :]

    def _peek(self) -> str:
        return self._tokens[self._place].text if self._place < len(self._tokens) else ""

    def _next(self) -> str:
        if self._place == len(self._tokens):
            raise NotMathematics("the expression is cut off")
        self._place += 1
        return self._tokens[self._place - 1].text

    def _take(self, *texts: str) -> str:
        """The next token if it is one of these; else empty."""
        return self._next() if self._peek() in texts else ""

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise NotMathematics(f"{text!r} is missing")

    # --- the grammar

    def sum(self) -> Expr:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotMathematics("nested too deeply")
        value = self._signed()
        while sign := self._take("+", "-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        self._depth -= 1
        return value

    def _signed(self) -> Expr:
        sign = self._take("+", "-")
        value = self._product()
        return -value if sign == "-" else value

    def _product(self) -> Expr:
        value = self._power()
        while True:
            if self._take("\\cdot", "\\times"):
                value = value * self._signed_power()
            elif self._take("/", "\\div"):
                value = value / self._divisor()
            elif self._begins_factor():
                value = value * self._power()
            else:
                return value

    def _signed_power(self) -> Expr:
        return -self._power() if self._take("-") else self._power()

    def _divisor(self) -> Expr:
        """What a slash divides by: ``1/2x`` is 1/(2x), ``1/2 x`` is x/2."""
        value = self._signed_power()
        while self._begins_factor() and not self._tokens[self._place].spaced:
            value = value * self._power()
        return value

    def _begins_factor(self) -> bool:
        """Whether the next token is a factor that needs no sign of multiplication before it. A number needs one."""
        token = self._peek()
        if token == "|":
            return not self._bars
        return bool(re.fullmatch(r"[a-zA-Z(\[{]", token)) or _is_atom(token)

    def _power(self) -> Expr:
        value = self._postfix(self._atom())
        if self._take("^"):
            value = self._postfix(raised(value, self._argument(whole_number=True)))
            if self._peek() == "^":
                raise NotMathematics("an exponent after an exponent")
        return value

    def _postfix(self, value: Expr) -> Expr:
        while True:
            if self._take("!"):
                value = factorial(value, sympy.factorial2 if self._take("!") else sympy.factorial)
            elif self._take("\\%"):
                value = value / 100
            elif self._peek() == "\\text" and self._degree():
                value = value * sympy.pi / 180
            else:
                return value

    def _degree(self) -> bool:
        words = "".join(token.text for token in self._tokens[self._place : self._place + 9])
        if not words.startswith("\\text{degree}"):
            return False
        self._place += 9
        return True

    def _argument(self, whole_number: bool = False) -> Expr:
        """``{…}`` or one token; of a number its first digit, as TeX has it, or all of it, as people mean it."""
        token = self._peek()
        if token in ("{", "("):
            return self._group(self._next())
        if token in ("-", "+") and whole_number:
            sign = self._next()
            return -self._argument(True) if sign == "-" else self._argument(True)
        if re.fullmatch(r"\d{2,}", token) and not whole_number:
            self._tokens[self._place] = Token(token[1:], False)
            return Integer(token[0])
        return self._atom(with_index=False)

    def _group(self, opener: str) -> Expr:
        bars, self._bars = self._bars, int(opener == "|")
        value = self.sum()
        self._expect(CLOSERS[opener])
        self._bars = bars
        return value

    def _atom(self, with_index: bool = True) -> Expr:
        token = self._next()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return Rational(token)
        if token in ("(", "[", "{"):
            return self._group(token)
        if token == "|":
            return sympy.Abs(self._group(token))
        if len(token) == 1 and token.isalpha() and token.isascii():
            return self._letter(token, with_index)
        if token.startswith("\\") and token[1:].isalpha():
            return self._command(token[1:])
        raise NotMathematics(f"{token!r} begins nothing")

    # --- symbols

    def _letter(self, letter: str, with_index: bool) -> Expr:
        name = self._indexed(letter) if with_index else letter
        if name == "e":
            return sympy.E
        if name == "i":
            return sympy.I
        called = self._peek() == "(" and with_index
        if called and (letter in FUNCTION_LETTERS or name.endswith("'")):
            self._next()
            return self._called(name)
        return self._symbol(name)

    def _called(self, name: str) -> Expr:
        arguments = [self.sum()]
        while self._take(","):
            arguments.append(self.sum())
        self._expect(")")
        value: Expr = Function(name)(*arguments)
        return value

    def _indexed(self, name: str) -> str:
        """``name`` with the index and the primes that follow it."""
        if self._take("_"):
            name += "_" + self._raw_argument()
        while self._take("'"):
            name += "'"
        return name

    def _raw_argument(self) -> str:
        """An argument as its tokens: the text of an index or of a decorated symbol."""
        if not self._take("{"):
            return self._next()
        depth, texts = 1, []
        while depth:
            token = self._next()
            depth += {"{": 1, "}": -1}.get(token, 0)
            texts.append(token)
        return "".join(texts[:-1])

    def _symbol(self, name: str) -> Expr:
        return Symbol(name, real=True) if self._real else Symbol(name)

    # --- commands

    def _command(self, name: str) -> Expr:
        if name in FUNCTIONS:
            return self._function(name)
        if SYMBOLS.fullmatch(name):
            return self._symbol(self._indexed("\\" + name))
        if DECORATIONS.fullmatch(name):
            return self._symbol(self._indexed(f"\\{name}{{{self._raw_argument()}}}"))
        match name:
            case "pi":
                return sympy.pi
            case "infty":
                return sympy.oo
            case "frac":
                above = self._argument()
                return above / self._argument()
            case "binom":
                above, below = self._argument(), self._argument()
                return binomial(above, below)
            case "sqrt":
                degree = self._group("[") if self._take("[") else Integer(2)
                return self._argument(whole_number=True) ** (1 / degree)
            case "lfloor":
                return sympy.floor(self._group("\\lfloor"))
            case "lceil":
                return sympy.ceiling(self._group("\\lceil"))
            case "sum" | "prod":
                return self._over_range(sympy.Sum if name == "sum" else sympy.Product)
        raise NotMathematics(f"no command \\{name}")

    def _function(self, name: str) -> Expr:
        base = self._argument(whole_number=True) if name == "log" and self._take("_") else None
        power = self._argument(whole_number=True) if self._take("^") else Integer(1)
        if power == -1:
            if f"arc{name}" not in FUNCTIONS:
                raise NotMathematics(f"the inverse of \\{name}")
            name, power = f"arc{name}", Integer(1)
        arguments = self._function_arguments(name in SEVERAL_ARGUMENTS)
        if base is not None:
            return (sympy.log(arguments[0]) / sympy.log(base)) ** power
        return FUNCTIONS[name](*arguments) ** power

    def _function_arguments(self, several: bool) -> list[Expr]:
        if opener := self._take("(", "{", "["):
            arguments = [self.sum()]
            while several and self._take(","):
                arguments.append(self.sum())
            self._expect(CLOSERS[opener])
            return arguments
        # Without brackets: the product up to the next sign or function, as in "\sin 2x \cos x".
        value = self._signed_power()
        while self._begins_factor() and self._peek()[1:] not in FUNCTIONS and self._peek() not in "([":
            value = value * self._power()
        return [value]

    def _over_range(self, kind: type[sympy.Sum] | type[sympy.Product]) -> Expr:
        """``\\sum_{k=1}^{n} term``."""
        self._expect("_")
        self._expect("{")
        index = self._symbol(self._indexed(self._next()))
        self._expect("=")
        first = self.sum()
        self._expect("}")
        self._expect("^")
        last = self._argument(whole_number=True)
        return kind(self._product(), (index, first, last))


def _is_atom(token: str) -> bool:
    """Whether this command begins an atom."""
    name = token[1:]
    patterns = (SYMBOLS, DECORATIONS, CONSTRUCTS)
    return token[:1] == "\\" and (name in FUNCTIONS or any(pattern.fullmatch(name) for pattern in patterns))


# --- numbers that may be too large -------------------------------------------------------------------------


def raised(base: Expr, exponent: Expr) -> Expr:
    """``base`` to the power of ``exponent``. Raises ``NotMathematics`` where that has too many digits."""
    if base.is_number and exponent.is_number and exponent.is_real and base.is_finite and exponent.is_finite:
        size = abs(exponent) * (abs(sympy.log(abs(base), 10).n(5)) if base != 0 else 0)
        if size > MAX_DIGITS:
            raise NotMathematics("a power with too many digits")
    value: Expr = base**exponent
    return value


def factorial(value: Expr, kind: Callable[[Expr], Expr]) -> Expr:
    """Of one of the two kinds. Raises ``NotMathematics`` where it has too many digits."""
    if value.is_number and value.is_finite and value > MAX_FACTORIAL:
        raise NotMathematics("a factorial with too many digits")
    return kind(value)


def binomial(above: Expr, below: Expr) -> Expr:
    """Raises ``NotMathematics`` where the coefficient has too many digits."""
    if above.is_number and below.is_number and min(abs(above), abs(below)) > MAX_FACTORIAL:
        raise NotMathematics("a binomial coefficient with too many digits")
    return sympy.binomial(above, below)
