"""Held-out evaluation: one job while the workers answer it, and what its answers say about the policy.

The hub leases a job's prompts like training prompts, under their own numbers; nothing of it enters the schedule.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from dapo_async.config import Config
from dapo_async.intake import lease_seed, version_range
from dapo_async.prompts import Prompt
from dapo_async.protocol import Group, Lease


class EvaluationJob:
    """``samples`` completions for each of ``prompts``, sampled with weights ``min_version`` or newer."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        min_version: int,
    ) -> None:
        self.prompts = prompts
        self.samples = samples
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.min_version = min_version
        self.first = 0  # number of its first lease, set by ``number_from``
        self.groups: dict[int, Group] = {}
        self._open = deque(range(len(prompts)))

    def number_from(self, first: int) -> None:
        """Its leases are numbered from here, so that a late answer to another job is never taken for one of this."""
        assert not self.groups
        self.first = first
        self._open = deque(range(first, first + len(self.prompts)))

    @property
    def done(self) -> bool:
        """Every prompt has been answered."""
        return len(self.groups) == len(self.prompts)

    def next_lease(self) -> int | None:
        """Number of the next prompt nobody works on."""
        return self._open.popleft() if self._open else None

    def lease(self, number: int, incarnation: str, run_seed: int) -> Lease:
        """The lease of this number; its seeds differ from those of every training lease, and not between jobs."""
        place = number - self.first
        prompt = self.prompts[place]
        return Lease(
            number=number,
            kind="eval",
            incarnation=incarnation,
            prompt_id=prompt.id,
            truth=prompt.truth,
            prompt_ids=prompt.ids,
            num_samples=self.samples,
            seed=lease_seed(run_seed + 2**32, place),
            min_version=self.min_version,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def wants(self, number: int) -> bool:
        """Whether an answer to this prompt is still missing."""
        return 0 <= number - self.first < len(self.prompts) and number not in self.groups

    def give_back(self, numbers: Sequence[int]) -> None:
        """These prompts lost their worker."""
        self._open.extend(n for n in numbers if self.wants(n) and n not in self._open)

    def add(self, group: Group) -> None:
        """Keep an answer."""
        self.groups[group.lease] = group
        if group.lease in self._open:
            self._open.remove(group.lease)

    @property
    def versions(self) -> tuple[int, int]:
        """Oldest and newest version among all tokens."""
        ranges = [version_range(group) for group in self.groups.values()]
        return min(low for low, _ in ranges), max(high for _, high in ranges)


def make_job(config: Config, prompts: Sequence[Prompt], version: int) -> EvaluationJob:
    """An evaluation of the weights ``version`` or newer, as ``config.evaluation`` says."""
    settings = config.evaluation
    return EvaluationJob(
        prompts[: settings.max_prompts] if settings.max_prompts else prompts,
        samples=settings.samples,
        max_tokens=config.sampling.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        min_version=version,
    )


def summarise(job: EvaluationJob) -> dict[str, float]:
    """The heldout/ metrics of a finished job: avg@k and pass@k with k = ``job.samples``, lengths, versions."""
    correct = np.array([[c.correct for c in group.completions] for group in job.groups.values()])
    completions = [c for group in job.groups.values() for c in group.completions]
    oldest, newest = job.versions
    return {
        "heldout/accuracy": float(correct.mean()),
        "heldout/pass_at_k": float(correct.any(axis=1).mean()),
        "heldout/samples": job.samples,
        "heldout/prompts": len(job.prompts),
        "heldout/length_mean": float(np.mean([c.num_tokens for c in completions])),
        "heldout/truncated_share": float(np.mean([c.finish == "length" for c in completions])),
        "heldout/version_min": oldest,
        "heldout/version_max": newest,
    }
