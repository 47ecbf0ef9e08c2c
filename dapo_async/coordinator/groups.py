"""Leases and the groups that answer them: what is asked for, the checks only the learner can do, and the tally.

``messages`` has already checked what the group says about itself.
"""

import logging
from collections import Counter, deque
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dapo_async.config.settings import Config
from dapo_async.data.prompts import Prompt
from dapo_async.errors import ProtocolError
from dapo_async.schedule.deadlines import LeaseRecord
from dapo_async.transport.messages import FROM_WORKER, PROTOCOL, Codec, Group, Lease

log = logging.getLogger(__name__)


class RolloutGroup(NamedTuple):
    """A complete group with its prompt: what the buffer holds and the learner trains."""

    lease: int
    position: int  # of the prompt in the stream
    prompt: Prompt
    group: Group
    worker: str

    @property
    def correct(self) -> list[bool]:
        """Verdict of each completion."""
        return [completion.correct for completion in self.group.completions]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, stop token included."""
        return [completion.num_tokens for completion in self.group.completions]

    @property
    def versions(self) -> tuple[int, int]:
        """Oldest and newest version among the tokens."""
        return version_range(self.group)


def version_range(group: Group) -> tuple[int, int]:
    """Oldest and newest version among the tokens of a group."""
    spans = [span for completion in group.completions for span in completion.spans]
    return min(version for version, _ in spans), max(version for version, _ in spans)


def check_claims(group: Group, *, num_samples: int, max_tokens: int, vocab_size: int, newest_version: int) -> None:
    """Check a group against the lease it answers and the learner's state.

    Raises ``ProtocolError``: ``wrong_count``, ``overlong``, ``tokens`` or ``future_version``.
    """
    if len(group.completions) != num_samples:
        raise ProtocolError("wrong_count", f"lease asks for {num_samples} completions, got {len(group.completions)}")
    longest = max(completion.num_tokens for completion in group.completions)
    if longest > max_tokens:
        raise ProtocolError("overlong", f"a completion has {longest} tokens, allowed are {max_tokens}")
    if int(group.token_ids.max()) >= vocab_size:
        raise ProtocolError(
            "tokens", f"token id {int(group.token_ids.max())} is outside the vocabulary of {vocab_size}"
        )
    newest = version_range(group)[1]
    if newest > newest_version:
        raise ProtocolError("future_version", f"tokens sampled with version {newest}, the newest is {newest_version}")


MAX_LENGTHS = 256  # groups


class GroupLengths(NamedTuple):
    """How long the completions of an arrived group are."""

    lease: int
    tokens: list[int]  # of each completion
    accepted: bool  # false: the filter dropped it


class Tally:
    """Counts every acceptable training group, filtered or not, into ``counts``."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        # Of each group, until the learner writes them down; a limit, because a huge batch need not be told in full.
        self._lengths: deque[GroupLengths] = deque(maxlen=MAX_LENGTHS)
        self._told: set[str] = set()  # kinds of failed verification that were logged

    def take_lengths(self) -> list[GroupLengths]:
        """Those of the groups that came since the last call."""
        lengths = list(self._lengths)
        self._lengths.clear()
        return lengths

    def tell_failures(self, group: Group, worker: str) -> None:
        """Log the first answer, of training or evaluation, that a verifier could not judge: the rest are counted."""
        failed = {c.verdict for c in group.completions} & {"error", "timeout"}
        for kind in sorted(failed - self._told):
            log.warning(
                "reward.verifier failed on an answer of worker %s (%s), which counts as wrong; that worker's log says "
                "why, and verifier/%ss counts how many",
                worker, kind, kind,
            )  # fmt: skip
        self._told |= failed

    def add(self, group: Group, outcome: str) -> None:
        """Count a group; ``outcome`` is the schedule's."""
        tokens = len(group.token_ids)
        self._lengths.append(
            GroupLengths(group.lease, [c.num_tokens for c in group.completions], outcome == "accepted")
        )
        self._counts.update(
            groups=1,
            completions=len(group.completions),
            tokens=tokens,
            correct=sum(c.correct for c in group.completions),
            truncated=sum(c.finish == "length" for c in group.completions),
            verifier_errors=sum(c.verdict == "error" for c in group.completions),
            verifier_timeouts=sum(c.verdict == "timeout" for c in group.completions),
            second_errors=sum(c.second == "error" for c in group.completions),
            second_timeouts=sum(c.second == "timeout" for c in group.completions),
        )
        # A failure of either verifier is no opinion, so it is no disagreement.
        compared = [c for c in group.completions if c.verdict == "ok" and c.second in ("right", "wrong")]
        self._counts.update(
            compared=len(compared),
            first_only=sum(c.correct and c.second == "wrong" for c in compared),
            second_only=sum(not c.correct and c.second == "right" for c in compared),
        )
        if outcome == "accepted":
            self._counts.update(accepted_groups=1, accepted_completions=len(group.completions), accepted_tokens=tokens)


class GroupStore:
    """Turns buffered groups into plain bytes for a checkpoint and back."""

    def __init__(self, prompts: Any) -> None:
        self._prompts = prompts
        self._codec = Codec(FROM_WORKER)

    def encode(self, rollout: RolloutGroup) -> dict[str, Any]:
        """Plain values that msgpack can hold."""
        frames = [bytes(frame) for frame in self._codec.encode(rollout.group)]
        return {"position": rollout.position, "worker": rollout.worker, "frames": frames}

    def decode(self, saved: dict[str, Any]) -> RolloutGroup:
        """The group again; its prompt is read from the stream by position."""
        head, *arrays = saved["frames"]
        group = self._codec.decode([_of_today(head), *arrays])
        return RolloutGroup(group.lease, saved["position"], self._prompts[saved["position"]], group, saved["worker"])


def _of_today(head: bytes) -> bytes:
    """The head of a group as the wire of today would have it; checkpoints of protocol 5 told how long it took."""
    fields = msgspec.msgpack.decode(head, type=dict[str, Any])
    if fields.get("protocol") == 5:
        fields["protocol"] = PROTOCOL
        fields.pop("seconds", None)
        return msgspec.msgpack.encode(fields)
    return head


def training_lease(config: Config, incarnation: str, prompt: Prompt, record: LeaseRecord) -> Lease:
    """What a worker is told of the lease in ``record``, which asks for ``prompt``."""
    return Lease(
        lease=record.lease,
        incarnation=incarnation,
        truth=prompt.truth,
        prompt_ids=prompt.ids,
        num_samples=config.sampling.group_size,
        seed=lease_seed(config.run.seed, record.lease),
        min_version=record.min_version,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
    )


def lease_seed(run_seed: int, lease: int) -> int:
    """Sampling seed of a lease: fixed by the run's seed and the lease number alone."""
    return int(np.random.SeedSequence([run_seed, lease]).generate_state(1, np.uint64)[0] >> np.uint64(1))
