"""Rows of prompts: JSONL, Parquet or a data set of ``hub_data``, laid out like DAPO-Math-17k or as prompt and answer.

Reads and checks one row after the other, in bounded memory. Knows no tokenizer, and drops nothing: what cannot be used
is refused with file and line. Source of the layout: the data of arXiv:2503.14476, ``dapo-math-17k.parquet`` and
``aime-2024.parquet``.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dapo_async.data.hub_data import is_data_set, open_data_set
from dapo_async.errors import ConfigError

READ_ROWS = 4096  # rows of a Parquet file or data set that are held at one time
COLUMNS = ("prompt", "answer", "reward_model", "extra_info")
LAYOUTS = (
    "needed are prompt and answer, or, as in DAPO-Math-17k, prompt (a list of messages with role and content) and "
    "reward_model (with ground_truth)"
)
PARQUET_MAGIC = b"PAR1"
# Beginnings of lists that were stored as text. A list of numbers is none of them: [1, 2] may be an answer.
LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
PYTHON_MESSAGES = re.compile(r"\[\s*\{\s*'(role|content)'\s*:")
LIST_OF_TEXTS = re.compile(r'\s*\[\s*".*"\s*\]\s*$', re.DOTALL)

Messages = tuple[tuple[str, str], ...]  # (role, content) of each


class Row(NamedTuple):
    """One row as it stands in the file. A plain prompt is one user message; a list of one truth is that truth."""

    place: str  # "FILE, line 3" or "FILE, row 3", counted from 1
    messages: Messages
    truth: str
    source_id: str | None  # extra_info.index, as text


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of ``source`` in order: a file (Parquet if named so or beginning like one, else JSONL), or a data set.

    Raises ``ConfigError`` naming the file, the line or row, and what would be right.
    """
    path = Path(source)
    try:
        with path.open("rb") as file:
            parquet = path.suffix == ".parquet" or file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        if is_data_set(str(source)):
            yield from _data_set_rows(str(source))
            return
        raise ConfigError(
            f"{source}: no such file or folder, nor the form of a hub id (owner/name); prompts come as a JSONL or "
            "Parquet file, a folder, or a hub id"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    yield from _parquet_rows(path) if parquet else _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    decoder = msgspec.json.Decoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place}: not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ConfigError(f"{place}: must be one JSON object per line, got {_shown(record)}")
            _check_columns(place, record)
            prompt = record["prompt"]
            if isinstance(prompt, list):
                prompt = tuple(_pair(place, message) for message in prompt)
            if "reward_model" in record:
                truth, name = _field(record["reward_model"], "ground_truth"), "reward_model.ground_truth"
            else:
                truth, name = record["answer"], "answer"
            yield _row(place, prompt, truth, name, _field(record.get("extra_info"), "index"))


def _pair(place: str, message: Any) -> tuple[str, str]:
    if isinstance(message, dict) and set(message) == {"role", "content"}:
        return message["role"], message["content"]
    raise ConfigError(f"{place}: a message must hold role and content and nothing else, got {_shown(message)}")


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _column_rows(
                str(path), file.schema_arrow, lambda names: file.iter_batches(READ_ROWS, columns=names)
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file: {error}") from None


def _data_set_rows(source: str) -> Iterator[Row]:
    opened = open_data_set(source)
    yield from _column_rows(opened.name, opened.schema, lambda names: opened.batches(names, READ_ROWS))


def _column_rows(
    place: str, schema: pyarrow.Schema, read: Callable[[list[str]], Iterable[pyarrow.RecordBatch]]
) -> Iterator[Row]:
    """Column by column, because 1.8 million rows as Python dicts would take minutes."""
    _check_columns(place, schema.names)
    _check_prompt_type(place, schema.field("prompt").type)
    name = "reward_model.ground_truth" if "reward_model" in schema.names else "answer"
    number = 0
    for batch in read([column for column in COLUMNS if column in schema.names]):
        columns = (_prompts(batch), _values(batch, name), _values(batch, "extra_info.index"))
        for prompt, truth, source_id in zip(*columns, strict=True):
            number += 1
            yield _row(f"{place}, row {number}", prompt, truth, name, source_id)


def _check_prompt_type(place: str, column: pyarrow.DataType) -> None:
    if pyarrow.types.is_list(column) or pyarrow.types.is_large_list(column):
        message = column.value_type
        if pyarrow.types.is_struct(message) and {field.name for field in message} == {"role", "content"}:
            return
    elif not pyarrow.types.is_nested(column):
        return
    raise ConfigError(f"{place}: column prompt must hold texts or lists of messages (role, content), got {column}")


def _prompts(batch: pyarrow.RecordBatch) -> list[Any]:
    """A text, a tuple of (role, content), or None, of each row."""
    column = batch.column("prompt")
    if not pyarrow.types.is_nested(column.type):
        return list(column.to_pylist())
    messages = column.flatten()
    pairs = zip(messages.field("role").to_pylist(), messages.field("content").to_pylist(), strict=True)
    return [None if length is None else tuple(islice(pairs, length)) for length in column.value_lengths().to_pylist()]


def _values(batch: pyarrow.RecordBatch, name: str) -> list[Any]:
    """The values of a column or of a field of it; None where there is none."""
    name, _, inner = name.partition(".")
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    if inner and not (pyarrow.types.is_struct(column.type) and column.type.get_field_index(inner) >= 0):
        return [None] * batch.num_rows
    return list((pyarrow.compute.struct_field(column, inner) if inner else column).to_pylist())


def _check_columns(place: str, names: Iterable[str]) -> None:
    if "prompt" not in names or not ("answer" in names or "reward_model" in names):
        raise ConfigError(f"{place}: has columns {', '.join(names) or '(none)'}; {LAYOUTS}")


def _row(place: str, prompt: Any, truth: Any, truth_name: str, source_id: Any) -> Row:
    """Check one row. ``prompt`` is right if it is a text, or a tuple of (role, content) that are texts."""
    messages = _messages_of_text(place, prompt) if isinstance(prompt, str) else prompt
    if not isinstance(messages, tuple):
        raise ConfigError(f"{place}: prompt must be a text or a list of messages, got {_shown(prompt)}")
    filled = False
    for role, content in messages:
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ConfigError(f"{place}: role and content of a message must be texts, got {_shown([role, content])}")
        filled = filled or not (content == "" or content.isspace())
    if not filled:
        raise ConfigError(f"{place}: prompt is empty")
    truth = _only(place, truth, truth_name, truth)
    if isinstance(truth, bool) or not isinstance(truth, str | int):
        raise ConfigError(f"{place}: {truth_name} must be a text or an integer, got {_shown(truth)}")
    if not (source_id is None or isinstance(source_id, str | int)):
        raise ConfigError(f"{place}: extra_info.index must be a text or an integer, got {_shown(source_id)}")
    return Row(place, messages, str(truth), None if source_id is None else str(source_id))


def _messages_of_text(place: str, text: str) -> Messages:
    """A text is one user message, unless it is a list of messages that somebody stored as JSON."""
    start = text.lstrip()
    if not LIST_OF_OBJECTS.match(start):
        return (("user", text),)
    try:
        listed = msgspec.json.decode(text)
    except msgspec.DecodeError:
        if PYTHON_MESSAGES.match(start):
            raise ConfigError(
                f"{place}: prompt is a list of messages as Python prints it, {_shown(text)}; store it as a list, or as "
                "JSON"
            ) from None
        return (("user", text),)
    if not any("role" in one or "content" in one for one in listed if isinstance(one, dict)):
        return (("user", text),)
    return tuple(_pair(place, message) for message in listed)


def only_truth(row: Row) -> Row:
    """A truth that is a list of one text, stored as JSON, is that text. Raises ``ConfigError`` for more than one."""
    if not LIST_OF_TEXTS.match(row.truth):
        return row
    try:
        listed = msgspec.json.decode(row.truth)
    except msgspec.DecodeError:
        return row
    truth = _only(row.place, listed, "truth", row.truth)
    if not isinstance(truth, str):
        raise ConfigError(f"{row.place}: the truth must be a text or an integer, got {_shown(truth)}")
    return row._replace(truth=truth)


def _only(place: str, listed: Any, name: str, stored: Any) -> Any:
    """The one element of a list; what is no list as it is."""
    if not isinstance(listed, list):
        return listed
    if len(listed) != 1:
        raise ConfigError(f"{place}: {name} must be one truth, got a list of {len(listed)}: {_shown(stored)}")
    return listed[0]


def _shown(value: Any) -> str:
    """The value as JSON, shortened."""
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= 100 else f"{text[:97]}..."
