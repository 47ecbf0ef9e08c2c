"""Held-out evaluation: one job while the workers answer it, and what its answers say about the policy.

The coordinator leases a job's prompts beside training prompts, under leases of their own; nothing of it enters the
schedule. Every token of a job is sampled with one version. Who gets leases when, and why that is bounded:

* a job is of the version that the first worker with new enough weights serves, and is given to workers of that
  version only. A worker keeps its weights as long as it holds a lease of the job, and gets the next one before its
  last answer is acknowledged; one that already waits for newer weights takes them first. Should nobody serve the
  version any more (a worker was lost), the job starts again under a newer one;
* training goes first: a job gets the places of a worker that training leaves empty, and one in ``SHARE`` besides, so
  that it ends even where generation is the bottleneck. What needs newer weights than the job's is not leased to its
  workers, so once training cannot go on without a swap, the rest of the job has all their places;
* a job that the learner waits for, at the start and the end of a run, goes before training.
"""

import itertools
from collections import deque
from collections.abc import Collection, Sequence

from dapo_async.config.settings import Config
from dapo_async.coordinator.groups import check_claims, lease_seed, version_range
from dapo_async.coordinator.workers import ConnectedWorker
from dapo_async.data.prompts import Prompt
from dapo_async.errors import ProtocolError
from dapo_async.rl.scores import Score, ScoredAnswer, score
from dapo_async.schedule.schedule import Schedule
from dapo_async.transport.messages import Group, Lease

SHARE = 8  # of a worker's places, one in so many is for evaluation even if training could use it
_serials = itertools.count()  # so that no two jobs, nor two starts of one, share a lease number


class EvaluationJob:
    """``samples`` completions for each of ``prompts``, all sampled with one version, ``min_version`` or newer.

    ``answered`` are places in ``prompts`` that need no answer any more; ``waited_for``: the learner does nothing else.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        min_version: int,
        waited_for: bool = False,
        answered: Collection[int] = (),
    ) -> None:
        self.prompts = prompts
        self.samples = samples
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.min_version = min_version
        self.waited_for = waited_for
        self.places = [place for place in range(len(prompts)) if place not in answered]
        self.version = -1  # whose tokens it is made of; -1: none yet
        self.groups: dict[int, Group] = {}  # by place
        self._begin(-1)

    def _begin(self, version: int) -> None:
        """Answer everything, with these weights: numbers and answers of an earlier start count no more."""
        self.version = version
        self.groups.clear()
        self._first = next(_serials) << 32
        self._unleased = deque(self.places)

    @property
    def done(self) -> bool:
        """Every prompt has been answered."""
        return len(self.groups) == len(self.places)

    @property
    def goes_first(self) -> bool:
        """It has leases to give before any are given for training."""
        return self.waited_for and bool(self._unleased)

    def pick(self, workers: Collection[ConnectedWorker], schedule: Schedule, group_size: int) -> ConnectedWorker | None:
        """Who gets the next lease now, the emptiest first; None if nobody has room or nothing is left to lease."""
        if not self._unleased:
            return None
        ready = [worker for worker in workers if self._is_ready(worker, schedule)]
        if ready and all(worker.version != self.version for worker in ready):
            self._begin(max(worker.version for worker in ready))
        room = [worker for worker in ready if worker.version == self.version and self._has_room(worker, group_size)]
        return min(room, key=lambda worker: worker.num_held["eval"] / worker.capacity, default=None)

    def _is_ready(self, worker: ConnectedWorker, schedule: Schedule) -> bool:
        """Whether evaluating with the weights it serves holds up nothing that it was leased before."""
        # A worker of a former life may serve a future that is gone: it comes back to what is published.
        if not worker.capacity or not self.min_version <= worker.version <= schedule.published:
            return False
        held = [] if worker.num_held["eval"] else [schedule.record(lease) for lease in worker.holds("train")]
        return all(record is None or record.min_version <= worker.version for record in held)

    def _has_room(self, worker: ConnectedWorker, group_size: int) -> bool:
        """In completions, which is what fills slots. One lease always has room: it keeps the version in service."""
        held = worker.num_held["eval"] * self.samples
        idle = (worker.capacity - worker.num_held["train"]) * group_size
        return not held or held + self.samples <= max(idle, worker.capacity * group_size // SHARE)

    def lease(self, incarnation: str, run_seed: int) -> Lease:
        """The next lease. Its seed is fixed by run and prompt: not by who answers when, and not by the job."""
        place = self._unleased.popleft()
        prompt = self.prompts[place]
        return Lease(
            lease=self._first + place,
            kind="eval",
            incarnation=incarnation,
            truth=prompt.truth,
            prompt_ids=prompt.ids,
            num_samples=self.samples,
            seed=lease_seed(run_seed + 2**32, place),
            min_version=self.version,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def wants(self, lease: int) -> bool:
        """Whether an answer to this lease is still missing."""
        place = lease - self._first
        return 0 <= place < len(self.prompts) and place not in self.groups

    def overtaken(self, worker: ConnectedWorker) -> list[int]:
        """Leases that this worker has dropped, or will: it took newer weights before they reached it."""
        if worker.version <= self.version:
            return []
        kept = set(worker.beat.holding)
        return [lease for lease in worker.holds("eval") if ("eval", lease) not in kept]

    def give_back(self, leases: Sequence[int]) -> None:
        """These prompts lost their worker."""
        places = [lease - self._first for lease in leases if self.wants(lease)]
        self._unleased.extend(place for place in places if place not in self._unleased)

    def accept(self, group: Group, vocab_size: int) -> None:
        """Keep an answer that is wanted. Raises ``ProtocolError`` as ``check_claims``, or ``version``."""
        check_claims(
            group,
            num_samples=self.samples,
            max_tokens=self.max_tokens,
            vocab_size=vocab_size,
            newest_version=self.version,
        )
        oldest = version_range(group)[0]
        if oldest != self.version:
            raise ProtocolError("version", f"an evaluation of version {self.version} got a token of version {oldest}")
        place = group.lease - self._first
        self.groups[place] = group
        if place in self._unleased:
            self._unleased.remove(place)


def make_job(
    config: Config,
    prompts: Sequence[Prompt],
    version: int,
    *,
    waited_for: bool = False,
    answered: Collection[int] = (),
) -> EvaluationJob:
    """An evaluation of the weights ``version`` or newer, as ``config.evaluation`` says."""
    settings = config.evaluation
    return EvaluationJob(
        prompts[: settings.max_prompts] if settings.max_prompts else prompts,
        samples=settings.samples,
        max_tokens=config.sampling.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        min_version=version,
        waited_for=waited_for,
        answered=answered,
    )


def scored_answers(group: Group) -> list[ScoredAnswer]:
    """What scores need of a group's completions."""
    return [
        ScoredAnswer(correct=c.correct, predicted=c.predicted, num_tokens=c.num_tokens, truncated=c.finish == "length")
        for c in group.completions
    ]


def scores_of(job: EvaluationJob, seed: int) -> dict[str, Score]:
    """All scores of a finished job, by the names of ``scores.score``."""
    return score([scored_answers(job.groups[place]) for place in sorted(job.groups)], seed=seed)


def summarise(job: EvaluationJob, seed: int = 0) -> dict[str, float]:
    """The heldout/ metrics of a finished job; k = ``job.samples``."""
    scores, k = scores_of(job, seed), job.samples
    accuracy = scores[f"avg@{k}"]
    values = {
        "heldout/accuracy": accuracy.value,
        "heldout/accuracy_low": accuracy.low,
        "heldout/accuracy_high": accuracy.high,
        "heldout/pass_at_k": scores[f"pass@{k}"].value,
        "heldout/samples": k,
        "heldout/prompts": len(job.groups),
        "heldout/length_mean": scores["length_mean"].value,
        "heldout/truncated_share": scores["truncated_share"].value,
        "heldout/version": job.version,
    }
    if f"maj@{k}" in scores:
        values["heldout/maj_at_k"] = scores[f"maj@{k}"].value
    return values
