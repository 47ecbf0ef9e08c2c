"""Files of one JSON line per record that a resumed run continues, and the records kept that way.

Owns the lines of ``samples.jsonl``, ``ledger.jsonl`` and ``lengths.jsonl`` and how all ``.jsonl`` files resume; what a
line of ``metrics.jsonl`` holds is ``metrics``' business. Not thread-safe: one thread per file.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dapo_async.errors import CheckpointError, ConfigError
from dapo_async.observe.files import write_whole, writing

NO_STEP = -1  # before every step: resuming there keeps nothing


class JsonLines:
    """An append-only file of JSON objects, each with the ``step`` it belongs to.

    Every line is flushed, so a killed process leaves at most its last line torn. NaN and infinities become ``null``.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        """Open ``path`` for a new run, or to go on after ``resume_step``: later lines are dropped, atomically.

        Raises ``ConfigError`` if a new run would write into the lines of another one, ``CheckpointError`` if a line
        cannot be read, and ``DapoError`` if the file cannot be written.
        """
        self.path = Path(path)
        self.last: dict[str, Any] = {}  # the newest line kept by a resume, empty if none
        self.num_dropped = 0  # lines that a resume dropped
        self._encoder = msgspec.json.Encoder()
        with writing(self.path):
            if resume_step is None:
                self._refuse_other_run()
            elif self.path.exists():
                write_whole(self.path, self._lines_until(resume_step))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")

    def write(self, record: Struct | dict[str, Any]) -> None:
        """Append one record; it must have a ``step``. Raises ``DapoError`` if the file cannot be written."""
        line = self._encoder.encode(record) + b"\n"
        with writing(self.path):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Have the disk hold all that was written. Raises ``DapoError`` if it refuses."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        with writing(self.path):
            self._file.close()

    def _refuse_other_run(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            raise ConfigError(f"{self.path} holds another run: continue it with --resume, or choose another run.name")

    def _lines_until(self, resume_step: int) -> Iterator[bytes]:
        for record in whole_lines(self.path):
            if record["step"] <= resume_step:
                self.last = record
                yield self._encoder.encode(record) + b"\n"
            else:
                self.num_dropped += 1


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, but for a last line that a kill has torn.

    Raises ``CheckpointError`` for a line that is no record, ``OSError`` if the file cannot be read.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill: only the last line can be
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}, line {number}: not a JSON object ({error}); repair it") from None
            if type(record.get("step")) is not int:
                raise CheckpointError(f'{path}, line {number}: has no whole number "step"; repair it')
            yield record


class Sample(Struct, kw_only=True):
    """A line of ``samples.jsonl``: one trained completion, readable."""

    step: int
    lease: int
    worker: str
    prompt: str
    answer: str
    truth: str
    predicted: str  # the answer the verifier saw
    correct: bool
    reward: float  # shaped: verdict plus overlong punishment
    advantage: float
    num_tokens: int  # of the answer, stop token included
    spans: list[tuple[int, int]]  # (version, num_tokens) in order
    finish: Literal["stop", "length"]
    second: str = ""  # what reward.compare_with says of it; empty without

    def __post_init__(self) -> None:
        # A lone surrogate (half a character, from JSON escapes) has no UTF-8 and must not end the run here.
        for name in ("prompt", "answer", "truth", "predicted"):
            setattr(self, name, getattr(self, name).encode("utf-8", "replace").decode("utf-8"))

    def markdown(self) -> str:
        """The sample as TensorBoard text. Prompt and answer are code blocks: their own markup is shown, not applied."""
        versions = ", ".join(f"{tokens} of version {version}" for version, tokens in self.spans)
        return (
            f"**{'right' if self.correct else 'wrong'}**, predicted `{self.predicted}`, truth `{self.truth}`, "
            f"reward {self.reward:.3f}, advantage {self.advantage:+.3f}, lease {self.lease}\n\n"
            f"{_code_block(self.prompt)}\n\n---\n\n{_code_block(self.answer)}\n\n"
            f"{self.num_tokens} tokens ({versions}), ended by {self.finish}"
        )


class TrainedBatch(Struct, kw_only=True):
    """A line of ``ledger.jsonl``: the groups of one batch, the run's own proof that each was trained at most once."""

    step: int
    leases: list[int]
    prompt_ids: list[str]  # in the order of leases


class Lengths(Struct, kw_only=True):
    """A line of ``lengths.jsonl``: how long the answers were that arrived since the batch before.

    If they were many, only the newest groups.
    """

    step: int
    leases: list[int]  # of each group, in order of arrival
    groups: list[list[int]]  # tokens of each completion, of each group
    accepted: list[bool]  # of each group; false: the filter dropped it


def _code_block(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines() or [""])
