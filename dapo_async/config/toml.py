"""TOML files and dotted overrides become a checked ``Config``, or one clear sentence."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from dapo_async.config.settings import Config
from dapo_async.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``overrides`` (each ``table.key=value``, the value in TOML), and check the result.

    Raises ``ConfigError`` with the file, the dotted path of the field, its value and what would be right.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    config = build_config(table, str(path))
    if not config.demo.task and "max_tokens" not in table.get("sampling", {}):
        raise ConfigError(
            f"{path}: sampling.max_tokens is needed without [demo]: the longest answer in tokens, such as 2048; its "
            f"default of {config.sampling.max_tokens} suits the demo, and would cut the answers of other models short"
        )
    return config


def build_config(table: dict[str, Any], origin: str) -> Config:
    """Check a plain table of tables. ``origin`` names it in errors. Raises ``ConfigError``."""
    try:
        return msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(str(error), table)}") from None


def plain(config: Config) -> dict[str, Any]:
    """A configuration as the plain table that ``build_config`` reads."""
    return msgspec.to_builtins(config)


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set one ``table.key=value`` in place. A value that is not TOML is taken as a string.

    Raises ``ConfigError`` if the text has not that form.
    """
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError(f'--set "{override}": must look like table.key=value, for example schedule.max_staleness=0')
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f'--set "{override}": "{name}" is a value, not a table')
    table[names[-1]] = value


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """``optimizer.lr 1e-06 -> 1e-05, ...``: settings that both have, with values that differ."""
    return ", ".join(
        f"{name} {json.dumps(value)} -> {json.dumps(after[name])}"
        for name, value in before.items()
        if name in after and value != after[name]
    )


def _explain(message: str, table: dict[str, Any]) -> str:
    """msgspec's ``... - at `$.a.b` `` as ``a.b = value: ...``."""
    match = re.search(r" - at `\$\.?([^`]*)`$", message)
    message, path = (message[: match.start()], match[1]) if match else (message, "")
    unknown = re.match(r"Object contains unknown field `(.*)`", message)
    if unknown:
        where = f"{path}.{unknown[1]}" if path else unknown[1]
        return f"{where}: there is no such setting; known here: {', '.join(_known(path))}"
    if not path:
        return message
    path, of_any = path.removesuffix("[...]"), path.endswith("[...]")
    value: Any = table
    for name in filter(None, re.split(r"[.\[\]]", path)):
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal():
            value = value[int(name)]
    if of_any:  # of the keys that a table may have, msgspec does not name the one
        key = next(key for key, held in value.items() if not isinstance(held, str | int | float))
        return f"{path}.{key} = {value[key]!r}: must be a string, a number, true or false"
    if isinstance(value, dict):
        return f"[{path}]: {message}"
    choices = _choices(path)
    return f"{path} = {value!r}: must be {choices}" if choices else f"{path} = {value!r}: {message}"


def _choices(path: str) -> str:
    """What a setting may be, if it is one of a few."""
    kind: Any = Config
    for name in path.split("."):
        kind = (
            {f.name: f.type for f in msgspec.structs.fields(kind)}.get(name)
            if hasattr(kind, "__struct_fields__")
            else None
        )
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if kind is bool:
        return "true or false, in lower case"
    return " or ".join(f'"{word}"' for word in get_args(kind)) if get_origin(kind) is Literal else ""


def _known(path: str) -> list[str]:
    """Names of the settings of the table at ``path`` (of the whole configuration if empty)."""
    section: Any = Config
    for name in filter(None, path.split(".")):
        section = {f.name: f.type for f in msgspec.structs.fields(section)}.get(name, Config)
    return [f.name for f in msgspec.structs.fields(section)]
