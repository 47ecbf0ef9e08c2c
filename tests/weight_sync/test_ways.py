"""The ways of a set of weights to a worker: real publisher and subscriber, and what makes them fall back."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from dapo_async.errors import ConfigError, DapoError, StallError
from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsDelta, WeightsPush, WeightsRequest, WeightsShared
from dapo_async.transport.sockets import Dialer, Listener
from dapo_async.weight_sync import publisher as publisher_module
from dapo_async.weight_sync import snapshot
from dapo_async.weight_sync.buffers import MAX_BUFFERS
from dapo_async.weight_sync.delta import MAX_DELTAS
from dapo_async.weight_sync.encoding import bytes_of, live_tensors, serving_tensors
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.shared_memory import available
from dapo_async.weight_sync.subscriber import Subscriber
from tests.learner.test_update import answers, make_update, settings
from tests.weight_sync.weights_pair import LIMIT, PATIENCE_S, encoded, make_publisher, running, subscribe, until

SIZE = 20_000
linux = pytest.mark.skipif(not available(), reason="needs Linux")


def a_set(version: int) -> dict[str, Tensor]:
    """Bits of every kind; from one version to the next 21 elements change."""
    patterns = torch.arange(SIZE, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).clone()
    for step in range(1, version + 1):
        patterns[step:20_000:1000] = float(step)
    return {"patterns": patterns, "scalar": torch.tensor(float(version)), "still": torch.ones(3, 4)}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].shape == t.shape and one[name].view(-1).view(torch.uint8).equal(t.view(-1).view(torch.uint8))
        for name, t in other.items()
    )


def take(subscriber: Subscriber, version: int) -> None:
    got, tensors = subscriber.wait_first(PATIENCE_S)
    assert got == version
    assert same_bits(tensors, a_set(version))


def assert_pushed(publisher: Publisher, expected: dict[str, int]) -> None:
    """How often each way was taken; an answer may be read before it is counted."""
    until(lambda: {by: n for by in ("full", "delta", "shm") if (n := getattr(publisher.counts, by))} == expected)


def publish(publisher: Publisher, version: int) -> None:
    publisher.publish(version, a_set(version))
    publisher.wait_copied(PATIENCE_S)
    until(lambda: publisher.published == version)


# --- each way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "expected"),
    [("full", {"full": 6}), ("delta", {"full": 1, "delta": 5}), ("shm", {"shm": 6}), ("auto", {"shm": 6})],
)
def test_every_version_arrives_by_the_way_that_was_asked_for(way: Any, expected: dict[str, int]) -> None:
    if expected.get("shm") and not available():
        pytest.skip("needs Linux")
    with running(make_publisher(way=way)) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(6):
            publish(publisher, version)
            take(worker, version)
        assert_pushed(publisher, expected)
        counts = publisher.counts
        assert (counts.refused, counts.unshared, worker.refused) == (0, 0, 0)
        whole = sum(tensor.nbytes for tensor in a_set(0).values())
        sent = counts.sent_bytes - counts.full * whole
        assert 0 <= sent <= 100 * counts.delta
        values = publisher.metrics()
        assert values["publish/bytes"] == whole
        assert values["publish/sent_bytes"] == counts.sent_bytes
        assert ("publish/delta_share" in values) == (way == "delta")
        assert values.get("publish/delta_share", 0.0) < 0.01


def open_files() -> set[str]:
    """Shared files that this process has open or mapped."""
    gc.collect()
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_exists(fd)]
    return {link for link in links if "dapo-async-weights" in link}


def fd_exists(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def twelve_versions(way: Any) -> None:
    with running(make_publisher(way=way)) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(12):
            publish(publisher, version)
            take(worker, version)
        assert 2 <= len(open_files()) <= MAX_BUFFERS
        assert publisher._buffers.dropped == 0
        worker.newest()
        until(lambda: not any(buffer.readers for buffer in publisher._buffers._all))


@linux
def test_shared_sets_take_turns_in_few_files_and_nothing_is_left() -> None:
    twelve_versions("shm")
    until(lambda: not open_files())


@pytest.mark.parametrize("way", ["full", pytest.param("auto", marks=linux)])
def test_sets_that_travel_whole_take_turns_in_the_same_memory_and_spoil_none_for_others(way: Any) -> None:
    """First touch of fresh memory costs many copies: a worker far away must not make every push pay it."""
    with (
        running(make_publisher(way=way)) as publisher,
        running(subscribe(publisher.address, worker="here")) as here,
        Dialer(publisher.address, max_message_bytes=LIMIT) as far,
    ):
        for version in range(8):
            publisher.publish(version, {"big": torch.full((1 << 16,), float(version))})  # large enough not to be copied
            until(lambda version=version: publisher.published == version)
            assert here.wait_first(PATIENCE_S)[1]["big"][-1] == version
            here.newest()
            ask(far, have=version - 1, unshared="another host", base=-1)
            until(lambda: sum(bool(buffer.readers) for buffer in publisher._buffers._all) <= 1)
        until(lambda: publisher.counts.full == (8 if way == "auto" else 16))  # an answer may come before it is counted
        assert len(publisher._buffers._all) <= MAX_BUFFERS
        assert publisher._buffers.made <= MAX_BUFFERS
        assert publisher._buffers.dropped == 0


@linux
def test_a_worker_that_connects_anew_still_gives_back_what_it_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        running(make_publisher(way="shm")) as publisher,
        running(subscribe(publisher.address, grace_s=0.1)) as worker,
    ):
        publish(publisher, 0)
        _, held = worker.wait_first(PATIENCE_S)
        first = publisher._buffers._all[0]
        monkeypatch.setattr(publisher, "_beat", lambda: None)  # silent: the worker tries another socket
        until(lambda: len(publisher._parked) > 1)
        publish(publisher, 1)
        take(worker, 1)
        with pytest.raises(AssertionError, match="in vain"):
            until(lambda: not first.readers, patience_s=0.3)
        del held
        worker.newest()
        until(lambda: not first.readers)


@linux
def test_two_workers_of_one_name_do_not_give_back_what_the_other_reads() -> None:
    with (
        running(make_publisher(way="shm")) as publisher,
        running(subscribe(publisher.address)) as one,
        running(subscribe(publisher.address)) as other,
    ):
        publish(publisher, 0)
        _, held = one.wait_first(PATIENCE_S)
        for version in range(6):
            if version:
                publish(publisher, version)
            take(other, version)
            other.newest()
        assert same_bits(held, a_set(0))
        del held


@linux
def test_a_push_that_fails_takes_nothing_from_the_connection_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker connected anew; what is asked for by its first connection, which is gone, cannot be delivered."""
    with running(make_publisher(way="shm")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        _, held = worker.wait_first(PATIENCE_S)
        buffer = publisher._buffers._all[0]
        until(lambda: len(buffer.readers) == 1)
        (reader,) = buffer.readers
        request = WeightsRequest(worker="w", reader=str(reader), incarnation="life", have=-1)
        send, undelivered = publisher._listener.send, publisher.counts.undelivered
        # Only the publisher's thread may send; this connection has gone anyway.
        monkeypatch.setattr(publisher._listener, "send", lambda peer, frames: peer != b"gone" and send(peer, frames))
        publisher._push(b"gone", request)
        assert publisher.counts.undelivered == undelivered + 1
        assert buffer.readers == {reader}
        publisher._push(b"gone", msgspec.structs.replace(request, reader="never served"))
        assert buffer.readers == {reader}
        del held


# --- deltas ----------------------------------------------------------------------------------------------


def ask(dialer: Dialer, **fields: Any) -> Any:
    """The answer to a request that is no sign of life."""
    codec = Codec(ON_WEIGHTS)
    request = WeightsRequest(**{"worker": "by hand", "reader": "by hand", "incarnation": "life", "have": -1} | fields)
    assert dialer.send(encoded(request), PATIENCE_S)
    while frames := dialer.receive(PATIENCE_S):
        if isinstance(message := codec.decode(frames), WeightsPush | WeightsDelta | WeightsShared):
            return message
    raise AssertionError("no answer")


def test_the_chain_is_as_long_as_it_is_kept_and_a_base_beyond_it_means_a_whole_set() -> None:
    with (
        running(make_publisher(way="delta")) as publisher,
        running(subscribe(publisher.address)) as worker,
        Dialer(publisher.address, max_message_bytes=LIMIT) as other,
    ):
        for version in range(MAX_DELTAS + 2):
            publish(publisher, version)
            take(worker, version)
        newest = MAX_DELTAS + 1
        for base in (newest - 1, newest - 3, 1):
            answer = ask(other, have=base, base=base)
            assert (type(answer), answer.base, len(answer.steps)) == (WeightsDelta, base, newest - base)
        for fields in ({"base": 0}, {"base": -1}, {"base": newest - 1, "incarnation": "past"}, {"base": newest + 1}):
            assert isinstance(ask(other, have=0, **fields), WeightsPush)


def test_a_worker_that_skipped_versions_catches_up_by_a_chain() -> None:
    with running(make_publisher(way="delta")) as publisher:
        with running(subscribe(publisher.address)) as worker:
            publish(publisher, 0)
            take(worker, 0)
            base = worker._base
        for version in (1, 2, 3):
            publish(publisher, version)
        with running(subscribe(publisher.address)) as late:
            take(late, 3)
            publish(publisher, 4)
            take(late, 4)
        with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as idle:
            late = subscribe(idle.address)
            late._have, late._base = 0, base
            until(lambda: idle.receive(0.05) is not None)
            late._base, late._have = base, 0
            offer = publisher._ready
            assert offer is not None
            answer = offer.answer(WeightsRequest(worker="w", reader="r", incarnation="life", have=0, base=0))
            assert answer.by == "delta"
            frames = [memoryview(bytes(frame)) for frame in answer.frames]
            assert late._receive(frames, late._target) == 0.0
            take(late, 4)
            late.close()


def test_a_delta_that_is_no_smaller_is_not_sent() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(3):
            publisher.publish(version, {"w": torch.full((1000,), float(version)).bfloat16()})
            got, tensors = worker.wait_first(PATIENCE_S)
            assert (got, float(tensors["w"][0])) == (version, version)
        assert_pushed(publisher, {"full": 3})


def test_another_layout_means_a_whole_set() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        for version, size in enumerate((1000, 1001)):
            publisher.publish(version, {"w": torch.zeros(size)})
            assert worker.wait_first(PATIENCE_S)[1]["w"].shape == (size,)
        assert_pushed(publisher, {"full": 2})


def test_no_delta_is_made_that_nobody_wants() -> None:
    with running(make_publisher(way="auto")) as publisher:
        for version in range(3):
            publish(publisher, version)
        assert publisher._ready is not None
        assert publisher._ready.deltas == ()


def test_a_base_that_was_damaged_means_one_refusal_and_a_whole_set() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        _, tensors = worker.wait_first(PATIENCE_S)
        tensors["still"][0] = 5.0  # by an engine that writes to what it was to read
        publish(publisher, 1)
        take(worker, 1)
        assert dict(worker.refusals) == {"mismatch": 1}
        assert_pushed(publisher, {"full": 2, "delta": 1})


def test_a_delta_without_its_base_is_refused() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        take(worker, 0)
        message = WeightsDelta(version=9, base=4, incarnation="life", digest="d", steps=[[]])
        frames = [memoryview(frame) for frame in encoded(message)]
        assert worker._receive([*frames, memoryview(b""), memoryview(b"")], worker._target) is not None
        assert worker.refusals["base"] == 1


@pytest.mark.parametrize("way", ["delta", pytest.param("shm", marks=linux)])
def test_tensors_in_use_are_not_changed_by_later_sets(way: Any) -> None:
    with running(make_publisher(way=way)) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        _, held = worker.wait_first(PATIENCE_S)
        for version in range(1, 6):
            publish(publisher, version)
            take(worker, version)
        assert same_bits(held, a_set(0))
        del held


def test_a_set_on_its_way_over_the_network_is_not_written_again() -> None:
    with running(make_publisher(way="full")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        take(worker, 0)
        assert publisher._ready is not None
        with publisher._news:
            sent = publisher._ready.snapshot.lent_frames()  # as if to a peer that is slow to take them
        for version in range(1, 6):
            publish(publisher, version)
            take(worker, version)
        assert [bytes(frame) for frame in sent] == [bytes(bytes_of(tensor)) for tensor in a_set(0).values()]
        assert publisher._buffers.made == MAX_BUFFERS  # the others took turns


# --- falling back from shared memory ---------------------------------------------------------------------


@linux
def test_who_cannot_open_the_memory_is_served_over_the_network_counted_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # To a worker of another host the learner's pid is another process, or none.
    monkeypatch.setattr("dapo_async.weight_sync.shared_memory.os.getpid", lambda: 2**22 + 1)
    with running(make_publisher(way="auto")) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(4):
            publish(publisher, version)
            take(worker, version)
        assert_pushed(publisher, {"shm": 1, "full": 1, "delta": 3})
        assert publisher.counts.unshared == 1
        assert worker.refused == 0
        assert publisher.metrics()["publish/unshared"] == 1
    told = [record.message for record in caplog.records if "over the network" in record.message]
    assert sum(line.startswith("worker w gets its weights over the network: cannot open /proc/") for line in told) == 1


@linux
def test_a_shared_set_with_another_stamp_is_asked_for_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(make_publisher(way="shm")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        take(worker, 0)
        monkeypatch.setattr(snapshot, "stamp_of", lambda *_: b"another set's..!")
        publish(publisher, 1)
        take(worker, 1)
        assert dict(worker.refusals) == {"mismatch": 1}
        assert_pushed(publisher, {"shm": 2, "full": 1})


def test_where_there_is_no_such_memory_auto_goes_without_and_shm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with pytest.raises(ConfigError, match=r'weights\.way = "shm" needs Linux'):
        make_publisher(way="shm")
    with running(make_publisher(way="auto")) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(2):
            publish(publisher, version)
            take(worker, version)
        assert_pushed(publisher, {"full": 1, "delta": 1})


WORKER = """
import sys, time
sys.path.insert(0, ".")
from tests.weight_sync.weights_pair import subscribe
worker = subscribe(sys.argv[1], worker="child")
version, tensors = worker.wait_first(60)
print(version, float(tensors["scalar"]), flush=True)
time.sleep(60)
"""


def beside_a_killed_worker() -> None:
    with running(make_publisher(way="shm")) as publisher:
        publish(publisher, 0)
        child = subprocess.Popen([sys.executable, "-c", WORKER, publisher.address], stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline().split() == ["0", "0.0"]
            child.send_signal(signal.SIGKILL)
        finally:
            child.kill()
            child.communicate(timeout=PATIENCE_S)
        with running(subscribe(publisher.address)) as worker:
            take(worker, 0)
            for version in range(1, 8):
                publish(publisher, version)
                take(worker, version)
        assert len(publisher._buffers.names) <= MAX_BUFFERS
        assert publisher._buffers.dropped <= 1


@linux
def test_a_killed_worker_never_holds_the_learner_up_or_its_memory_for_long() -> None:
    beside_a_killed_worker()
    until(lambda: not open_files())
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dapo-async")]


# --- the copy behind the learner's back ------------------------------------------------------------------


class Gate:
    """Holds the encoder before it reads a tensor, as a slow copy would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        real = publisher_module.fill

        def slow(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(timeout=PATIENCE_S)
            return real(*arguments)

        monkeypatch.setattr(publisher_module, "fill", slow)


def test_an_optimizer_step_waits_until_what_was_published_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, update = Gate(monkeypatch), make_update(settings())
    with running(make_publisher()) as publisher, running(subscribe(publisher.address)) as worker:
        update.before_step = lambda: publisher.wait_copied(PATIENCE_S)
        expected = serving_tensors(update.model, torch.float32)
        publisher.publish(0, live_tensors(update.model), torch.float32)
        assert gate.reached.wait(timeout=PATIENCE_S)
        opener = threading.Timer(0.3, gate.open.set)
        opener.start()
        update.train(answers(), 0, lambda: None)
        opener.join(PATIENCE_S)
        _, tensors = worker.wait_first(PATIENCE_S)
        assert same_bits(tensors, expected)
        assert not same_bits(serving_tensors(update.model, torch.float32), expected)
        assert publisher.counts.blocked_s > 0
        del tensors


def test_publishing_itself_neither_copies_nor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with running(make_publisher()) as publisher:
        source = torch.zeros(3)
        publisher.publish(0, {"w": source})
        assert gate.reached.wait(timeout=PATIENCE_S)
        with pytest.raises(StallError, match=r"waited 0\.05 s for weights 0 to be copied before its next optimizer"):
            publisher.wait_copied(0.05)
        gate.open.set()
        publisher.wait_copied(PATIENCE_S)
        before = time.monotonic()
        publisher.wait_copied(0.0)  # there is nothing to wait for
        assert time.monotonic() >= before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_waiting_for_an_encoder_that_ended_says_why() -> None:
    made = make_publisher()
    made.publish(0, {"counts": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(DapoError, match="weights encoder thread ended: WeightsError: counts cannot be published"):
        made.wait_copied(PATIENCE_S)
    made.close()
