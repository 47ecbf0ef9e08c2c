"""Prompts with their ground truths, and the endless or finite stream of them that a run works through.

``load_prompts`` turns a file into tokens, once, at the start of the learner: duplicates go, over-long prompts are
dealt with as configured, and everything is counted. ``PromptStream`` is a pure function of position, so resuming is
continuing to count. Reading the file is ``readers``' business; leases are ``schedule``'s.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError

from dapo_async.config.settings import Data
from dapo_async.data.readers import Messages, Row, only_truth, read_rows
from dapo_async.errors import ConfigError

CHUNK_PROMPTS = 256  # tokenized in one call

logger = logging.getLogger(__name__)
Tokenizer = Any  # any tokenizer of transformers


class Prompt(NamedTuple):
    """One problem. ``text`` is what was encoded, before any truncation."""

    id: str
    ids: np.ndarray  # int32 [prompt tokens]
    truth: str
    text: str


class Counts(NamedTuple):
    """What became of the rows: ``rows = without_truth + duplicates + conflicting + overlong_dropped + kept``."""

    rows: int  # rows read
    without_truth: int  # its truth is empty or white space
    duplicates: int  # same prompt and same truth as an earlier row
    conflicting: int  # same prompt as an earlier row, another truth; the earlier one stands
    overlong_dropped: int
    overlong_truncated: int  # among those kept
    kept: int


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, all different, in the order of their first appearance."""

    path: str
    prompts: list[Prompt] = field(repr=False)
    counts: Counts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of all ids, token ids and truths, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            for part in (prompt.id.encode(), prompt.ids.astype("<i4").tobytes(), prompt.truth.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def summary(self) -> str:
        """One sentence on what was kept and what was not."""
        counts = self.counts
        parts = [
            f"{number} {what}"
            for number, what in (
                (counts.without_truth, "without a truth dropped"),
                (counts.duplicates, "duplicates removed"),
                (counts.conflicting, "removed that contradict an earlier row with the same prompt"),
                (counts.overlong_dropped, "dropped as too long"),
                (counts.overlong_truncated, "truncated"),
            )
            if number
        ]
        return ", ".join([f"{self.path}: {counts.kept} prompts of {counts.rows} rows", *parts])


class PromptStream:
    """The prompts in the order of training: ``stream[n]`` for n = 0, 1, 2, ... depends on nothing but its arguments.

    Each epoch passes over all prompts, in a fresh order drawn from ``(seed, epoch)`` if ``shuffle``. ``epochs`` 0
    never ends. Past the end ``IndexError`` is raised, so the stream can be iterated.
    """

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool, epochs: int) -> None:
        self.prompts = prompts
        self.total = epochs * len(prompts) if epochs else None  # None: endless
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("an endless prompt stream has no length")
        return self.total

    def __bool__(self) -> bool:
        return True  # rather than ask for a length

    @property
    def fingerprint(self) -> str:
        """That of the prompts; their order follows from the arguments."""
        return self.prompts.fingerprint

    def __getitem__(self, n: int) -> Prompt:
        if n < 0 or (self.total is not None and n >= self.total):
            raise IndexError(f"prompt {n} of a stream of {self.total}")
        epoch, position = divmod(n, len(self.prompts))
        if not self._shuffle:
            return self.prompts[position]
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.prompts), self._seed, epoch)
        return self.prompts[int(self._order[position])]


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [length].

    Sorts raw 64-bit draws: NumPy guarantees those across its versions, but not what ``Generator.permutation`` does.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(length), kind="stable")


def load_prompts(
    path: str | Path, tokenizer: Tokenizer, data: Data, *, limit: int = 0, unwrap: bool = True
) -> PromptSet:
    """The prompts of a file, folder or hub id, tokenized; with ``limit``, reading stops once so many are kept.

    With ``unwrap`` a truth such as ``["5"]`` is 5; a user's own verifier may want the list, as tests of a program are.

    A prompt's id is its ``extra_info.index`` if all have different ones, else a hash of its messages. Raises
    ``ConfigError`` naming file and line for what cannot be used, and if no prompt is left.
    """
    encoder = Encoder(tokenizer, data.chat_template, data.template_date)
    tally: Counter[str] = Counter()
    kept: list[tuple[Row, str, np.ndarray]] = []
    read = read_rows(path)
    rows = _distinct(map(only_truth, read) if unwrap else read, tally)
    while chunk := list(islice(rows, min(CHUNK_PROMPTS, limit - len(kept)) if limit else CHUNK_PROMPTS)):
        for row, (text, ids) in zip(chunk, encoder.encode(chunk), strict=True):
            fitted = _fit(row, ids, data, encoder.begin, tally)
            if fitted:
                kept.append((row, text, np.array(fitted, dtype=np.int32)))
    tally["kept"] = len(kept)
    counts = Counts(**{name: tally[name] for name in Counts._fields})
    source_ids = [row.source_id for row, _, _ in kept]
    unique = None not in source_ids and len(set(source_ids)) == len(source_ids)
    prompts = [
        Prompt(str(row.source_id) if unique else _hash(row.messages), ids, row.truth, text) for row, text, ids in kept
    ]
    if not prompts:
        reason = "it is empty"
        if counts.rows:
            reason = "none has a truth" if counts.without_truth == counts.rows else "all exceed data.max_prompt_tokens"
        raise ConfigError(f"{path}: no prompt is left of {counts.rows} rows: {reason}")
    loaded = PromptSet(str(path), prompts, counts)
    lost = counts.without_truth or counts.conflicting or counts.overlong_dropped
    logger.log(logging.WARNING if lost else logging.INFO, loaded.summary())
    return loaded


def known_tokens(tokenizer: Tokenizer) -> int:
    """All token ids of ``tokenizer`` are below this; its length may be less, where numbers are left out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def prints_date(tokenizer: Tokenizer) -> bool:
    """Whether the chat template of ``tokenizer`` asks what day it is."""
    return "strftime_now" in str(tokenizer.chat_template)


class Encoder:
    """Messages to tokens: through the chat template if there is one and it is wanted, else the contents as they are."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: Literal["auto", "never", "require"], template_date: str = ""
    ) -> None:
        """``template_date``: what a template prints as today, YYYY-MM-DD; empty: today."""
        if chat_template == "require" and not tokenizer.chat_template:
            raise ConfigError(
                'data.chat_template = "require": the tokenizer has no chat template; use "auto" or "never"'
            )
        self._tokenizer = tokenizer
        self._joins = chat_template == "never"
        self._template = chat_template != "never" and bool(tokenizer.chat_template)
        self._template_options: dict[str, Any] = {}
        if template_date and prints_date(tokenizer):
            self._template_options["strftime_now"] = datetime.fromisoformat(template_date).strftime
        self._vocabulary = known_tokens(tokenizer)
        # Only the start token is kept of what a tokenizer adds: an end token would close the prompt before its answer.
        begin = tokenizer.bos_token_id
        begins = begin is not None and list(tokenizer("")["input_ids"])[:1] == [begin]
        self._prefix = [begin] if begins and not self._template else []
        self.begin = begin
        if chat_template == "auto" and not self._template:
            logger.info("the tokenizer has no chat template: prompts are their contents as they are")

    def encode(self, rows: list[Row]) -> list[tuple[str, list[int]]]:
        """Text and token ids of each row. Raises ``ConfigError`` naming the row."""
        texts = [self._text(row) for row in rows]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for row, ids in zip(rows, encoded, strict=True):
            if not ids:
                raise ConfigError(f"{row.place}: the tokenizer makes no token of this prompt")
            if min(ids) < 0 or max(ids) >= self._vocabulary:
                raise ConfigError(f"{row.place}: token ids must be below {self._vocabulary}, got {max(ids)}")
        return [(text, self._prefix + list(ids)) for text, ids in zip(texts, encoded, strict=True)]

    def _text(self, row: Row) -> str:
        if not self._template:
            if len(row.messages) > 1 and not self._joins:
                raise ConfigError(
                    f"{row.place}: the prompt has {len(row.messages)} messages, and the tokenizer no chat template to "
                    'make one text of them; set data.chat_template = "never" to join their contents as they are'
                )
            return "".join(content for _, content in row.messages)
        messages = [{"role": role, "content": content} for role, content in row.messages]
        role, content = row.messages[-1]
        begun = role == "assistant"  # the answer, which is gone on with
        if begun and _is_blank(content):
            raise ConfigError(
                f"{row.place}: the prompt ends with an empty assistant message; leave it out, the chat template begins "
                "the answer"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                **self._template_options,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigError(f"{row.place}: the tokenizer's chat template refuses this prompt: {error}") from None
        return str(text)


def _distinct(rows: Iterator[Row], tally: Counter[str]) -> Iterator[Row]:
    """The first row of each prompt that has a truth."""
    truths: dict[Messages, str] = {}
    for row in rows:
        tally["rows"] += 1
        if _is_blank(row.truth):
            tally["without_truth"] += 1  # a verifier would find an empty answer right, or none
            continue
        first = truths.get(row.messages)
        if first is None:
            truths[row.messages] = row.truth
            yield row
        else:
            tally["duplicates" if first == row.truth else "conflicting"] += 1


def _is_blank(text: str) -> bool:
    """Whether nothing of ``text`` is seen when it is printed."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def _fit(row: Row, ids: list[int], data: Data, begin: int | None, tally: Counter[str]) -> list[int]:
    """``ids`` within ``data.max_prompt_tokens``; empty if the prompt is dropped. ``begin`` is the start token."""
    longest = data.max_prompt_tokens
    if len(ids) <= longest:
        return ids
    if data.overlong_prompts == "refuse":
        raise ConfigError(
            f"{row.place}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens = {longest}; raise that, "
            'or set data.overlong_prompts to "drop" or "truncate_left"'
        )
    if data.overlong_prompts == "drop":
        tally["overlong_dropped"] += 1
        return []
    tally["overlong_truncated"] += 1
    # A model trained with a start token is at a loss without it; the end holds the generation prompt.
    head = ids[:1] if ids[0] == begin and longest > 1 else []
    return head + ids[len(head) - longest :]


def _hash(messages: Messages) -> str:
    """16 hexadecimal digits of the roles and contents."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (text.encode("utf-8", "surrogatepass") for message in messages for text in message):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
