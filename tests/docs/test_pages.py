"""README and the pages of docs/ are true where a machine can tell: links, commands, names of settings.

The log of measurements is left out of the latter two: it names commands and settings as they were on its days.
"""

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from benchmarks.__main__ import benchmarks
from dapo_async.cli import _parser
from dapo_async.config.settings import Config, Objective
from dapo_async.observe.metrics import METRICS
from tests import ROOT

README_LINES = 120
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESENT = [path for path in PAGES if path.name != "log.md"]
GENERATED = {"benchmarks.md", "config.md", "metrics.md"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCE = re.compile(r'\b(?:src|srcset)="([^"]+)"')
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

SETTINGS = {
    table.name: {field.name for field in msgspec.structs.fields(table.type)} for table in msgspec.structs.fields(Config)
}
SETTING = re.compile(rf"(?<![\w.])({'|'.join(SETTINGS)})\.([a-z]\w*)")
FILES = {"json", "jsonl", "md", "py", "toml"}  # run.toml is a file
NO_SETTINGS = {
    "a.b": "stands for any setting",
    "learner.public": "a file of keys",
}
THEIRS = "coming_from.md"  # the first column of its tables names settings of other programs


class Quoted(NamedTuple):
    """Something that a page says."""

    page: Path
    text: str


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def without_their_names(page: Path, text: str) -> str:
    if page.name != THEIRS:
        return text
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def commands() -> Iterator[Quoted]:
    """Every command line of ours, placeholders and all; optional parts without their brackets."""
    for page in PRESENT:
        text = page.read_text(encoding="utf-8")
        blocks = [block for _, block in FENCE.findall(text)]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in lines:
            if found := re.search(r"(?:^|\s)dapo-async (.*)", line):
                said = re.split(r" {3,}(?=[a-z])|\s#|\s&$", found[1])[0]
                yield Quoted(page, " ".join(re.sub(r" \| |[\[\]]", " ", said).split()))
        for code in INLINE.findall(prose(page)):
            said = " ".join(code.split())
            if said.startswith("dapo-async ") and " " in said.removeprefix("dapo-async "):
                yield Quoted(page, said.removeprefix("dapo-async "))


def named_settings() -> Iterator[Quoted]:
    """Every ``table.key`` in backticks or in a command of a page, and every key of its TOML."""
    for page in PRESENT:
        for code in INLINE.findall(without_their_names(page, prose(page))):
            yield from (Quoted(page, f"{table}.{key}") for table, key in SETTING.findall(code))
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            yield from (Quoted(page, name) for name in re.findall(r"--set ([a-z]\w*\.\w+)=", block))
            if language == "toml":
                tables = tomllib.loads(block)
                yield from (Quoted(page, f"{table}.{key}") for table, keys in tables.items() for key in keys)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    links = [link for link in [*LINK.findall(text), *SOURCE.findall(text)] if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}: no such heading"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index]
    assert not missing


@pytest.mark.parametrize("page", [path for path in PRESENT[1:] if path.name not in GENERATED], ids=name_of)
def test_a_page_starts_with_its_command(page: Path) -> None:
    assert re.match(r"# [^\n]+\n\n```\n", page.read_text(encoding="utf-8")), "title, then the command it is about"


@pytest.mark.parametrize("command", sorted(set(commands())), ids=lambda command: command.text)
def test_commands_are_understood(command: Quoted, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in shlex.split(command.text) if word != "..."]
    try:
        _parser().parse_args(words)
        code: str | int | None = 0
    except SystemExit as end:  # --help, or what argparse does not understand
        code = end.code
    assert code == 0, f"{name_of(command.page)}: dapo-async {command.text}\n{capsys.readouterr().err}"
    assert all((ROOT / word).is_file() for word in words if word.startswith("configs/"))
    if words[0] == "bench":
        assert {name.replace("-", "_") for name in words[1:2]} <= {*benchmarks(), "NAME"}


def test_settings_exist() -> None:
    wrong = []
    for page, name in sorted(set(named_settings())):
        table, _, key = name.partition(".")
        if name not in NO_SETTINGS and key not in FILES and key not in SETTINGS.get(table, set()):
            wrong.append(f"{name_of(page)}: {name}")
    assert not wrong


def test_every_objective_of_the_page_can_be_set() -> None:
    rows = re.findall(r"^\|.*= .*\|$", (ROOT / "docs/objectives.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        pairs = re.findall(r"`(\w+ = [^`]+)`", row)
        assert pairs, row
        msgspec.convert(tomllib.loads("\n".join(pairs)), Objective)


def test_metrics_exist() -> None:
    """Names such as ``heldout/accuracy``; ``*`` at the end stands for some of a group."""
    declared = set(METRICS)
    groups = {name.partition("/")[0] for name in declared}
    pattern = re.compile(rf"^({'|'.join(groups)})/[a-z_0-9]+\*?$")
    for page in PRESENT:
        for code in INLINE.findall(prose(page)):
            if pattern.match(code):
                stem = code.rstrip("*")
                known = any(name == code or (code != stem and name.startswith(stem)) for name in declared)
                assert known, f"{name_of(page)}: {code}"
