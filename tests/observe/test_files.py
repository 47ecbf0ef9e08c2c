"""Files written whole or not at all, and the sentence of a disk that refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_async.errors import DapoError
from dapo_async.observe.files import write_json, write_whole, writing


def test_a_refusal_is_one_sentence_that_names_what_was_written_and_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal = pytest.raises(DapoError, match=r"^run\.folder = here: cannot be written: Not a directory$")
    with refusal, writing("run.folder = here"):
        (tmp_path / "file" / "deeper").mkdir()
    with pytest.raises(DapoError, match=r"^x: cannot be written: no number$"), writing("x"):
        raise OSError("no number")


def test_what_is_no_refusal_passes() -> None:
    with pytest.raises(ValueError, match="ours"), writing("x"):
        raise ValueError("ours")


def test_the_new_file_takes_the_place_of_the_old_one_and_of_an_abandoned_part(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    (tmp_path / "x.json.part").write_text("left by a kill, and longer than what follows")
    write_json(path, {"a": [1, "\N{GREEK SMALL LETTER ETA}"]})
    assert json.loads(path.read_text()) == {"a": [1, "\N{GREEK SMALL LETTER ETA}"]}
    assert path.read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["x.json"]


def test_content_that_fails_half_way_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"half"
        raise ValueError("the other half")

    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ValueError, match="the other half"):
        write_whole(path, content())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((path.exists(), (tmp_path / "x.part").read_bytes())))
    write_whole(path, [b"all ", b"of it"])
    assert seen == [(False, b"all of it")]
    assert path.read_bytes() == b"all of it"


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "x.json"
    path.write_text("old")
    (tmp_path / "x.json.part").symlink_to("/dev/full")
    with pytest.raises(DapoError, match=r"x\.json: cannot be written: No space left on device"):
        write_json(path, {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]
