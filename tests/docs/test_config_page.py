"""The generated page of settings says what the configuration says, no more and no less."""

import re
import tomllib
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from dapo_async.config.settings import Config
from docs.generators.config_page import _fields, _row, config_page
from tests import ROOT

CELL = re.compile(r"(?<!\\)\|")


def page_rows(page: str) -> dict[str, list[str]]:
    """``table.key`` to the cells of its row."""
    rows, table = {}, ""
    for line in page.splitlines():
        if line.startswith("## ["):
            table = line[4:-1]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
            rows[f"{table}.{cells[0].strip('`')}"] = cells
    return rows


def test_the_page_is_current_in_both_directions() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    settings = {
        f"{table.name}.{field.name}"
        for table in msgspec.structs.fields(Config)
        for field in msgspec.structs.fields(table.type)
    }
    assert sorted(settings - set(page_rows(page))) == [], "a setting, not on the page"
    assert sorted(set(page_rows(page)) - settings) == [], "on the page, not a setting"
    assert page == config_page(), "run: python -m docs.generators.config_page --write docs/config.md"


def test_the_defaults_on_the_page_are_valid_toml_and_are_the_defaults() -> None:
    for name, cells in page_rows(config_page()).items():
        table, key = name.split(".")
        section = {field.name: field.type for field in msgspec.structs.fields(Config)}[table]
        assert tomllib.loads(f"value = {cells[3].strip('`')}")["value"] == getattr(section(), key), name


@pytest.mark.parametrize(
    ("name", "kind", "bounds"),
    [
        ("schedule.max_staleness", "integer", ">= 0, <= 1000"),
        ("run.seed", "integer", ">= 0, < 2147483648"),
        ("run.name", "string", "length >= 1"),
        ("optimizer.lr", "number", "> 0, <= 10"),
        ("run.max_minutes", "number", ">= 0, <= 1000000"),
        ("data.shuffle", "boolean", ""),
        ("schedule.straggler", '`"expire"`, `"late"`, `"wait"`', ""),
        ("sampling.stop_token_ids", "list of integer", "each >= 0"),
    ],
)
def test_types_and_bounds(name: str, kind: str, bounds: str) -> None:
    assert page_rows(config_page())[name][1:3] == [kind, bounds]


def test_a_bar_in_a_description_stays_inside_its_cell() -> None:
    meaning = page_rows(config_page())["objective.dual_clip"][4]
    assert meaning.endswith("c·\\|A\\|; 0: off.")


class Undescribed(Struct):
    value: int = 0


class Strange(Struct):
    value: Annotated[tuple[int, ...], Meta(description="d")] = ()


class NoDefault(Struct):
    value: Annotated[Literal["a"], Meta(description="d")]


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (Undescribed, r"t\.value has no description"),
        (Strange, r"t\.value is of a type this page cannot name: VarTupleType"),
        (NoDefault, r"t\.value has a default this page cannot write"),
    ],
)
def test_what_cannot_be_described_is_refused(section: type[Struct], complaint: str) -> None:
    (field,) = _fields(section)
    with pytest.raises(ValueError, match=complaint):
        _row("t", field)
