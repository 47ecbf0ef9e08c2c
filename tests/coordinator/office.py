"""``Handlers`` without a socket: what workers say goes in, what they are told is kept, and time is the test's."""

from typing import Any

import numpy as np

from dapo_async.config.toml import build_config
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.handlers import Handlers
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import Prompt
from dapo_async.schedule.schedule import Batch, Schedule
from dapo_async.transport.messages import (
    FROM_WORKER,
    Ack,
    Beat,
    Codec,
    Completion,
    Group,
    Hello,
    Lease,
    Message,
)

SETTINGS: dict[str, Any] = {
    "model": {"path": "unused"},
    "data": {"train": "unused", "max_prompt_tokens": 8},
    "sampling": {"group_size": 2, "max_tokens": 5},
    "schedule": {"groups_per_batch": 2, "max_staleness": 1},
}


class Prompts:
    """An endless stream of numbered prompts."""

    def __getitem__(self, n: int) -> Prompt:
        return Prompt(id=f"p{n}", ids=np.array([n % 50], dtype=np.int32), truth=str(n), text=f"prompt {n}")


class Office:
    """Handlers, and everything they say, in order. ``now`` is their clock."""

    def __init__(self, **schedule: Any) -> None:
        config = build_config(SETTINGS | {"schedule": SETTINGS["schedule"] | schedule}, "test")
        self.schedule = Schedule(config.schedule)
        self.now = 1000.0
        self._known: dict[int, Lease] = {}
        self.said: list[tuple[str, Message]] = []
        self.codec = Codec(FROM_WORKER)
        self.handlers = Handlers(
            config,
            self.schedule,
            Prompts(),  # type: ignore[arg-type]
            vocab_size=50,
            weights_address="tcp://127.0.0.1:1",
            incarnation=Incarnation("run", "0"),
            send=self._send,
            clock=lambda: self.now,
        )

    def _send(self, identity: bytes, message: Message) -> bool:
        self.said.append((identity.decode(), message))
        return True

    def hear(self, name: str, message: Message) -> None:
        """What the coordinator does with a message that came."""
        self.handlers.receive(name.encode(), [memoryview(bytes(f)) for f in self.codec.encode(message)])
        self.handlers.issue(self.now)

    def hear_raw(self, name: str, frames: list[bytes]) -> None:
        self.handlers.receive(name.encode(), [memoryview(frame) for frame in frames])
        self.handlers.issue(self.now)

    def join(self, name: str, capacity: int, version: int = 0) -> None:
        self.hear(name, Hello(worker=name, pid=1, host="here", engine="test", capacity=capacity, version=version))

    def beat(self, name: str, version: int) -> None:
        """It serves ``version`` now, and holds everything that it was ever given and has not answered."""
        worker = self.handlers.workers[name.encode()]
        self.hear(name, Beat(version=version, running=0, holding=[*worker.leases, *worker.given_up]))

    def group(self, lease: Lease, version: int = 0, correct: tuple[bool, ...] = (True, False)) -> Group:
        """A good answer to ``lease``."""
        count = lease.num_samples
        completions = [
            Completion(num_tokens=3, spans=[(version, 3)], finish="stop", correct=right) for right in correct[:count]
        ]
        return Group(
            lease=lease.lease,
            kind=lease.kind,
            incarnation=lease.incarnation,
            completions=completions,
            token_ids=np.arange(3 * count, dtype=np.int32),
            logprobs=np.full(3 * count, -1.0, dtype=np.float32),
        )

    def answer(self, name: str, lease: Lease, version: int = 0, correct: tuple[bool, ...] = (True, False)) -> Ack:
        """Send a group for ``lease``; the word on it."""
        self.hear(name, self.group(lease, version, correct))
        return next(message for _, message in reversed(self.said) if isinstance(message, Ack))

    def evaluate(self, num_prompts: int) -> None:
        """Begin a held-out evaluation of one completion a prompt."""
        settings = {"samples": 1, "max_tokens": 5, "temperature": 1.0, "top_p": 1.0, "min_version": 0}
        self.handlers.evaluate(EvaluationJob([Prompts()[n] for n in range(num_prompts)], **settings))
        self.handlers.issue(self.now)

    def train(self) -> None:
        """The learner draws a batch, trains and publishes."""
        assert isinstance(self.schedule.draw(), Batch)
        self.handlers.published(self.schedule.batch_trained())
        self.handlers.issue(self.now)

    def leases(self, name: str, kind: str = "eval") -> list[Lease]:
        """Those given to this worker since the last question, in order."""
        self._known |= {m.lease: m for _, m in self.said if isinstance(m, Lease) and m.kind == "train"}
        found = [m for to, m in self.said if to == name and isinstance(m, Lease) and m.kind == kind]
        self.said = [(to, m) for to, m in self.said if not any(m is lease for lease in found)]
        return found

    def given(self, name: str) -> list[Lease]:
        """The training leases that this worker holds, as it was told of them, the oldest first."""
        held = self.handlers.workers[name.encode()].holds("train")
        self._known |= {m.lease: m for to, m in self.said if to == name and isinstance(m, Lease) and m.kind == "train"}
        return [self._known[lease] for lease in held]

    def held(self, name: str) -> dict[str, int]:
        return dict(self.handlers.workers[name.encode()].num_held)
