"""What the handlers make of workers that hang, send nonsense, or answer for others."""

import msgspec
import numpy as np
import pytest

from dapo_async.coordinator.handlers import MAX_REFUSALS
from dapo_async.coordinator.patience import FACTOR, FEWEST
from dapo_async.transport.messages import Ack, Beat, Cancel, DecodeSums, Group, Hello, Lease, Refused, Stop
from tests.coordinator.office import Office

SILENCE_S = 15.0  # network.silence_s


def last(office: Office, name: str, kind: type) -> object:
    return next(message for to, message in reversed(office.said) if to == name and isinstance(message, kind))


def group_of(office: Office, lease: Lease, **changes: object) -> Group:
    """A good answer, but for the changes."""
    return msgspec.structs.replace(office.group(lease), **changes)


# --- groups that cannot be decoded ---------------------------------------------------------------------------


def nan_logprobs(office: Office, lease: Lease) -> list[bytes]:
    group = group_of(office, lease, logprobs=np.full(6, np.nan, np.float32))
    return [bytes(frame) for frame in office.codec.encode(group)]


def unknown_field(office: Office, lease: Lease) -> list[bytes]:
    head, *arrays = [bytes(frame) for frame in office.codec.encode(office.group(lease))]
    return [msgspec.msgpack.encode(msgspec.msgpack.decode(head) | {"surprise": 1}), *arrays]


def lost_frame(office: Office, lease: Lease) -> list[bytes]:
    return [bytes(frame) for frame in office.codec.encode(office.group(lease))][:-1]


@pytest.mark.parametrize("broken", [nan_logprobs, unknown_field, lost_frame])
def test_a_group_that_cannot_be_decoded_gives_its_lease_to_another_worker_at_once(broken: object) -> None:
    office = Office()
    office.join("bad", capacity=1)
    (lease,) = office.leases("bad", "train")
    office.join("good", capacity=2)
    office.leases("good", "train")
    office.hear_raw("bad", broken(office, lease))  # type: ignore[operator]
    told = last(office, "bad", Ack)
    assert isinstance(told, Ack)
    assert (told.lease, told.outcome) == (lease.lease, "refused")  # so the worker drops the group
    assert not office.leases("bad", "train"), "it waits for another one to have room"
    office.answer("good", office.given("good")[0])
    assert lease.lease in [again.lease for again in office.leases("good", "train")]
    assert office.schedule.counts["reissued"] == 1
    assert sum(count for name, count in office.handlers.counts.items() if name.startswith("refused_")) == 1


def test_a_worker_whose_groups_never_decode_is_stopped_by_name(caplog: pytest.LogCaptureFixture) -> None:
    office = Office()
    office.join("bad", capacity=1)
    for _ in range(MAX_REFUSALS):
        (lease,) = office.leases("bad", "train")
        office.hear_raw("bad", nan_logprobs(office, lease))
    told = last(office, "bad", Stop)
    assert isinstance(told, Stop)
    assert "5 groups in a row were refused" in told.reason
    assert not office.handlers.workers
    assert "worker bad is gone (its groups were refused again and again)" in caplog.text


def test_a_broken_group_for_a_lease_of_another_worker_takes_nothing_from_it() -> None:
    office = Office()
    office.join("holder", capacity=1)
    (lease,) = office.leases("holder", "train")
    office.join("stranger", capacity=0)
    office.hear_raw("stranger", nan_logprobs(office, lease))
    assert isinstance(last(office, "stranger", Refused), Refused)
    assert office.held("holder")["train"] == 1
    assert office.answer("holder", lease).outcome == "accepted"


# --- answers for others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_nobody_answers_a_lease_that_was_given_to_others(kind: str) -> None:
    office = Office()
    if kind == "eval":
        office.evaluate(2)
    office.join("holder", capacity=4)
    lease = office.leases("holder", kind)[0]
    office.join("stranger", capacity=0)
    told = office.answer("stranger", lease)
    assert told.outcome == "refused"
    assert "never given to worker stranger" in told.detail
    assert office.handlers.counts["refused_not_holder"] == 1
    assert office.answer("holder", lease).outcome == "accepted"


# --- workers that beat and never answer ----------------------------------------------------------------------


def busy_office() -> tuple[Office, list[Lease]]:
    """One worker has answered enough leases, each in a second; another one holds some and answers none."""
    office = Office(groups_per_batch=8, max_staleness=7)
    office.join("good", capacity=4)
    for _ in range(FEWEST):
        office.now += 1.0
        office.answer("good", office.given("good")[0])
        office.join("good", capacity=4)
    office.join("hangs", capacity=3)
    return office, office.leases("hangs", "train")


def beat_all(office: Office, good_version: int = 0) -> None:
    for lease in office.given("good"):  # it goes on answering
        office.answer("good", lease)
    office.beat("good", good_version)
    office.beat("hangs", 0)
    office.handlers.beat(office.now)
    office.handlers.issue(office.now)


def pass_seconds(office: Office, seconds: float, good_version: int = 0) -> None:
    """Second by second, the good worker answers and both beat."""
    for _ in range(int(seconds)):
        office.now += 1.0
        beat_all(office, good_version)


def test_a_lease_that_takes_far_too_long_goes_to_a_second_worker_and_the_first_answer_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    office, (first, *_rest) = busy_office()
    office.now += 1.0
    beat_all(office)
    assert not office.schedule.counts["suspected"], "it is not late yet"
    began = office.now
    while not office.schedule.counts["suspected"]:
        assert office.now < began + FACTOR * SILENCE_S
        office.now += 1.0
        beat_all(office)
    assert office.schedule.counts["suspected"] == 3
    assert "worker hangs beats, but has not answered lease" in caplog.text
    again = {lease.lease: lease for lease in office.leases("good", "train")}
    assert first.lease in again
    assert again[first.lease].min_version == first.min_version, "what the first one samples must count as well"
    assert not office.leases("hangs", "train"), "it gets none any more"
    assert office.answer("hangs", first).outcome == "accepted", "the first answer counts, whoever it is from"
    cancelled = last(office, "good", Cancel)
    assert isinstance(cancelled, Cancel)
    assert cancelled.leases == [first.lease]
    assert office.answer("good", again[first.lease]).outcome == "duplicate"
    assert not office.handlers.workers[b"hangs"].suspected, "it has answered one: it gets leases again"


def test_who_waits_for_newer_weights_or_evaluates_is_not_suspected() -> None:
    office, _ = busy_office()
    worker = office.handlers.workers[b"hangs"]
    worker.min_versions = dict.fromkeys(worker.min_versions, 1)  # they need weights that it does not have
    worker.began.clear()
    office.now += 1000.0
    beat_all(office)
    assert not office.schedule.counts["suspected"]
    office.evaluate(2)
    worker.min_versions = dict.fromkeys(worker.min_versions, 0)
    beat_all(office)
    office.now += 1000.0
    beat_all(office)
    assert not office.schedule.counts["suspected"], "an evaluation has the places"


def test_who_waits_for_weights_that_another_worker_serves_is_suspected() -> None:
    office, held = busy_office()
    worker = office.handlers.workers[b"hangs"]
    worker.min_versions = dict.fromkeys(worker.min_versions, 1)
    worker.began.clear()
    pass_seconds(office, SILENCE_S + 2, good_version=1)
    assert office.schedule.counts["suspected"] == len(held)


def test_a_worker_that_is_slow_but_answers_is_judged_by_its_own_answers() -> None:
    office, (first, *_rest) = busy_office()
    pass_seconds(office, SILENCE_S + 2)
    assert office.handlers.workers[b"hangs"].suspected
    office.answer("hangs", first)
    worker = office.handlers.workers[b"hangs"]
    pass_seconds(office, 2 * SILENCE_S)  # twice as long as its last one: that is how long its leases take
    assert not worker.suspected


def test_a_suspected_worker_that_holds_nothing_gets_leases_again() -> None:
    office, _ = busy_office()
    pass_seconds(office, SILENCE_S + 2)
    assert office.handlers.workers[b"hangs"].suspected
    office.hear("hangs", Beat(version=0, running=0, holding=[("train", 0)]))
    assert office.handlers.workers[b"hangs"].suspected, "it has something to answer"
    office.hear("hangs", Beat(version=0, running=0, holding=[]))
    assert not office.handlers.workers[b"hangs"].suspected


def test_who_refuses_weights_gives_back_what_waits_for_them_and_gets_no_more_of_it() -> None:
    office = Office(groups_per_batch=8, max_staleness=7)
    office.join("refuses", capacity=4, version=-1)
    held = [lease.lease for lease in office.leases("refuses", "train")]
    assert held
    refuse(office, "refuses", -1, "0: other shapes")
    cancelled = last(office, "refuses", Cancel)
    assert isinstance(cancelled, Cancel)
    assert cancelled.leases == held
    assert not office.leases("refuses", "train"), "it would wait there"
    office.join("able", capacity=4)
    assert [lease.lease for lease in office.leases("able", "train")] == held


def test_nothing_is_kept_of_leases_that_nobody_will_answer() -> None:
    office = Office()
    office.join("one", capacity=2)
    lease = office.leases("one", "train")[0]
    office.handlers._refused_at[lease.lease] = office.now
    kept = office.handlers._given
    assert ("train", lease.lease) in kept
    office.schedule.record = lambda number: None  # type: ignore[method-assign, assignment]
    office.handlers.beat(office.now)
    assert not kept
    assert not office.handlers._refused_at


def test_the_only_worker_is_never_suspected() -> None:
    office, _ = busy_office()
    office.handlers.lose(office.handlers.workers[b"good"], "test")
    office.now += 1000.0
    office.beat("hangs", 0)
    office.handlers.beat(office.now)
    assert not office.schedule.counts["suspected"]


# --- numbers and names that a peer chooses -------------------------------------------------------------------


@pytest.mark.parametrize(
    "sums", [{"rows": 5}, {"rows_squared": 5}, {"seconds": 1.0}, {"rows_seconds": 1.0}, {"steps": 0, "rows": 1}]
)
def test_sums_of_no_decode_steps_are_refused(sums: dict[str, float]) -> None:
    office = Office()
    office.join("w", capacity=1)
    beat = msgspec.to_builtins(Beat(version=0, running=0, holding=[]))
    beat |= {"type": "beat", "decode": msgspec.to_builtins(DecodeSums()) | sums}
    office.hear_raw("w", [msgspec.msgpack.encode(beat)])
    told = last(office, "w", Refused)
    assert isinstance(told, Refused)
    assert "decode sums of no steps must all be 0" in told.detail


@pytest.mark.parametrize("field", ["worker", "host", "engine", "incarnation"])
@pytest.mark.parametrize("text", ["two\nlines", "x" * 10_000, "\x1b[2J", "a\u2028b"])
def test_what_a_peer_calls_itself_is_one_short_line(field: str, text: str) -> None:
    office = Office()
    hello = msgspec.to_builtins(Hello(worker="w", pid=1, host="h", engine="e", capacity=1, version=0))
    office.hear_raw("w", [msgspec.msgpack.encode(hello | {"type": "hello", field: text})])
    assert not office.handlers.workers
    assert office.handlers.counts["refused_malformed"] == 1


def test_a_refusal_never_writes_a_second_line_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    office = Office()
    office.join("w", capacity=1)
    (lease,) = office.leases("w", "train")
    head, *arrays = [bytes(frame) for frame in office.codec.encode(office.group(lease))]
    fields = msgspec.msgpack.decode(head) | {"kind": "train\nERROR the learner is on fire"}
    office.hear_raw("w", [msgspec.msgpack.encode(fields), *arrays])
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["w0.x", "w0.cluster.local-12", "w00", "w2", "w2.1"])
def test_names_that_only_begin_like_theirs_need_none(name: str) -> None:
    office = Office()
    office.handlers.reserve(["w0", "w1"], "secret")
    office.join(name, capacity=1)
    assert name.encode() in office.handlers.workers


@pytest.mark.parametrize("name", ["w0", "w0.1", "w0.12"])
@pytest.mark.parametrize("proof", ["", "guess"])
def test_the_names_of_the_learners_own_workers_need_a_proof(name: str, proof: str) -> None:
    office = Office()
    office.handlers.reserve(["w0", "w1"], "secret")
    hello = Hello(worker=name, pid=1, host="h", engine="e", capacity=1, version=0, proof=proof)
    office.hear(name, hello)
    told = last(office, name, Refused)
    assert isinstance(told, Refused)
    assert told.reason == "name_taken"
    assert "choose another --name" in told.detail
    assert not office.handlers.workers
    office.hear(name, msgspec.structs.replace(hello, proof="secret"))
    assert [worker.name for worker in office.handlers.workers.values()] == [name]
    office.join("w01", capacity=1)
    assert len(office.handlers.workers) == 2


# --- weights that nobody takes -------------------------------------------------------------------------------


def refuse(office: Office, name: str, version: int, why: str) -> None:
    office.hear(name, Beat(version=version, running=0, holding=[], refused_weights=1, refusal=why))


def test_a_refusal_of_weights_is_told_once_and_ends_the_run_only_if_nobody_can_serve(
    caplog: pytest.LogCaptureFixture,
) -> None:
    office = Office()
    office.schedule.published = 3
    assert office.handlers.refusals() == [], "nobody has come yet"
    office.join("one", capacity=2, version=-1)
    office.join("loads", capacity=0, version=-1)
    refuse(office, "one", -1, "3: lm_head.weight holds values that are not finite")
    refuse(office, "one", -1, "3: lm_head.weight holds values that are not finite")
    assert office.handlers.refusals() == [], "the one that loads may be able to serve them"
    office.handlers.lose(office.handlers.workers[b"loads"], "test")
    assert office.handlers.refusals() == ["one refuses 3: lm_head.weight holds values that are not finite"]
    assert caplog.text.count("worker one refuses weights 3: lm_head.weight holds values that are not finite") == 1
    office.join("two", capacity=2, version=3)
    assert office.handlers.refusals() == []
    refuse(office, "two", 2, "3: too large")
    assert len(office.handlers.refusals()) == 2
    refuse(office, "one", 3, "")
    assert office.handlers.refusals() == [], "it has come to serve them"
