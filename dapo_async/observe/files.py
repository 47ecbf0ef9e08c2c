"""Writing files: whole or not at all, and one sentence where the disk refuses."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dapo_async.errors import DapoError


@contextlib.contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Around whatever writes ``what``: an ``OSError`` becomes a ``DapoError`` that names it and the reason."""
    try:
        yield
    except OSError as error:
        raise DapoError(f"{what}: cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, content: Iterable[bytes]) -> None:
    """Write ``content`` so that whatever happens, a power cut too, ``path`` is complete or what it was before.

    Raises ``DapoError`` if the disk refuses, and what ``content`` raises.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            with part.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Raises ``DapoError`` if the disk refuses."""
    write_whole(path, [json.dumps(value, indent=2).encode(), b"\n"])
