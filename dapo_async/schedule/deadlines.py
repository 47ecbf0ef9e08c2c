"""Which outstanding leases a batch must hold, so that everything left behind can still be trained in time.

Pure functions over deadlines, for ``schedule``. Version v trains now, v + 1 with the next batch, and so on, B groups
each: what is due by version v + k must fit into the k + 1 batches until then. The batch drawn now must therefore hold
all of it but k * B.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dapo_async.config.settings import Schedule as ScheduleConfig
from dapo_async.errors import CheckpointError


class LeaseRecord(NamedTuple):
    """A lease nobody has answered yet."""

    lease: int
    position: int  # of its prompt in the prompt stream
    min_version: int  # no token of its answer may be sampled with an older version
    worker: str | None  # None: waits to be issued again
    issued_at: float
    contested: bool = False  # a worker that held it before may still answer it


class Due(NamedTuple):
    """An outstanding lease: sorts by deadline, then by lease."""

    deadline: int  # last version at which it may be trained
    lease: int
    complete: bool


class Need(NamedTuple):
    """What one version ahead asks of the batch drawn now."""

    num_groups: int  # so many of the leases due by then must be in it (negative: none)
    dues: list[Due]  # earliest deadline first


def surplus_of(dues: Sequence[Due], version: int, bound: int, batch_size: int) -> set[int]:
    """Leases that cannot all be trained in time: the youngest of what is due by each version ahead."""
    surplus: set[int] = set()
    for ahead in range(bound + 1):
        due = sorted(d.lease for d in dues if d.deadline <= version + ahead and d.lease not in surplus)
        surplus.update(due[(ahead + 1) * batch_size :])
    return surplus


def needs_of(dues: Sequence[Due], version: int, bound: int, batch_size: int) -> list[Need]:
    """The need of each of the versions ``version`` to ``version + bound``. ``dues`` are sorted."""
    needs = []
    for ahead in range(bound + 1):
        due = dues[: bisect_right(dues, version + ahead, key=lambda d: d.deadline)]
        needs.append(Need(min(len(due) - ahead * batch_size, batch_size), list(due)))
    return needs


def missing_of(needs: Iterable[Need]) -> list[int]:
    """Leases not yet complete without which the needs cannot be met."""
    missing: list[int] = []
    for need in needs:
        complete = sum(due.complete for due in need.dues)
        open_ones = [due.lease for due in need.dues if not due.complete and due.lease not in missing]
        missing += open_ones[: max(0, need.num_groups - complete - len(missing))]
    return missing


def is_short(running: Counter[int], complete: Counter[int], due_now: int, batch_size: int) -> bool:
    """Whether ``missing_of`` would name anybody, from how many running and complete leases have which oldest version.

    ``due_now`` is the oldest version whose leases are due in the batch drawn now.
    """
    due = have = 0
    for oldest in sorted({*running, *complete}):
        due += running[oldest] + complete[oldest]
        have += complete[oldest]
        places_later = max(0, oldest - due_now) * batch_size
        if min(due - places_later, batch_size) > have:
            return True
    return False


def choose(needs: Iterable[Need], by_priority: Sequence[int], batch_size: int) -> list[int]:
    """Up to B complete leases: as many of each deadline as must be, the rest by priority."""
    chosen: dict[int, None] = {}
    for need in needs:
        due = {d.lease for d in need.dues}
        places = max(0, need.num_groups - sum(lease in due for lease in chosen))
        candidates = [n for n in by_priority if n in due and n not in chosen]
        chosen.update(dict.fromkeys(candidates[:places]))
    chosen.update(dict.fromkeys(by_priority))
    return list(chosen)[:batch_size]


def check_room(state: dict[str, Any], settings: ScheduleConfig) -> None:
    """Raise ``CheckpointError`` if the groups of a schedule's ``state`` are too many or too old for ``settings``.

    Then the checkpoint was written under wider ones.
    """
    capacity = capacity_of(settings)
    outstanding = len(state["buffered"]) + len(state["in_flight"])
    oldest = [version for _, version, *_ in state["buffered"]] + [version for *_, version in state["in_flight"]]
    staleness = state["version"] - min(oldest, default=state["version"])
    if outstanding > capacity or (settings.straggler == "wait" and staleness > settings.max_staleness):
        raise CheckpointError(
            f"the checkpoint holds {outstanding} groups, complete or leased, up to {staleness} versions old; "
            f"schedule.max_staleness = {settings.max_staleness}, groups_per_batch = {settings.groups_per_batch} and "
            f"oversample = {settings.oversample:g} leave places for {capacity}: resume with the settings of the run"
        )


def capacity_of(settings: ScheduleConfig) -> int:
    """Groups that may be outstanding at one time."""
    return int(settings.oversample * (settings.max_staleness + 1) * settings.groups_per_batch)
