"""What a learner that waits for a batch tells, and when it has waited for enough filtered groups."""

from typing import Any

import pytest

from dapo_async.config import settings as config
from dapo_async.coordinator.progress import REPORT_EVERY_S, Arrivals, BatchWait
from dapo_async.errors import StallError
from dapo_async.observe.metric_writer import find_metric

TOTALS = {
    "groups": 158,
    "filtered_all_wrong": 140,
    "filtered_all_right": 18,
    "accepted_groups": 0,
    "completions": 1000,
    "truncated": 710,
    "verifier_errors": 3,
    "verifier_timeouts": 2,
    "trained": 7,  # other totals do not matter
}


def batch_wait(**settings: Any) -> BatchWait:
    return BatchWait(config.Schedule(**{"groups_per_batch": 4, "max_filtered_batches": 5, **settings}))


def test_the_report_says_what_came_since_the_last_batch() -> None:
    wait = batch_wait()
    wait.batch_drawn(TOTALS)
    wait.begin(1000.0)
    later = {name: 2 * count for name, count in TOTALS.items()}
    news = wait.report(later, 1000.0 + REPORT_EVERY_S)
    assert news is not None
    assert news.waited_s == REPORT_EVERY_S
    assert str(news.arrivals) == (
        "158 groups came, 140 all wrong, 18 all right, 0 kept; 71 % of answers were cut off at sampling.max_tokens, "
        "3 verifier errors, 2 verifier timeouts"
    )
    assert news.metrics() == {
        "waiting/seconds": REPORT_EVERY_S,
        "waiting/groups": 158,
        "waiting/all_wrong": 140,
        "waiting/all_right": 18,
        "waiting/kept": 0,
        "waiting/truncated_share": 0.71,
    }
    assert [find_metric(name).name for name in news.metrics()] == list(news.metrics())


def test_it_reports_at_a_regular_interval_of_each_wait() -> None:
    wait = batch_wait()
    wait.begin(0.0)
    times = [tick / 4 for tick in range(int(4 * (3 * REPORT_EVERY_S + 1)))]
    told = [news.waited_s for now in times if (news := wait.report({}, now))]
    assert told == [REPORT_EVERY_S, 2 * REPORT_EVERY_S, 3 * REPORT_EVERY_S]
    wait.begin(times[-1])
    assert wait.report({}, times[-1] + REPORT_EVERY_S - 1) is None, "another wait begins anew"


def test_nothing_came_is_said_too() -> None:
    assert str(Arrivals()) == "no group came"


def test_the_limit_is_on_groups_filtered_since_the_last_batch() -> None:
    wait = batch_wait()
    before = {"groups": 1000, "filtered_all_wrong": 900, "filtered_all_right": 50, "accepted_groups": 50}
    wait.batch_drawn(before)
    wait.check(before | {"groups": 1019, "filtered_all_wrong": 919})
    with pytest.raises(StallError) as caught:
        wait.check(
            before | {"groups": 1023, "filtered_all_wrong": 915, "filtered_all_right": 55, "accepted_groups": 53}
        )
    message = str(caught.value)
    assert "20 groups were filtered and no batch formed" in message
    assert "schedule.max_filtered_batches = 5" in message
    assert "23 groups came, 15 all wrong, 5 all right, 3 kept" in message
    for what in ("reward.verifier", "sampling.max_tokens", "answer format", "too hard or too easy"):
        assert what in message
    assert caught.value.exit_code == 1
    wait.batch_drawn(before | {"filtered_all_wrong": 920})
    wait.check(before | {"filtered_all_wrong": 939})


def test_zero_is_no_limit() -> None:
    batch_wait(max_filtered_batches=0).check({"filtered_all_wrong": 10**9})
