"""Dynamic sampling: the reference vectors, by the rule itself and through the schedule, and groups of one kind."""

import json
from typing import Any

import pytest

from dapo_async.config import settings as config
from dapo_async.schedule.dynamic_sampling import filter_reason
from dapo_async.schedule.schedule import Schedule
from tests import ROOT

VECTORS: dict[str, Any] = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text())


@pytest.mark.parametrize("group", VECTORS["dynamic_sampling"]["groups"], ids=lambda group: group["uid"])
def test_the_vectors_are_kept_by_verdict_whatever_their_shaped_rewards(group: dict[str, Any]) -> None:
    correct = [bool(x) for x in group["acc"]]
    assert (filter_reason(correct) is None) is group["keep"]["acc"]
    schedule = Schedule(config.Schedule(groups_per_batch=1))
    lease = schedule.issue("w", 0, 0.0)
    assert lease is not None
    outcome = schedule.complete(lease.lease, 0, 10, correct, "group")
    assert outcome == (filter_reason(correct) or "accepted")
    assert schedule.buffered == group["keep"]["acc"]


def test_without_the_filter_every_group_is_kept() -> None:
    schedule = Schedule(config.Schedule(groups_per_batch=1, filter=False))
    assert schedule.issue("w", 0, 0.0) is not None
    assert schedule.complete(0, 0, 10, [False, False], "group") == "accepted"


def test_one_other_verdict_is_enough_and_a_group_of_one_is_never_mixed() -> None:
    assert filter_reason([False] * 15 + [True]) is None
    assert filter_reason([True] * 15 + [False]) is None
    assert filter_reason([True]) == "filtered_all_right"
    assert filter_reason([False]) == "filtered_all_wrong"


def test_a_group_without_verdicts_is_refused() -> None:
    with pytest.raises(ValueError, match="without verdicts"):
        filter_reason([])
