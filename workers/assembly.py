"""Completions come back one by one; groups leave whole, and are kept until the learner has acknowledged them."""

import time
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np

from dapo_async.transport.messages import Completion, Group, Key, Lease
from dapo_async.verify.verifier import Verdict
from workers.engine import CompletionOutput, Request


class OpenGroup(NamedTuple):
    """A lease being answered."""

    lease: Lease
    finished: dict[int, CompletionOutput]
    verdicts: dict[int, Verdict]


def key_of(message: Lease | Group) -> Key:
    """What a lease and its group are filed under."""
    return message.kind, message.lease


def training(keys: Iterable[Key]) -> list[int]:
    """Numbers of the training leases among ``keys``, rising."""
    return sorted(number for kind, number in keys if kind == "train")


def request_of(lease: Lease) -> Request:
    """What a lease asks of the engine."""
    return Request(
        key=key_of(lease),
        prompt_ids=lease.prompt_ids,
        num_samples=lease.num_samples,
        seed=lease.seed,
        max_tokens=lease.max_tokens,
        temperature=lease.temperature,
        top_p=lease.top_p,
    )


class Assembly:
    """Leases that wait for the engine, open groups, and the outbox of complete ones not acknowledged yet."""

    def __init__(self) -> None:
        self.waiting: dict[Key, Lease] = {}
        self.open: dict[Key, OpenGroup] = {}
        self.outbox: dict[Key, Group] = {}
        self._sent: dict[Key, float] = {}  # when each group of the outbox was sent last, in monotonic seconds

    @property
    def holding(self) -> list[Key]:
        """All leases this worker answers for."""
        return [*self.unanswered, *self.outbox]

    @property
    def unanswered(self) -> list[Key]:
        """Leases whose group is not complete."""
        return [*self.open, *self.waiting]

    def evaluates(self, version: int) -> bool:
        """Whether it holds evaluation leases of these weights, the ones in service; the next must wait for them."""
        return any(kind == "eval" for kind, _ in (*self.open, *self.outbox)) or any(
            lease.kind == "eval" and lease.min_version == version for lease in self.waiting.values()
        )

    def hold(self, lease: Lease) -> None:
        """A lease has come; one that is being answered already is not taken twice."""
        if key_of(lease) not in self.open:
            self.waiting.setdefault(key_of(lease), lease)

    def startable(self, version: int) -> list[Lease]:
        """Waiting leases that these weights may answer, in order of arrival.

        Drops evaluation leases of older weights, which nothing can answer any more: the learner learns that from the
        next heartbeat and gives them to somebody else.
        """
        found = [lease for lease in self.waiting.values() if lease.min_version <= version]
        overtaken = [lease for lease in found if lease.kind == "eval" and lease.min_version < version]
        for lease in overtaken:
            self.drop(key_of(lease))
        return [lease for lease in found if key_of(lease) in self.waiting]

    def start(self, lease: Lease) -> None:
        """The engine has accepted this lease."""
        del self.waiting[key_of(lease)]
        self.open[key_of(lease)] = OpenGroup(lease, {}, {})

    def finish(self, completion: CompletionOutput) -> str | None:
        """A completion has ended. Returns the truth to judge it by, or None if nobody waits for it any more."""
        group = self.open.get(completion.key)  # type: ignore[call-overload]
        if group is None:
            return None
        group.finished[completion.index] = completion
        return group.lease.truth

    def judge(self, place: Hashable, verdict: Verdict) -> Group | None:
        """The completion at ``place``, its (key, index), has its verdict.

        Returns the group if it is now complete, and files it in the outbox.
        """
        assert isinstance(place, tuple), place  # as submitted
        key, index = place
        open_group = self.open.get(key)
        if open_group is None or index not in open_group.finished:
            return None  # a verdict for a former life of this lease
        open_group.verdicts[index] = verdict
        if len(open_group.verdicts) < open_group.lease.num_samples:
            return None
        del self.open[key]
        group = self.outbox[key] = _close(open_group)
        self._sent[key] = time.monotonic()
        return group

    def acknowledge(self, key: Key) -> None:
        """The learner has this group."""
        self.outbox.pop(key, None)
        self._sent.pop(key, None)

    def overdue(self, patience_s: float) -> list[Group]:
        """Groups sent longer than ``patience_s`` ago and not acknowledged; their clocks start again."""
        now = time.monotonic()
        late = [key for key, sent in self._sent.items() if now - sent > patience_s]
        self._sent.update(dict.fromkeys(late, now))
        return [self.outbox[key] for key in late]

    def drop(self, key: Key, keep_outbox: bool = False) -> None:
        """Nobody waits for this lease any more; ``keep_outbox`` spares it if it is complete."""
        self.waiting.pop(key, None)
        self.open.pop(key, None)
        if not keep_outbox:
            self.acknowledge(key)


def _close(open_group: OpenGroup) -> Group:
    lease = open_group.lease
    ordered = [(open_group.finished[i], open_group.verdicts[i]) for i in range(lease.num_samples)]
    completions = [
        Completion(
            num_tokens=len(done.token_ids),
            spans=done.spans,
            finish=done.finish,
            correct=verdict.correct,
            verdict=verdict.status,
            predicted=verdict.predicted[:500],
            second=verdict.second,
        )
        for done, verdict in ordered
    ]
    return Group(
        lease=lease.lease,
        kind=lease.kind,
        incarnation=lease.incarnation,
        completions=completions,
        token_ids=np.concatenate([done.token_ids for done, _ in ordered]),
        logprobs=np.concatenate([done.logprobs for done, _ in ordered]),
    )
