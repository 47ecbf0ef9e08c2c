"""What the hub asks for in a lease and makes of an arriving group: the checks only the learner can do, and the tally.

``protocol`` has already checked what the group says about itself.
"""

import logging
from collections import Counter, deque
from typing import Any, NamedTuple

import numpy as np

from dapo_async.config.settings import Config
from dapo_async.data.prompts import Prompt
from dapo_async.errors import ProtocolError
from dapo_async.transport.messages import FROM_WORKER, Codec, Group, Lease

log = logging.getLogger(__name__)


class Answer(NamedTuple):
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


class Tally:
    """Running totals over every acceptable training group, filtered or not; they survive a resume."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        # Of each group, until the learner writes them down; a limit, because a huge batch need not be told in full.
        self.lengths: deque[tuple[int, list[int], bool]] = deque(maxlen=MAX_LENGTHS)
        self._told: set[str] = set()  # kinds of failed verification that were logged

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
        self.lengths.append((group.lease, [c.num_tokens for c in group.completions], outcome == "accepted"))
        self.totals.update(
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
        self.totals.update(
            compared=len(compared),
            first_only=sum(c.correct and c.second == "wrong" for c in compared),
            second_only=sum(not c.correct and c.second == "right" for c in compared),
        )
        if outcome == "accepted":
            self.totals.update(accepted_groups=1, accepted_completions=len(group.completions), accepted_tokens=tokens)


class AnswerStore:
    """Turns buffered answers into plain bytes for a checkpoint and back."""

    def __init__(self, prompts: Any) -> None:
        self._prompts = prompts
        self._codec = Codec(FROM_WORKER)

    def encode(self, answer: Answer) -> dict[str, Any]:
        """Plain values that msgpack can hold."""
        frames = [bytes(frame) for frame in self._codec.encode(answer.group)]
        return {"position": answer.position, "worker": answer.worker, "frames": frames}

    def decode(self, saved: dict[str, Any]) -> Answer:
        """The answer again; its prompt is read from the stream by position."""
        group = self._codec.decode(saved["frames"])
        return Answer(group.lease, saved["position"], self._prompts[saved["position"]], group, saved["worker"])


def training_lease(config: Config, incarnation: str, prompt: Prompt, number: int, oldest: int) -> Lease:
    """The lease of this number, whose answer may hold tokens of version ``oldest`` or newer."""
    return Lease(
        number=number,
        incarnation=incarnation,
        prompt_id=prompt.id,
        truth=prompt.truth,
        prompt_ids=prompt.ids,
        num_samples=config.sampling.group_size,
        seed=lease_seed(config.run.seed, number),
        min_version=oldest,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
    )


def lease_seed(run_seed: int, number: int) -> int:
    """Sampling seed of a lease: fixed by the run's seed and the lease number alone."""
    return int(np.random.SeedSequence([run_seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
