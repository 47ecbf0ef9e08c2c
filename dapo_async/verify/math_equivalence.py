"""Whether an answer is mathematically equal to the truth, by the ``math-verify`` package.

Runs in the child processes of a ``pool`` only, where what hangs is ended: the package's own time limits are off,
because they are alarms. Owned here: which part of a text is its answer. That is the last ``Answer:`` line, else the
last ``\\boxed{}``, and nothing else: math-verify's own search takes the last number it finds, so that a text cut off in
the midst of its work would be judged by an intermediate result.
"""

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from dapo_async.verify.dapo_math import NO_ANSWER, last_boxed

ANSWER_LINE = re.compile(r"Answer\s*:[\s*]*([^\n]+)", re.IGNORECASE)
MAX_ANSWER_CHARS = 2000
DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# It warns that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check_equivalence(text: str, truth: str) -> tuple[bool, str]:
    """Whether the answer in ``text`` equals ``truth``, and the answer that was seen (``[INVALID]``: none).

    Raises ``ValueError`` if ``truth`` is no mathematics, and whatever the package raises. May take for ever.
    """
    answer = find_answer(text)
    if answer is None:
        return False, NO_ANSWER
    gold = _parse(truth)
    if not gold:
        raise ValueError("math-verify cannot read the truth")
    predicted = _parse(answer)
    # It swallows errors one comparison at a time, and a later one may still succeed.
    if verify(gold, predicted, timeout_seconds=None):
        return True, answer
    return verify(gold, predicted, timeout_seconds=None, raise_on_error=True), answer


def find_answer(text: str) -> str | None:
    """The last ``Answer:`` line of ``text``, else the content of its last ``\\boxed{}``; None without either."""
    lines = ANSWER_LINE.findall(text)
    answer = lines[-1] if lines else last_boxed(text)
    return None if answer is None else answer.strip().rstrip("*.").strip()[:MAX_ANSWER_CHARS]


def _parse(answer: str) -> list[object]:
    """What math-verify makes of an answer: expressions, then its text. What has no delimiters is taken as LaTeX."""
    marked = answer if any(mark in answer for mark in DELIMITERS) else f"${answer}$"
    return list(parse(marked, EXTRACTION, parsing_timeout=None, raise_on_error=True))
