"""What comes while the learner waits for a batch: told now and then, and the limit on groups that are filtered.

A run whose groups are all filtered is busy and never stalls, so it has to say what it gets, and to end by itself. Pure
bookkeeping over counts; time is an argument.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dapo_async.config.settings import Schedule
from dapo_async.errors import StallError

REPORT_EVERY_S = 60.0


class Arrivals(NamedTuple):
    """What came since the last batch was drawn, or since this process began. Named as the coordinator's counts are."""

    groups: int = 0
    filtered_all_wrong: int = 0
    filtered_all_right: int = 0
    accepted_groups: int = 0
    completions: int = 0
    truncated: int = 0
    verifier_errors: int = 0
    verifier_timeouts: int = 0

    @property
    def filtered(self) -> int:
        """Groups that were all right or all wrong."""
        return self.filtered_all_wrong + self.filtered_all_right

    @property
    def truncated_share(self) -> float:
        """Share of the answers that ended at the length limit; 0 if there were none."""
        return self.truncated / self.completions if self.completions else 0.0

    def __str__(self) -> str:
        if not self.groups:
            return "no group came"
        return (
            f"{self.groups} groups came, {self.filtered_all_wrong} all wrong, {self.filtered_all_right} all right, "
            f"{self.accepted_groups} kept; {100 * self.truncated_share:.0f} % of answers were cut off at "
            f"sampling.max_tokens, {self.verifier_errors} verifier errors, {self.verifier_timeouts} verifier timeouts"
        )


class WaitReport(NamedTuple):
    """One report from a wait."""

    waited_s: float
    arrivals: Arrivals

    def metrics(self) -> dict[str, float]:
        """The same as declared metrics."""
        return {
            "waiting/seconds": self.waited_s,
            "waiting/groups": self.arrivals.groups,
            "waiting/all_wrong": self.arrivals.filtered_all_wrong,
            "waiting/all_right": self.arrivals.filtered_all_right,
            "waiting/kept": self.arrivals.accepted_groups,
            "waiting/truncated_share": self.arrivals.truncated_share,
        }


class BatchWait:
    """Counts from batch to batch. All ``counts`` are of the whole run."""

    def __init__(self, settings: Schedule) -> None:
        self._settings = settings
        self._before = Arrivals()
        self._began = self._told = 0.0

    def batch_drawn(self, counts: Mapping[str, int]) -> None:
        """A batch was drawn, or a resumed run begins: counts start here."""
        self._before = _of(counts)

    def begin(self, now: float) -> None:
        """The learner begins to wait."""
        self._began = self._told = now

    def arrivals(self, counts: Mapping[str, int]) -> Arrivals:
        """What came since the last batch."""
        return Arrivals(*(new - old for new, old in zip(_of(counts), self._before, strict=True)))

    def report(self, counts: Mapping[str, int], now: float) -> WaitReport | None:
        """What to tell now: something once in ``REPORT_EVERY_S`` of one wait."""
        if now - self._told < REPORT_EVERY_S:
            return None
        self._told = now
        return WaitReport(now - self._began, self.arrivals(counts))

    def check(self, counts: Mapping[str, int]) -> None:
        """Raise ``StallError`` if ``schedule.max_filtered_batches`` have been filtered and no batch formed."""
        limit, came = self._settings.max_filtered_batches, self.arrivals(counts)
        if limit and came.filtered >= limit * self._settings.groups_per_batch:
            raise StallError(
                f"{came.filtered} groups were filtered and no batch formed, as many as schedule.max_filtered_batches = "
                f"{limit} allows ({limit} batches of {self._settings.groups_per_batch}): {came}. Check reward.verifier "
                "(does it find right answers right?), sampling.max_tokens (are answers cut off?), the answer format "
                "that the prompts ask for, and whether the task is far too hard or too easy for this model"
            )


def _of(counts: Mapping[str, int]) -> Arrivals:
    return Arrivals(*(counts.get(name, 0) for name in Arrivals._fields))
