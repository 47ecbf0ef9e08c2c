"""The words around an answer: what is left of a sentence without those that change nothing of it.

| the text | read as itself, and as |
|---|---|
| ``There are $33$ ways``, ``The roots are $2$ and $3$`` | what stands between the dollars |
| ``The answer is 33`` | what follows the verb |
| ``(B) 33``, ``B. 33`` | the letter; what it stands for |
| ``33, because …``, ``33 (since x = 11)`` | what stands before the reason |

Words that change the value (``not``, ``at least``, ``twice``; ``units.CHANGING_WORDS``) are never left out.
"""

import re
from itertools import pairwise

from dapo_async.verify.units import CHANGING_SUBJECTS, is_harmless, unit_name

SEGMENT = re.compile(r"\$+((?:[^$\\]|\\.)+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
CONNECTIVE = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*")
VERB = r"\b(?:is|are|equals?|be|get|have)(?: equal to)?"
LEAD_IN = re.compile(rf"([A-Za-z][A-Za-z ,'$]*?{VERB}\b)\s*:?\s*(?=\S)")
SUBJECT = re.compile(rf"[A-Za-z ,']*{VERB}\s*:?\s*")
REASON = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|where|i\.e\.|that is)\b.*$|\s+\([^()]*(?:[a-zA-Z]{4,}|=)[^()]*\)$", re.S
)
CHOICE = re.compile(r"(?:\\[a-z]+\s*\{)?\s*\(?([A-E])(?:\)|\.\s)\s*\}?[\s\\~:.,;]*(?=[\d$\\A-Za-z(-])(.+)$", re.S)


def spoken(text: str) -> list[str]:
    """``text``, and what is left of it by each line of the table."""
    found = [text]
    if segments := between_dollars(text):
        found.append(segments)
    lead = LEAD_IN.match(text)
    if lead and is_harmless(lead[1].replace("$", ""), CHANGING_SUBJECTS):
        found.append(text[lead.end() :])
    if choice := CHOICE.match(text):
        found += choice.groups()
    found += [one[: reason.start()] for one in found[:] if (reason := REASON.search(one))]
    return [one for one in found if one.strip()]


def between_dollars(text: str) -> str:
    """The mathematics of a sentence, as a list if there is more; empty if its words may change it, or are a unit."""
    segments = list(SEGMENT.finditer(text))
    if not segments:
        return ""
    before, after = text[: segments[0].start()], text[segments[-1].end() :]
    words = before + after
    subject = SUBJECT.fullmatch(before) and is_harmless(before, CHANGING_SUBJECTS)
    is_sentence = (subject or is_harmless(before)) and is_harmless(after) and re.search(r"[A-Za-z]{2}", words)
    joined = all(CONNECTIVE.fullmatch(text[one.end() : other.start()]) for one, other in pairwise(segments))
    if not is_sentence or not joined or unit_name(after.strip(" .")):
        return ""
    return ", ".join(next(filter(None, segment.groups())) for segment in segments)
