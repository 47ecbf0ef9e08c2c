"""Which part of a text is its answer: the last ``Answer:`` line, or without one the last ``\\boxed{}``.

Nothing else is searched: whoever takes the last number of a text judges what was cut off by an intermediate result.
How the answer is written is no business of this module (``notation``).

| the text | its answer |
|---|---|
| ``Answer: 5``, ``**Answer:** 5``, ``Answer：5``, ``## Answer`` and the next line | what follows, of the last one |
| ``Answer:`` and displayed mathematics, an environment or a code block | what stands inside |
| a box in what follows ``Answer:`` | what is in the box |
| an ``Answer:`` line of words alone, and a box or a display after it | the box, the display |
| no ``Answer:`` | the last box; of several with only commas, "and", "or" between them, a list |
| a box that is never closed | none: the text was cut off |
"""

import re
from typing import NamedTuple

MAX_ANSWER_CHARS = 2000
MAX_BOXES = 100  # of one list

FULL_WIDTH = {0xFF01 + offset: chr(0x21 + offset) for offset in range(94)}  # one character each: positions stay
MARKER = re.compile(r"answer[ \t]*[*_`}]*[ \t]*:|^[ \t]*#{1,6}[ \t]*(?:final[ \t]+)?answer[ \t]*$", re.I | re.M)
LEADING_MARKUP = re.compile(r"(?:[\s*_}]|\\text(?:bf|rm|it)?\{\s*\})*")
DISPLAY = re.compile(r"\$\$|\\\[|\\\(|\\begin\{(?P<environment>[a-zA-Z]+\*?)\}|(?P<fence>```|~~~)[a-zA-Z]*")
CLOSERS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
BOX = re.compile(r"\\(?:boxed|fbox|framebox|bbox)(?![a-zA-Z])\s*")
# What stands between boxes of one list: connectives and labels, on one line or with a comma or a word.
CONNECTIVE = r"[,;&]|\\\\|\\text\{[\s,]*(?:and|or)\s*\}|\band\b|\bor\b|\\(?:q?quad|land|lor|wedge|vee)\b"
BETWEEN_BOXES = re.compile(rf"(?:{CONNECTIVE}|\s|\$|\\[,;:!()\[\] ]|[*`]|[a-zA-Z]\w*\s*=)*")
TAGS = re.compile(r"^\s*(?:<\|?[a-zA-Z_]+\|?>\s*)+|(?:\s*</?\|?[a-zA-Z_]+\|?>)+\s*$|[\s✓✔✅☑∎■□]+$|\s#+$")
A_CONNECTIVE = re.compile(CONNECTIVE)
# Words alone: no digit, no command, no sign of mathematics.
WORDS_ALONE = re.compile(r"[^\d\\$=<>^+*/|∞√π½⅓¼]*[a-zA-Z]{2}[^\d\\$=<>^+*/|∞√π½⅓¼]*")
SENTENCE = re.compile(r"(?:[^a-zA-Z\\$]*\b[a-zA-Z]{2,}\b){3}")  # at least three words
AN_ANSWER = re.compile(r"\$|\\[a-zA-Z(\[]")


class Box(NamedTuple):
    """Where a box stands in a text, and what is in it."""

    start: int
    end: int
    content: str


def find_answer(text: str) -> str | None:
    """The answer in ``text``, as it is written there; None if there is none."""
    text = text.translate(FULL_WIDTH)
    answer = None
    for marker in reversed(list(MARKER.finditer(text))):
        after = text[LEADING_MARKUP.match(text, marker.end()).end() :]  # type: ignore[union-attr]  # matches nothing too
        if after.strip("*_#`$ \n"):
            answer = answer_after(after)
            break
    else:
        answer = boxed_answer(text)
    answer = strip_markup(answer or "")[:MAX_ANSWER_CHARS]
    return answer or None


def answer_after(text: str) -> str | None:
    """The answer in a text that begins after ``Answer:``."""
    display = displayed(text)
    if display is not None:
        return boxed_answer(display) if BOX.search(display) else display
    line, _, rest = text.partition("\n")
    if BOX.search(line):
        return boxed_answer(text[: end_of_boxes(text, len(line))])
    words_alone = bool(WORDS_ALONE.fullmatch(line)) or line.rstrip("* ").endswith(":")
    if words_alone and (display := displayed(rest.lstrip())) is not None and not BOX.search(rest):
        return display
    told_later = words_alone or (SENTENCE.match(line) and not AN_ANSWER.search(line))
    if told_later and BOX.search(rest):
        return boxed_answer(rest)
    opened = DISPLAY.search(line)
    if opened and (inside := displayed(text[opened.start() :])) is not None and "\n" in inside:
        return line[: opened.start()] + inside
    return line


def displayed(text: str) -> str | None:
    """What stands in the display, environment or code block that ``text`` begins with; None: it begins with none.

    One that is never closed goes on to the end of the text. An environment stays around its rows.
    """
    opened = DISPLAY.match(text)
    if opened is None:
        return None
    environment = opened["environment"]
    closer = f"\\end{{{environment}}}" if environment else CLOSERS.get(opened[0], opened["fence"])
    inside, closed, after = text[opened.end() :].partition(closer)
    if environment:
        return opened[0] + inside + closed + after.partition("\n")[0]
    if not opened["fence"] and after.partition("\n")[0].strip(" \t.*_"):
        return None  # only part of its line: "$$5$$ and $$7$$"
    return inside


def boxed_answer(text: str) -> str | None:
    """What is in the last box of ``text``, or a list of what is in the last boxes; None if there is none."""
    boxes = find_boxes(text)
    if not boxes:
        return None
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : listed[0].start]
        apart = "\n" in between.strip("$ ") and not A_CONNECTIVE.search(between)
        if apart or not BETWEEN_BOXES.fullmatch(between):
            break
        listed.insert(0, box)
    contents = [content for box in listed if (content := box.content.strip())]
    return ", ".join(contents[:1] if len(set(contents)) == 1 else contents)  # what is said twice is no list


def find_boxes(text: str) -> list[Box]:
    """The outermost boxes of ``text``, the last ones only where there are many; none if the last is never closed."""
    boxes: list[Box] = []
    position = 0
    while command := BOX.search(text, position):
        box = read_box(text, command)
        if box is None:
            return []
        boxes.append(box)
        position = box.end
    return boxes[-MAX_BOXES:]


def read_box(text: str, command: re.Match[str]) -> Box | None:
    """The box whose command this is; None if it is never closed."""
    start = command.end()
    if not text.startswith("{", start):  # as TeX reads it: one number, one character or one command
        bare = re.compile(r"-?\d+(?:\.\d+)?|\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s\\]").match(text, start)
        return Box(command.start(), bare.end(), bare[0]) if bare else None
    end = closing_brace(text, start)
    return None if end is None else Box(command.start(), end + 1, text[start + 1 : end])


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that opens at ``start`` closes; None: nowhere. Escaped braces open and close nothing."""
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return position
        position += 1
    return None


def end_of_boxes(text: str, line_end: int) -> int:
    """Where the line ends, or the last box that begins in it."""
    ends = [box.end for box in find_boxes(text) if box.start < line_end]
    return max([line_end, *ends]) if ends else len(text)


def strip_markup(answer: str) -> str:
    """``answer`` without white space, Markdown, tags and braces that close nothing around it."""
    answer = TAGS.sub("", answer).strip()
    while answer and (answer[-1] in "*_`" or answer[0] in "*`"):
        answer = answer.strip("*`").rstrip("_").strip()
    excess = excess_braces(answer)
    while excess and answer.endswith("}"):
        answer, excess = answer[:-1].rstrip(), excess - 1
    return answer.strip()


def excess_braces(text: str) -> int:
    """How many braces of ``text`` close without having been opened."""
    depth = excess = 0
    for brace in re.findall(r"\\.|[{}]", text):
        if brace == "{":
            depth += 1
        elif brace == "}" and depth:
            depth -= 1
        elif brace == "}":
            excess += 1
    return excess
