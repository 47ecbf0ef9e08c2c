"""Generates ``docs/config.md`` from the structs of ``config``: every setting with its type, bounds, default, meaning.

Owns the page's layout and no fact of its own: what is missing there is missing in ``config``.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import inspect

from dapo_async.config.settings import Config
from docs.generators.page import note, run

MODULE = "docs.generators.config_page"
BOUNDS = {
    "ge": ">= {}",
    "gt": "> {}",
    "le": "<= {}",
    "lt": "< {}",
    "min_length": "length >= {}",
    "max_length": "length <= {}",
}
NAMES = {"IntType": "integer", "FloatType": "number", "BoolType": "boolean", "StrType": "string"}


def config_page() -> str:
    """The text of ``docs/config.md``: one table per TOML table. Raises ``ValueError`` for what it cannot describe."""
    lines = [
        "# Configuration",
        "",
        note(MODULE, "config.md"),
        "",
        "A run is configured by one TOML file; `--set table.key=value` overrides single settings, with the value in",
        "TOML. Every setting has a default; `model.path`, `data.train` and `sampling.max_tokens` must be given all the",
        "same where there is no `[demo]`. Unknown tables, unknown keys, wrong types and values out of bounds are",
        "refused. `dapo-async check CONFIG` prints the whole resolved configuration. [Your own task](own_task.md)",
        "shows the settings to begin with.",
    ]
    for table in msgspec.structs.fields(Config):
        lines += ["", f"## [{table.name}]", "", _summary(table.type), ""]
        lines += ["| key | type | bounds | default | meaning |", "|---|---|---|---|---|"]
        lines += [_row(table.name, field) for field in _fields(table.type)]
    return "\n".join(lines) + "\n"


def _fields(section: type[msgspec.Struct]) -> Sequence[inspect.Field]:
    described = inspect.type_info(section)
    assert isinstance(described, inspect.StructType), section
    return described.fields


def _row(table: str, field: inspect.Field) -> str:
    where = f"{table}.{field.name}"
    schema = field.type.extra_json_schema if isinstance(field.type, inspect.Metadata) else None
    meaning = (schema or {}).get("description", "")
    if not meaning:
        raise ValueError(f"{where} has no description in dapo_async/config/settings.py")
    kind = field.type.type if isinstance(field.type, inspect.Metadata) else field.type
    cells = [f"`{field.name}`", _kind(where, kind), _bounds(kind), f"`{_toml(where, _default(field))}`", meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(where: str, kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(f"`{_toml(where, value)}`" for value in kind.values)
    if isinstance(kind, inspect.ListType):
        return f"list of {_kind(where, kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return "table"
    name = NAMES.get(type(kind).__name__)
    if name is None:
        raise ValueError(f"{where} is of a type this page cannot name: {type(kind).__name__}")
    return name


def _bounds(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.ListType):
        inner = _bounds(kind.item_type)
        return f"each {inner}" if inner else ""
    limits = [(text, getattr(kind, name, None)) for name, text in BOUNDS.items()]
    return ", ".join(
        text.format(int(limit) if limit == int(limit) else limit) for text, limit in limits if limit is not None
    )


def _default(field: inspect.Field) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _toml(where: str, value: Any) -> str:
    """``value`` as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()  # JSON's escapes are TOML's
    if isinstance(value, list):
        return "[" + ", ".join(_toml(where, item) for item in value) + "]"
    if value == {}:
        return "{}"
    raise ValueError(f"{where} has a default this page cannot write: {value!r}")


def _summary(section: type[msgspec.Struct]) -> str:
    """The docstring as one line, with code in Markdown's quotes."""
    return " ".join((section.__doc__ or "").split()).replace("``", "`")


if __name__ == "__main__":
    run(MODULE, config_page)
