"""Cores are shared without anybody getting more than there are, and who asks for more is told."""

from pathlib import Path

import pytest

from dapo_async.system.cores import crowding, num_cores, share_cores
from tests.learner.test_update import settings


def shared(cores: int, *, learner: int, workers: int, count: int = 1, staleness: int = 2) -> tuple[int, int]:
    config = settings(
        learner={"threads": learner, "microbatch_tokens": 64},
        workers={"threads": workers, "count": count},
        schedule={"groups_per_batch": 4, "max_staleness": staleness},
    )
    found = share_cores(config, cores)
    assert share_cores(found, cores) == found
    return found.learner.threads, found.workers.threads


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("given", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_share_never_wants_more_than_there_is(cores: int, count: int, staleness: int, given: tuple[int, int]) -> None:
    """Unless there are more processes than cores, where each still needs one thread."""
    learner, workers = shared(cores, learner=given[0], workers=given[1], count=count, staleness=staleness)
    assert min(learner, workers) >= 1
    at_once = max(learner, count * workers) if staleness == 0 else learner + count * workers
    assert at_once <= max(cores, count + (staleness > 0))


def test_shares_by_hand() -> None:
    assert shared(8, learner=0, workers=0) == (4, 4)
    assert shared(8, learner=0, workers=0, count=3) == (2, 2)
    assert shared(8, learner=0, workers=1, count=3) == (5, 1)
    assert shared(8, learner=2, workers=0, count=3) == (2, 2)
    assert shared(8, learner=0, workers=0, count=2, staleness=0) == (8, 4)  # they take turns
    assert shared(2, learner=1, workers=1) == (1, 1)
    assert shared(2, learner=5, workers=3) == (5, 3)  # what is given stays


def test_who_asks_for_more_is_told() -> None:
    config = settings(learner={"threads": 2, "microbatch_tokens": 64}, workers={"threads": 3, "count": 2})
    assert crowding(config, 8) == ""
    assert "2 x 3 are 8 threads at one time, for 7 cores" in crowding(config, 7)
    turns = settings(
        learner={"threads": 2, "microbatch_tokens": 64},
        workers={"threads": 3, "count": 2},
        schedule={"groups_per_batch": 4, "max_staleness": 0},
    )
    assert crowding(turns, 6) == ""
    assert crowding(turns, 5)


def test_the_machine_has_cores() -> None:
    assert num_cores() >= 1


@pytest.mark.parametrize(
    ("told", "cores"),
    [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("nonsense", None), ("5 0", None)],
)
def test_a_container_may_use_what_its_quota_buys(told: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(told + "\n")
    everything = num_cores(tmp_path / "nothing here")
    assert num_cores(tmp_path / "cpu.max") == (cores or everything)
