"""The file in which an evaluation keeps its answers as they come, so that it can go on after an interruption.

``FILE.answers.jsonl``: one line that says what is evaluated, then one line per answered prompt. A line torn by a kill
is dropped, and its prompt is answered again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dapo_async.errors import CheckpointError, DapoError
from dapo_async.observe.files import write_whole, writing
from dapo_async.rl.scores import ScoredAnswer


class AnsweredPrompt(Struct, frozen=True, kw_only=True):
    """One prompt with its k judged answers."""

    place: int  # of the prompt among all that are evaluated
    prompt_id: str
    answers: list[ScoredAnswer]


class AnswerFile:
    """See the module. A context manager."""

    def __init__(self, path: Path, subject: Mapping[str, Any], num_prompts: int, *, resume: bool) -> None:
        """Begin at ``path``, or go on with ``resume``. ``subject`` is what must not differ between the two.

        Raises ``CheckpointError`` where it does, where there is nothing to resume or something that would be lost, and
        ``DapoError`` if the file cannot be read or written.
        """
        self.path = path
        self.kept: dict[int, list[ScoredAnswer]] = {}
        self._num_prompts, self._samples = num_prompts, int(subject["k"])
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        except OSError as error:
            raise DapoError(f"{path}: cannot be read: {error.strerror or error}") from None
        whole = [line for line in lines if line.endswith(b"\n")]
        if resume:
            self._resume(whole, dict(subject))
        elif 1 < len(whole) <= num_prompts:
            raise CheckpointError(
                f"{path} holds {len(whole) - 1} answered prompts of an interrupted evaluation: go on with --resume, or "
                "remove that file"
            )
        head = msgspec.json.encode(subject) + b"\n"
        write_whole(path, whole if resume else [head])
        with writing(path):
            self._file = path.open("ab")

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, place: int, prompt_id: str, answers: list[ScoredAnswer]) -> None:
        """Keep one prompt's answers. Raises ``DapoError`` if the file cannot be written."""
        line = msgspec.json.encode(AnsweredPrompt(place=place, prompt_id=prompt_id, answers=answers)) + b"\n"
        with writing(self.path):
            self._file.write(line)
            self._file.flush()

    def _resume(self, lines: list[bytes], subject: dict[str, Any]) -> None:
        if not lines:
            raise CheckpointError(f"{self.path}: no evaluation to go on with; start it without --resume")
        try:
            begun = msgspec.json.decode(lines[0], type=dict[str, Any])
            found = [msgspec.json.decode(line, type=AnsweredPrompt) for line in lines[1:]]
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{self.path}: not a file of answers ({error}); remove it") from None
        for name, value in subject.items():
            if begun.get(name) != value:
                raise CheckpointError(
                    f"{self.path}: was begun with {name} = {begun.get(name)!r}, now it is {value!r}: go on with the "
                    "same, or choose another --out"
                )
        for one in found:
            if not 0 <= one.place < self._num_prompts or len(one.answers) != self._samples:
                raise CheckpointError(f"{self.path}: prompt {one.place} has no such place; remove the file")
            self.kept[one.place] = one.answers
