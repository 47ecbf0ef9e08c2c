"""How answers are written: one spelling for the many of each form, the same for an answer and for a truth.

``normalise`` is the table of forms, applied from top to bottom; what it returns is still LaTeX, for ``grammar``, or
words. It reads no mathematics and decides no equality: ``math_equivalence`` does. ``canonical`` goes further where only
strings are at hand: two answers with the same one are the same vote.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from dapo_async.verify.units import LETTER_UNITS, split_unit

MAX_ROUNDS = 8  # of unwrapping; nobody nests deeper
MAX_EXACT_DIGITS = 300  # of numbers that ``canonical`` compares by value

# --- characters --------------------------------------------------------------------------------------------

CHARACTERS = {
    "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-",
    "×": r" \times ", "✕": r" \times ", "⨯": r" \times ", "·": r" \cdot ", "⋅": r" \cdot ", "∙": r" \cdot ", "∗": "*",
    "÷": r" \div ", "⁄": "/", "∕": "/", "±": r" \pm ", "∓": r" \mp ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∞": r"\infty ",
    "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≃": r"\approx ", "≡": r"\equiv ", "∈": r"\in ", "∉": r"\notin ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "⌀": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "…": r"\ldots ", "⋯": r"\ldots ",
    "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "″": "''", "。": ".", "、": ",", "，": ",", "；": ";", "：": ":",
    "∶": ":", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "∣": "|", "｜": "|", "∠": r"\angle ", "△": r"\triangle ", "Δ": r"\Delta ", "∆": r"\Delta ", "µ": r"\mu ",
    "€": r"\text{euro}", "£": r"\text{pound sterling}", "¥": r"\text{yen}", "₹": r"\text{rupee}", "¢": r"\text{cent}",
    "ⅇ": "e", "ⅈ": "i",
}  # fmt: skip
SMALL_GREEK = (
    *(
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
    ),
    *("omicron", "pi", "rho", "sigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)
GREAT_GREEK = (
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Upsilon",
    "Phi",
    "Psi",
    "Omega",
)  # no Latin twin
CHARACTERS |= {chr(ord("α") + place): f"\\{name} " for place, name in enumerate(SMALL_GREEK)}
CHARACTERS |= {chr(ord("Α") + SMALL_GREEK.index(name.lower())): f"\\{name} " for name in GREAT_GREEK}
INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")


def plain_characters(text: str) -> str:
    """``text`` in ASCII and LaTeX commands, as far as its characters have such a form.

    Digits of any script and full-width forms are ASCII, ``½`` is ``\\frac{1}{2}``, ``²`` an exponent, ``₁`` an index.
    """
    return "".join(map(_plain, INVISIBLE.sub("", _scripts(text))))


def _scripts(text: str) -> str:
    """Runs of superscript and subscript characters as ``^{…}`` and ``_{…}``."""
    for mark, tag in (("^", "<super>"), ("_", "<sub>")):
        found = "".join(chr(code) for code in _SCRIPTS if unicodedata.decomposition(chr(code)).startswith(tag))
        pattern = re.compile(f"[{found}]+")
        text = pattern.sub(lambda run, mark=mark: f"{mark}{{{unicodedata.normalize('NFKC', run[0])}}}", text)  # type: ignore[misc]
    return text


_SCRIPTS = (0xB2, 0xB3, 0xB9, *range(0x2070, 0x209D))


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if character in CHARACTERS:
        return CHARACTERS[character]
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.digit(character))
    decomposed = unicodedata.normalize("NFKC", character)
    if decomposed == character:
        return " " if character.isspace() else character
    above, slash, below = decomposed.partition("⁄")
    return f"\\frac{{{above}}}{{{below}}}" if slash and below else "".join(map(_plain, decomposed))


# --- forms -------------------------------------------------------------------------------------------------

Replacement = str | Callable[[re.Match[str]], str]


class Form(NamedTuple):
    """One line of the table: every match of ``pattern`` is written as ``replacement``."""

    pattern: re.Pattern[str]
    replacement: Replacement


def form(pattern: str, replacement: Replacement, flags: int = 0) -> Form:
    return Form(re.compile(pattern, flags), replacement)


def rows(environment: re.Match[str]) -> str:
    """An aligned derivation as one line: a row that begins with a relation goes on with the row before."""
    text = ""
    for row in re.split(r"\\\\(?:\[[^\]]*\])?", environment[2].replace("&", " ")):
        goes_on = re.match(r"\s*(?:=|<|>|\\(?:le|ge|approx|ne))", row)
        text += f" {row}" if goes_on or not text.strip() else f", {row}" if row.strip() else ""
    return text


def digits_alone(number: re.Match[str]) -> str:
    return re.sub(r"\D", "", number[0])


def mixed(number: re.Match[str]) -> str:
    """``3 1/2`` and ``3\\frac{1}{2}``: a proper fraction is added, an improper one is a factor."""
    whole, above, below = (group for group in number.groups() if group is not None)
    if int(above) < int(below):
        return f"({whole}+\\frac{{{above}}}{{{below}}})"
    return number[0] if "frac" not in number[0] else f"({whole}\\cdot \\frac{{{above}}}{{{below}}})"


def repeating(number: re.Match[str]) -> str:
    """``0.1\\overline{6}`` as a fraction."""
    whole, head, *periods = number.groups()
    period = next(filter(None, periods))
    below = (10 ** len(period) - 1) * 10 ** len(head)
    above = int((whole or "0") + head + period) - int((whole or "0") + head)
    return f"\\frac{{{above}}}{{{below}}}"


def letter(upright: re.Match[str]) -> str:
    """One letter in upright type is that letter (``\\mathrm{e}``), unless it is a unit behind a number."""
    before = upright.string[: upright.start()].rstrip(" \\,;~")[-1:]
    is_unit = (before.isdigit() or before == "}") and upright[1] in LETTER_UNITS
    return upright[0] if is_unit else f" {upright[1]} "


END = r"(?![a-zA-Z])"
FONTS = (
    "hbox|mbox|textnormal|textbf|textit|textrm|textsf|texttt|emph|"  # of words
    "mathrm|mathbf|mathit|mathsf|bm|boldsymbol|operatorname"
)
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|max|min|gcd|lcm"
THOUSANDS = r"(?:\{,\}|,?\s?\\!|\\!,|,?\s?\\,|\s?\\[;: ]|~|'| )"
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# From top to bottom. On the left how it is written, on the right how it is read; a comment gives an example, and the
# reason where another reading is possible.

WRAPPING = (
    form(r"\.\.\.+", r"\\ldots "),
    form(r"(?:^|(?<!\\)\{)([^{}]*)\\over(?![a-zA-Z])([^{}]*)(?:$|(?<!\\)\})", r"\\frac{\1}{\2}"),  # {7 \over 8}
    form(r"(?:^|(?<!\\)\{)([^{}]*)\\choose(?![a-zA-Z])([^{}]*)(?:$|(?<!\\)\})", r"\\binom{\1}{\2}"),
    form(r"^\s*(?:\*\*|`|\"|>)+|(?:\*\*|`|\")+\.?\s*$", ""),  # **7**, `7`
    form(r"^\\(?:boxed|fbox|framebox|bbox)\s*\{(.*)\}$", r"\1", re.S),  # a box in a box
    form(r"^\{(.*)\}$", lambda braces: braces[1] if is_closed(braces[1]) else braces[0], re.S),
    form(r"\s+", " "),
    # A full stop, comma or colon ends a sentence, not an answer. "5!" stays: it is a factorial.
    form(r"(?<!\\right)(?<!\\right )(?<!\\)[\s.,;:]+$|^[\s,;:]+", ""),
    form(r"(?:\\ ?)+$|^(?:=|\\approx(?![a-zA-Z]))\s*", ""),  # a line break at the end; "= 5" after all
    form(r"\\text\s*\{([^{}]*?)[.,;:\s]+\}$", r"\\text{\1}"),  # \text{No.}
    form(r"\\(?:Rightarrow|implies|therefore)(?![a-zA-Z])", " "),
)
COMMANDS = (
    form(
        r"(?<!\\)\\\\(?=(?:frac|dfrac|sqrt|pi|text|boxed|left|infty|cdot|times|pm|le|ge)(?![a-zA-Z]))", r"\\"
    ),  # escaped twice
    # Money. \$ is a currency sign; so is a $ that no other one closes (see ``delimiters``).
    form(r"\\text\s*\{\s*\\\$\s*(?=[\d.])", r"\\text{dollar}\\text{"),  # \text{\$25}
    form(r"\\text\s*\{\s*\\\$\s*\}|\\\$|\\(?:textdollar|dollar)(?![a-zA-Z])", r"\\text{dollar}"),
    form(r"\\(?:euro|texteuro)(?![a-zA-Z])", r"\\text{euro}"),
    form(r"\\(?:pounds|textsterling)(?![a-zA-Z])", r"\\text{pound sterling}"),
    form(r"\$\$?", "\x00"),
    form(r"(?<!\\)\\[\[\]()]", " "),  # \[ \] \( \)
    # Environments.
    form(
        r"\\begin\s*\{(align|aligned|gather|gathered|equation|split|multline|eqnarray)\*?\}(.*?)\\end\s*\{\1\*?\}",
        rows,
        re.S,
    ),
    form(
        r"\\left\s*\\(?:\{|lbrace)\s*\\begin\s*\{(array|matrix|aligned)\}(?:\s*\{[^}]*\})?(.*?)\\end\s*\{\1\}\s*\\right\s*\.",
        r"\\begin{cases}\2\\end{cases}",
        re.S,
    ),
    # Dress: size, style and spacing say nothing.
    form(rf"\\(?:left|right|middle|[bB]igg?[lrm]?){END}(?:\s*\.(?!\d))?", ""),
    form(rf"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|strut|hfill|nonumber){END}", " "),
    form(rf"\\[dtc]frac{END}", r"\\frac"),
    form(rf"\\[dt]binom{END}", r"\\binom"),
    form(rf"\\(?:{FONTS})\*?{END}\s*\{{", r"\\text{"),
    form(r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
    form(r"\\text\s*\{\s*\}(?:\^\{?\d\}?)?", ""),
    form(r"\\text\s*\{\s*\(([A-Za-z])\)\s*\}", r"\1"),  # \text{(A)}, a choice
    form(rf"\\text\s*\{{\s*({FUNCTIONS})\s*\}}", r"\\\1 "),  # \operatorname{lcm}
    form(
        r"\\text\s*\{[\s~]*([A-Za-z]+)\s*\}\s*/\s*\\text\s*\{[\s~]*([A-Za-z]+)\s*\}", r"\\text{\1/\2}"
    ),  # \text{m}/\text{s}
    form(r"\\text\s*\{\s*([A-Za-z])\s*\}", letter),
    # Synonyms.
    form(rf"\\(?:leq|leqslant|leqq){END}|<=|=<", r"\\le "),
    form(rf"\\(?:geq|geqslant|geqq){END}|>=", r"\\ge "),
    form(rf"\\neq{END}|\\not\s*=|!=|<>", r"\\ne "),
    form(rf"\\lt{END}", "<"),
    form(rf"\\gt{END}", ">"),
    form(rf"\\(?:simeq|thickapprox|doteq){END}|~=", r"\\approx "),
    form(rf"\\(?:dots|cdots|dotsc|dotsb|dotso|hdots){END}", r"\\ldots "),
    form(rf"\\(?:varnothing|empty|O){END}|\\\{{\s*\\\}}", r"\\emptyset "),
    form(rf"\\lbrace{END}", r"\\{"),
    form(rf"\\rbrace{END}", r"\\}"),
    form(rf"\\(?:[lr]?vert|mid){END}", "|"),
    form(rf"\\(?:lbrack){END}", "["),
    form(rf"\\(?:rbrack){END}", "]"),
    form(rf"\\(?:langle|lparen){END}", "("),  # a vector is the tuple of its components
    form(rf"\\(?:rangle|rparen){END}", ")"),
    form(r"\*\*", "^"),
    form(rf"\\(?:ast|star|bullet){END}|\*", r" \\cdot "),
    form(r"\+\s*/\s*-|\+-(?=[\d\\a-zA-Z(])", r" \\pm "),
    form(rf"\\var(phi|epsilon|theta|rho|sigma|pi){END}", r"\\\1 "),
    form(rf"\\(?:ratio|colon){END}", ":"),
    form(rf"\\overrightarrow{END}", r"\\vec"),
    form(rf"\\(?:overline|widebar){END}", r"\\bar"),
    form(rf"\\wide(hat|tilde){END}", r"\\\1"),
    form(rf"\^\s*\{{\s*\\prime\s*\}}|\^\s*\\prime{END}", "'"),
    form(rf"\\ctg{END}", r"\\cot "),
    form(rf"\\(arc)?tg{END}", r"\\\1tan "),
    form(rf"\\lg{END}", r"\\log_{10} "),
    form(r"\\(?:widehat|widetilde|overline|mathring)\s*\{\s*\}", ""),
)
WORDS = (
    form(r"^(?:minus|negative)\s+(?=\d)", "-"),
    form(r"^(-?\d+)\s+to\s+(-?\d+)$", r"\1:\2"),  # odds of 3 to 2
    form(
        r"^(?:all )?(?:the )?real numbers$|^all reals$|^\(\s*-\s*\\infty\s*,\s*\+?\s*\\infty\s*\)$",
        r"\\mathbb{R}",
        re.I,
    ),
    form(r"(?<=\d)\s*(?:\\text\s*\{\s*)?\b([ap])\.?\s?m\b\.?(?:\s*\})?$", r" \1m", re.I),  # 7:30 p.m.
    form(
        r"\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|\\(?:land|lor|vee|wedge)(?![a-zA-Z])|(?<![\\A-Za-z{])(?:and|or)(?![A-Za-z}])",
        " , ",
    ),
    form(r",\s*(?:,\s*)+", ", "),
    form(
        rf"(?<![\\A-Za-z])({FUNCTIONS})(?=\s*[\d(\\_^]|\s+[a-zA-Z]\b|\s*$|\s*[-+*/),])(?![A-Za-z])", r"\\\1 "
    ),  # sqrt(2), 2pi
    form(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])|\\text\s*\{\s*infinity\s*\}", r"\\infty "),
    form(r"(?<!\\)%|\\text\s*\{\s*(?:percent|per cent|percentage|%|\\%)\s*\}|\b(?:percent|per cent)\b", r"\\%"),
    form(
        r"\s*\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\(?:degree|degrees)(?![a-zA-Z])|(?<=\d)\s*\\text\s*\{\s*degrees?\s*\}",
        r"\\text{degree}",
    ),
    form(
        rf"(?<=\d)\s*(?:\\text\s*\{{\s*)?\b({'|'.join(SCALES)})\b(?:\s*\}})?",  # 5 million
        lambda scale: f" \\cdot 10^{{{SCALES[scale[1]]}}} ",
    ),
)
NUMBERS = (
    form(r"(?<![\d.^_}/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", mixed),
    form(r"(?<![\d.^_/])(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", mixed),
    # 1{,}234 and 1,\!234 and 1\,234 and 1 234 are one number; 1,234 may be a list, which ``structure`` weighs.
    form(rf"(?<![\d.^_])\d{{1,3}}(?:{THOUSANDS}\d{{3}})+(?![\d'])", digits_alone),
    form(r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\\(?:h|v)space\*?\{[^}]*\}", " "),
    form(r"\{,\}", ","),
    # 1.5e3 is scientific notation; 2e^3 is 2·e³.
    form(
        r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\d.a-zA-Z^])",
        lambda number: f"{number[1]} \\times 10^{{{int(number[2])}}}",
    ),
    form(r"(?<![\d.])(\d*)\.(\d*)\s*(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\)|\\dot\s*(\d))(?!\d)", repeating),
    form(r"(?<![\d.])(\d*)\.(\d*?)(\d{1,6}?)\3{2,}\s*\\ldots", repeating),  # 0.333... repeats what it shows three times
)


def is_closed(text: str) -> bool:
    """Whether no brace closes in ``text`` that was not opened there."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.S):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return True


def normalise(text: str) -> str:
    """One spelling of an answer or of a truth, which is the same for the many of each form."""
    text = plain_characters(text)
    for _ in range(MAX_ROUNDS):
        before, text = text, rewrite(WRAPPING, text).strip()
        if text == before:
            break
    text = delimiters(rewrite(COMMANDS, text))
    text = rewrite(NUMBERS, rewrite(WORDS, text))
    return rewrite(WRAPPING, text).strip()


def rewrite(forms: tuple[Form, ...], text: str) -> str:
    for pattern, replacement in forms:
        text = pattern.sub(replacement, text)
    return text


def delimiters(text: str) -> str:
    """``$`` in pairs are delimiters; of an odd number the first one before a digit is money."""
    if text.count("\x00") % 2:
        text = re.sub("\x00(?=\\s*-?[\\d.])", r"\\text{dollar}", text, count=1)
    return text.replace("\x00", " ")


# --- texts that are not mathematics ------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """A normalised answer for the comparison of texts. The case of words means nothing, that of symbols does."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(
        r" ?([^\w\s\\]) ?| (?=\\)|(?<=\\[a-zA-Z]{2}) (?=\d)", r"\1", text
    )  # a space beside a sign parts nothing
    words = re.sub(r"^\((.*)\)$", r"\1", text)
    words = words.strip(" .,;:!?'" if re.search(r"[^\W\d_]{3}", words) else " .,;:")
    is_words = re.fullmatch(r"[^\W\d_]|(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*", words)
    return words.casefold() if is_words else text


def canonical(text: str) -> str:
    """What answers of one plain form share: ``\\$1{,}234.0``, ``1234`` and ``2468/2`` are one vote.

    For answers of which only the text is known: those with one canonical spelling are equal, others may be, too.
    """
    value = split_unit(normalise(text)).value
    value = re.sub(r"^[A-Za-z]\w* ?= ?(?=[^=,]*$)", "", value)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", value):
        value = value.replace(",", "")
    bare = re.sub(
        r"\\frac\{(\d+)\}\{(\d+)\}|\\frac(\d)(\d)",
        r"\1\3/\2\4",
        value.replace(" ", "") if not re.search(r"\d \d", value) else value,
    )
    number = re.fullmatch(r"([+-]?)\(?(?:(\d+)\+)?(\d+|\d*\.\d+)(?:/(\d+))?\)?", bare)
    if number is None or len(bare) > MAX_EXACT_DIGITS or (number[4] and ("." in number[3] or not int(number[4]))):
        return plain_text(bare)
    total = Fraction(number[3]) / int(number[4] or 1) + int(number[2] or 0)
    return str(-total if number[1] == "-" else total)
