"""Lent memory: it is known when the last reader is gone, and a delta changes in place only what nobody reads."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsDelta
from dapo_async.transport.sockets import ZERO_COPY_BYTES, Listener
from dapo_async.weight_sync.delta import make_delta
from dapo_async.weight_sync.encoding import bytes_of, encode_weights
from dapo_async.weight_sync.lending import Lender, lend
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.subscriber import Subscriber
from tests.weight_sync.weights_pair import (
    LIMIT,
    PATIENCE_S,
    Answer,
    assert_version,
    encoded,
    make_publisher,
    push_frames,
    running,
    subscribe,
    tensors_of,
    until,
)

Set = dict[str, Tensor]


def bits(tensors: Set) -> dict[str, bytes]:
    return {name: bytes(bytes_of(tensor)) for name, tensor in tensors.items()}


def places(tensors: Set) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


# --- what is lent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view_of",
    [
        lambda lent: lent,
        lambda lent: lent[1],
        lambda lent: lent.T,
        lambda lent: lent.view(torch.int32).flatten()[3:],
        lambda lent: lent.numpy(),
        lambda lent: memoryview(lent.numpy())[1:],
        lambda lent: torch.from_numpy(lent.numpy()[::2]),
        lambda lent: torch.nn.Parameter(lent.detach()),
    ],
    ids=["itself", "row", "turned", "bits", "numpy", "memoryview", "and back", "parameter"],
)
def test_it_is_read_until_the_last_view_of_any_kind_is_gone(view_of: Callable[[Tensor], Any]) -> None:
    lender = Lender(torch.arange(6.0).reshape(2, 3))
    assert not lender.is_read
    lent = lender.lend()
    assert lent.equal(lender.tensor)
    assert lent.data_ptr() == lender.tensor.data_ptr()
    view = view_of(lent)
    assert lender.is_read
    del lent
    assert lender.is_read
    del view
    assert not lender.is_read


def test_two_who_read_it_must_both_let_go() -> None:
    lender = Lender(torch.ones(3))
    one = lender.lend()
    other = lender.lend()
    del one
    assert lender.is_read
    del other
    assert not lender.is_read
    again = lender.lend()
    assert lender.is_read
    del again


def test_what_is_lent_outlives_its_lender() -> None:
    lent = Lender(torch.arange(1000.0)).lend()
    assert torch.zeros(1000).sum() == 0  # would take the memory, were it free
    assert lent.equal(torch.arange(1000.0))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,)])
def test_shapes_without_elements_or_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=torch.bfloat16)
    lent = Lender(tensor).lend()
    assert (lent.shape, lent.dtype) == (tensor.shape, tensor.dtype)
    assert lent.equal(tensor)


def test_the_last_reader_tells_in_its_own_thread_and_once() -> None:
    tensor, told = torch.ones(4), list[int]()
    loan = lend(tensor.data_ptr(), 16, tensor, lambda: told.append(threading.get_ident()))
    held = [torch.frombuffer(loan, dtype=torch.float32)]
    del loan
    assert not told
    reader = threading.Thread(target=held.clear)
    reader.start()
    reader.join(PATIENCE_S)
    assert told == [reader.ident]


def test_nothing_is_told_at_exit() -> None:
    code = """if True:
        import torch
        from dapo_async.weight_sync.lending import lend
        tensor = torch.ones(4)
        loan = lend(tensor.data_ptr(), 16, tensor, lambda: print("told"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == ""


# --- deltas applied to it --------------------------------------------------------------------------------


def a_set(version: int) -> Set:
    """``big`` travels without a copy, ``small`` by one. Each changes in every version, ``even`` in every other one."""
    big = torch.arange(ZERO_COPY_BYTES).to(torch.bfloat16)
    big[version::1000] = float(version)
    small = torch.zeros(600)
    small[:version] = 1.0
    return {"big": big, "none": torch.empty(0, 2), "small": small, "even": torch.full((2, 2), version // 2 * 2.0)}


def publish(publisher: Publisher, version: int, tensors: Set | None = None) -> None:
    publisher.publish(version, a_set(version) if tensors is None else tensors)
    publisher.wait_copied(PATIENCE_S)
    until(lambda: publisher.published == version)


def take(subscriber: Subscriber, version: int, expected: Set | None = None) -> Set:
    got, tensors = subscriber.wait_first(PATIENCE_S)
    assert got == version
    assert bits(tensors) == bits(a_set(version) if expected is None else expected)
    return tensors


def test_a_set_that_was_let_go_of_is_changed_in_the_memory_where_it_came() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        before = places(take(worker, 0))
        for version in range(1, 5):
            publish(publisher, version)
            assert places(take(worker, version)) == before
        until(lambda: publisher.counts.delta == 4)


def test_a_view_that_is_held_keeps_its_tensor_as_it_was_and_no_other() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        tensors = take(worker, 0)
        first, view = places(tensors), tensors["big"][7:]
        del tensors
        for version in (1, 2):
            publish(publisher, version)
            after = places(take(worker, version))
            assert after["big"] != first["big"]
            assert (after["small"], after["even"]) == (first["small"], first["even"])
            assert view.equal(a_set(0)["big"][7:])
        publish(publisher, 3)
        assert places(take(worker, 3)) == after  # the copy's memory, from here on
        until(lambda: publisher.counts.delta == 3)


def test_a_tensor_that_stayed_the_same_is_still_that_of_the_older_set_that_is_held() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        held = take(worker, 0)["even"]
        publish(publisher, 1)
        assert take(worker, 1)["even"].data_ptr() == held.data_ptr()
        publish(publisher, 2)  # nobody holds set 1, of which it is a part as well
        take(worker, 2)
        assert held.equal(a_set(0)["even"])
        until(lambda: publisher.counts.delta == 2)


def test_a_set_that_waits_to_be_taken_is_held() -> None:
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        publish(publisher, 0)
        until(lambda: worker.has_newer)
        assert worker._newest is not None
        place = worker._newest[1]["big"].data_ptr()
        publish(publisher, 1)
        until(lambda: worker._newest is not None and worker._newest[0] == 1)
        assert take(worker, 1)["big"].data_ptr() != place
        until(lambda: publisher.counts.delta == 1)


def test_many_deltas_make_what_whole_sets_would_and_none_changes_what_is_held() -> None:
    chance, generator = random.Random(7), torch.Generator().manual_seed(7)
    now = a_set(0)
    now["tied"] = now["big"]  # one tensor of two names
    held: list[tuple[Tensor, bytes]] = []
    with running(make_publisher(way="delta")) as publisher, running(subscribe(publisher.address)) as worker:
        for version in range(60):
            for name in chance.sample(["big", "small", "even"], chance.randint(0, 3)):
                at = torch.randint(now[name].numel(), (chance.randint(1, 300),), generator=generator)
                now[name].view(-1)[at] = torch.randn(len(at), generator=generator).to(now[name].dtype)
            publish(publisher, version, now)
            if chance.random() < 0.3:
                continue  # it waits untaken, or is passed over
            until(lambda version=version: worker._have == version)
            tensors = take(worker, version, now)
            for tensor in chance.sample(list(tensors.values()), chance.randint(0, 2)):
                held.append((tensor.view(-1)[1:], bytes(bytes_of(tensor.view(-1)[1:]))))
            del tensors, held[: -chance.randint(1, 6)]
            assert all(bytes(bytes_of(tensor)) == was for tensor, was in held)
        assert worker.refused == 0
        until(lambda: publisher.counts.delta > 20)


def delta_frames(version: int) -> Answer:
    """From the set before."""
    old, new = tensors_of(version - 1), tensors_of(version)
    push, after = encode_weights(version, new, "life")
    made = make_delta(version - 1, version, push.tensors, [bytes_of(tensor) for tensor in old.values()], after)
    assert made is not None
    message = WeightsDelta(
        version=version, base=version - 1, incarnation="life", digest=push.digest, steps=[made.parts]
    )
    return [*encoded(message), made.gaps, made.values]


def flipped(frames: Answer) -> Answer:
    return [*frames[:2], bytes([frames[2][0] ^ 1]) + frames[2][1:]]


def beyond_the_last_tensor(frames: Answer) -> Answer:
    """Malformed only after all of ``big`` has been changed."""
    return [frames[0], frames[1][:-1] + b"\x01", frames[2]]


@pytest.mark.parametrize("tamper", [flipped, beyond_the_last_tensor])
def test_a_base_that_a_bad_delta_spoiled_is_not_used_again_and_reaches_nobody(
    tamper: Callable[[Answer], Answer],
) -> None:
    codec = Codec(ON_WEIGHTS)
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener:
        worker = subscribe(listener.address)

        def answer(frames: Answer, have: int, base: int) -> None:
            received = listener.receive(PATIENCE_S)
            assert received is not None
            request = codec.decode(received[1])
            assert (request.have, request.base) == (have, base)
            assert listener.send(received[0], frames)

        answer(push_frames(2), have=-1, base=-1)
        held = worker.wait_first(PATIENCE_S)[1]["small"]  # and big is read by nobody
        answer(tamper(delta_frames(3)), have=2, base=2)
        answer(delta_frames(3), have=2, base=-1)  # a publisher that takes the base for whole
        assert not worker.has_newer
        answer(push_frames(3), have=2, base=-1)
        assert_version(worker.wait_first(PATIENCE_S), 3)
        answer(delta_frames(4), have=3, base=3)
        assert_version(worker.wait_first(PATIENCE_S), 4)
        assert dict(worker.refusals) == {"mismatch": 1, "base": 1}
        assert held.tolist() == [2.0]
        worker.check()
        worker.close()
