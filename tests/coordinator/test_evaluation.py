"""Who gets evaluation leases and when: the handlers without a socket, told what a coordinator would hear."""

import time
from typing import Any

import pytest

from dapo_async.coordinator.evaluation import EvaluationJob, scored_answers, summarise
from dapo_async.rl.scores import ScoredAnswer
from dapo_async.transport.messages import (
    Ack,
    Beat,
    Cancel,
    Lease,
)
from tests.coordinator.office import Office, Prompts


def job(num_prompts: int = 10, samples: int = 1, **facts: Any) -> EvaluationJob:
    settings = {"samples": samples, "max_tokens": 5, "temperature": 1.0, "top_p": 0.7, "min_version": 0} | facts
    return EvaluationJob([Prompts()[n] for n in range(num_prompts)], **settings)


def test_training_goes_first_and_evaluation_gets_what_it_leaves() -> None:
    office = Office()
    office.handlers.evaluate(job())
    office.join("w", capacity=7)
    given = [message.kind for _, message in office.said if isinstance(message, Lease)]
    # (η + 1) · B = 4 leases of 2 completions; 3 places are left, and an evaluation lease is one completion.
    assert given == ["train"] * 4 + ["eval"] * 6


def test_a_full_worker_still_has_a_share_for_evaluation() -> None:
    office = Office(groups_per_batch=8)
    evaluation = job(samples=2)
    office.handlers.evaluate(evaluation)
    office.join("small", capacity=2)
    assert office.held("small") == {"train": 2, "eval": 1}  # one lease at least
    office.join("large", capacity=14)
    assert office.held("large") == {"train": 14, "eval": 1}  # 28 completions, an eighth of them is one lease of two
    office.handlers.lose(office.handlers.workers[b"large"], "test")
    office.join("larger", capacity=20)
    assert office.held("larger") == {"train": 14, "eval": 6}  # what was lost, and places for it


def test_what_is_waited_for_goes_first_and_then_training_goes_on() -> None:
    office = Office()
    office.handlers.evaluate(job(3, waited_for=True))
    office.join("w", capacity=1)
    assert office.held("w") == {"train": 0, "eval": 2}
    first, _ = office.leases("w")
    office.answer("w", first)
    assert office.held("w") == {"train": 1, "eval": 2}


def test_the_next_lease_comes_before_the_acknowledgement() -> None:
    """Between the two a worker would hold nothing of the evaluation, and take newer weights."""
    office = Office()
    office.handlers.evaluate(job(2))
    office.join("w", capacity=1)
    office.leases("w", "train")
    (first,) = office.leases("w")
    office.said.clear()
    assert office.answer("w", first).outcome == "accepted"
    assert [type(message) for _, message in office.said] == [Lease, Ack]
    (second,) = office.leases("w")
    assert (first.truth, second.truth) == ("0", "1")
    assert office.answer("w", second).outcome == "accepted"


def test_an_evaluation_stays_with_the_workers_of_its_version() -> None:
    office = Office()
    evaluation = job(4)
    office.handlers.evaluate(evaluation)
    office.join("old", capacity=1)
    office.join("new", capacity=3)
    for worker in ("old", "new"):
        for lease in office.leases(worker, "train"):
            office.answer(worker, lease)
    office.handlers.lose(office.handlers.workers[b"new"], "it comes back with newer weights")
    office.train()
    office.join("new", capacity=3, version=1)
    assert office.held("new")["eval"] == 0
    given = office.leases("old")
    while given:
        assert {lease.min_version for lease in given} == {0}
        assert office.answer("old", given.pop()).outcome == "accepted"
        given += office.leases("old")
    assert evaluation.done
    assert summarise(evaluation)["heldout/version"] == 0


def test_what_needs_newer_weights_goes_to_workers_that_may_take_them() -> None:
    office = Office(max_staleness=0)
    office.handlers.evaluate(job(20))
    office.join("evaluates", capacity=8)
    for lease in office.leases("evaluates", "train"):
        office.answer("evaluates", lease)
    office.train()
    assert office.held("evaluates")["train"] == 0  # they would wait there for the swap
    assert office.held("evaluates")["eval"] == 16  # all places
    office.join("behind", capacity=8, version=0)
    assert office.held("behind") == {"train": 2, "eval": 0}  # it is about to take them, and is not kept from it


def test_an_evaluation_begins_again_where_nobody_serves_its_version_any_more() -> None:
    office = Office()
    evaluation = job(3)
    office.handlers.evaluate(evaluation)
    office.join("w", capacity=4)
    for lease in office.leases("w", "train"):
        office.answer("w", lease)
    (first, *_) = office.leases("w")
    assert office.answer("w", first).outcome == "accepted"
    office.handlers.lose(office.handlers.workers[b"w"], "killed")
    office.train()
    office.join("again", capacity=4, version=1)
    assert evaluation.version == 1
    assert not evaluation.groups
    anew = office.leases("again")
    assert [lease.truth for lease in anew] == ["0", "1", "2"]
    assert anew[0].seed == first.seed
    assert office.answer("again", first).outcome == "duplicate"  # the old number stands for nothing
    assert not evaluation.groups


def test_leases_that_came_too_late_are_given_back_by_the_heartbeat() -> None:
    """The worker took newer weights while they were on their way."""
    office = Office(max_staleness=3)
    office.join("w", capacity=2)
    for lease in office.leases("w", "train"):
        office.answer("w", lease)
    office.train()
    evaluation = job(1)
    office.handlers.evaluate(evaluation)
    office.handlers.issue(time.monotonic())
    (late,) = office.leases("w")
    assert late.min_version == 0
    office.hear("w", Beat(version=1, running=0, holding=[]))
    (again,) = office.leases("w")
    assert (again.min_version, again.seed) == (1, late.seed)
    assert office.answer("w", again, version=1).outcome == "accepted"
    assert evaluation.done


def test_a_token_of_another_version_is_refused_and_the_prompt_leased_again() -> None:
    office = Office()
    office.join("w", capacity=4)
    for lease in office.leases("w", "train"):
        office.answer("w", lease)
    office.train()
    office.beat("w", 1)
    evaluation = job(1)
    office.handlers.evaluate(evaluation)
    office.handlers.issue(time.monotonic())
    (lease,) = office.leases("w")
    ack = office.answer("w", lease, version=0)
    assert (ack.outcome, ack.detail) == (
        "refused",
        "version: an evaluation of version 1 got a token of version 0",
    )
    assert office.handlers.counts["refused_version"] == 1
    (again,) = office.leases("w")
    assert (again.lease, again.seed) == (lease.lease, lease.seed)
    assert office.answer("w", again, version=1).outcome == "accepted"
    assert evaluation.done


def test_a_worker_of_a_future_that_is_gone_does_not_choose_the_version() -> None:
    office = Office()
    office.handlers.evaluate(job())
    office.join("ahead", capacity=4, version=12)
    assert office.held("ahead")["eval"] == 0
    office.beat("ahead", 0)
    assert {lease.min_version for lease in office.leases("ahead")} == {0}


def test_a_worker_that_still_loads_gets_nothing() -> None:
    office = Office()
    office.handlers.evaluate(job(waited_for=True))
    office.join("w", capacity=0, version=-1)
    assert office.held("w") == {"train": 0, "eval": 0}


def test_a_new_evaluation_takes_the_place_of_one_that_runs() -> None:
    office = Office()
    office.handlers.evaluate(job(2))
    office.join("w", capacity=8)
    former = office.leases("w")
    office.handlers.evaluate(job(2))
    office.handlers.issue(time.monotonic())
    cancelled = next(message for _, message in office.said if isinstance(message, Cancel))
    assert cancelled.leases == [lease.lease for lease in former]
    assert not {lease.lease for lease in former} & {lease.lease for lease in office.leases("w")}


def test_places_answered_before_are_left_out_and_the_others_keep_their_seeds() -> None:
    whole, rest = job(4), job(4, answered={0, 2})
    rest._begin(0)
    whole._begin(0)
    seeds = [whole.lease("run.0", 7).seed for _ in range(4)]
    leases = [rest.lease("run.0", 7) for _ in range(2)]
    assert [(lease.truth, lease.seed) for lease in leases] == [("1", seeds[1]), ("3", seeds[3])]
    assert len(set(seeds)) == 4
    assert not rest.done
    assert job(2, answered={0, 1}).done


def test_what_is_told_of_an_evaluation() -> None:
    office = Office()
    evaluation = job(3, samples=2, waited_for=True)
    office.handlers.evaluate(evaluation)
    office.join("w", capacity=3)
    for lease, correct in zip(office.leases("w"), [(True, True), (True, False), (False, False)], strict=True):
        office.answer("w", lease, correct=correct)
    assert scored_answers(evaluation.groups[1]) == [
        ScoredAnswer(correct=right, num_tokens=3, truncated=False) for right in (True, False)
    ]
    told = summarise(evaluation)
    assert told["heldout/accuracy"] == 0.5
    assert told["heldout/pass_at_k"] == pytest.approx(2 / 3)
    # 27 resamples of (1, 1/2, 0): the means 0 and 1 have probability 1/27 each, which is more than 2.5 %.
    assert (told["heldout/accuracy_low"], told["heldout/accuracy_high"]) == (0.0, 1.0)
    assert (told["heldout/samples"], told["heldout/prompts"], told["heldout/length_mean"]) == (2, 3, 3)
    assert told["heldout/truncated_share"] == told["heldout/version"] == 0
    assert "heldout/maj_at_k" not in told  # these answers name nothing
