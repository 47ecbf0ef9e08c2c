"""DAPO's check of a mathematical answer, exactly: the last ``Answer:`` line, normalised, or ``\\boxed{}``.

Pure functions of strings. Equality is of strings after normalisation: ``33.0`` is not ``33``.
Sources: the ``math_dapo`` check of the DAPO release (arXiv:2503.14476, section 4), whose normalisation is that of
Minerva (arXiv:2206.14858, appendix D.1); the order of the steps is part of the definition.
"""

import re

ANSWER_CHARS = 300  # only this many last characters are searched for "Answer:"
BOXED_CHARS = 100  # and this many for \boxed{}
NO_ANSWER = "[INVALID]"

_ANSWER_LINE = re.compile(r"Answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BOX = "\\boxed{"
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
# Deleted in this order: "\text{}^2" has to go before "\text{}".
_DELETED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = (
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # the first $...$ alone
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12 is \frac{1}{2}
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def check_answer(text: str, truth: str, boxed_fallback: bool = False) -> tuple[bool, str]:
    """Whether ``text`` ends in the right answer, and the answer that was seen (``[INVALID]``: none).

    ``boxed_fallback`` accepts the last ``\\boxed{}`` of a text that has no ``Answer:`` line, unnormalised.
    """
    text = text[-ANSWER_CHARS:]
    answers = _ANSWER_LINE.findall(text)
    if answers:
        predicted = normalise(answers[-1])
        return predicted == normalise(truth), predicted
    if not boxed_fallback:
        return False, NO_ANSWER
    boxed = last_boxed(text[-BOXED_CHARS:])
    return (False, NO_ANSWER) if boxed is None else (boxed == truth, boxed)


def normalise(answer: str) -> str:
    """The canonical spelling of an answer: no units, no spaces, no LaTeX dress, no thousands separators."""
    answer = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for word in _DELETED:
        answer = answer.replace(word, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces balanced; None if there is none or it is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
