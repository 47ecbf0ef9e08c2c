"""Sockets: who may listen, waiting and being woken, peers that vanish, limits, and closing."""

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from dapo_async.errors import ConfigError
from dapo_async.transport.sockets import ZERO_COPY_BYTES, Dialer, Listener

LIMIT = 1 << 20
PATIENCE_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def _collector_of_sent_frames() -> None:
    """pyzmq starts one daemon thread at the first large send and keeps it: before any test counts threads."""
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener, dialed(listener) as (_, peer):
        assert listener.send(peer, [bytes(ZERO_COPY_BYTES)])


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as made:
        yield made


@contextlib.contextmanager
def dialed(listener: Listener, identity: bytes | None = None) -> Iterator[tuple[Dialer, bytes]]:
    """A dialer that has introduced itself, and the name under which the listener knows it."""
    with Dialer(listener.address, max_message_bytes=LIMIT, identity=identity) as dialer:
        assert dialer.send([b"hello"], PATIENCE_S)
        received = listener.receive(PATIENCE_S)
        assert received is not None
        yield dialer, received[0]


def test_a_free_port_is_picked_and_both_ways_carry_frames(listener: Listener) -> None:
    assert listener.address.startswith("tcp://127.0.0.1:")
    assert not listener.address.endswith("*")
    with dialed(listener) as (dialer, peer):
        assert listener.send(peer, [b"a", b"", memoryview(b"ccc")])
        received = dialer.receive(PATIENCE_S)
        assert received is not None
        assert [bytes(frame) for frame in received] == [b"a", b"", b"ccc"]


def test_two_dialers_have_different_identities(listener: Listener) -> None:
    with dialed(listener) as (_, one), dialed(listener) as (_, other):
        assert one != other


def test_nothing_to_receive_returns_none(listener: Listener) -> None:
    assert listener.receive(0.0) is None
    assert listener.receive(0.01) is None
    with dialed(listener) as (dialer, _):
        assert dialer.receive(0.01) is None


def test_localhost_is_loopback() -> None:
    with Listener("tcp://localhost:*", max_message_bytes=LIMIT) as listener, dialed(listener) as (_, peer):
        assert listener.send(peer, [b"x"])


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:*",
        "tcp://*:*",
        "tcp://192.0.2.1:5555",
        "tcp://eth0:5555",
        "tcp://localhost.example:*",
        "tcp://[::]:*",
    ],
)
def test_plain_text_beyond_loopback_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.insecure = true"):
        Listener(address, max_message_bytes=LIMIT)


def test_beyond_loopback_is_possible_when_asked_for() -> None:
    with Listener("tcp://0.0.0.0:*", max_message_bytes=LIMIT, insecure=True) as listener:
        assert listener.address.startswith("tcp://0.0.0.0:")


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "127.0.0.1:5555", "tcp://127.0.0.1:99999", "tcp://127.0.0.1"])
def test_what_is_no_tcp_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        Listener(address, max_message_bytes=LIMIT)


def test_a_foreign_address_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.*no such address"):
        Listener("tcp://192.0.2.1:*", max_message_bytes=LIMIT, insecure=True)


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:*"])
def test_dialing_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot connect to"):
        Dialer(address, max_message_bytes=LIMIT)


def test_a_taken_port_is_named_and_can_be_taken_once_free(listener: Listener) -> None:
    with pytest.raises(ConfigError, match=listener.address + ".*another process listens there"):
        Listener(listener.address, max_message_bytes=LIMIT)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*another process"):
            Listener(f"tcp://127.0.0.1:{port}", max_message_bytes=LIMIT)
    Listener(f"tcp://127.0.0.1:{port}", max_message_bytes=LIMIT).close()


def test_wake_ends_a_wait_from_another_thread(listener: Listener) -> None:
    ended = threading.Event()

    def wait() -> None:
        assert listener.receive(60.0) is None
        ended.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not ended.wait(timeout=0.05)
    listener.wake()
    assert ended.wait(timeout=PATIENCE_S)
    waiting.join(timeout=PATIENCE_S)


def test_wakes_before_a_wait_end_that_wait_and_no_later_one(listener: Listener) -> None:
    for _ in range(100_000):  # far more than the pipe behind it holds
        listener.wake()
    assert listener.receive(60.0) is None
    with dialed(listener) as (dialer, _):
        assert dialer.send([b"after"], PATIENCE_S)
        received = listener.receive(PATIENCE_S)
        assert received is not None
        assert bytes(received[1][0]) == b"after"


def test_wake_after_close_does_nothing() -> None:
    made = Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT)
    made.close()
    made.wake()
    made.close()
    with Listener(made.address, max_message_bytes=LIMIT) as again:  # nothing of it holds the port
        assert again.address == made.address


def test_sending_to_a_vanished_or_unknown_peer_is_false(listener: Listener) -> None:
    assert not listener.send(b"nobody", [b"x"])
    with dialed(listener) as (_, peer):
        pass
    deadline = time.monotonic() + PATIENCE_S
    while listener.send(peer, [b"x"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sending_to_a_peer_that_does_not_read_is_false_at_last() -> None:
    frame = bytes(200_000)
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT, queue=4) as listener:
        dialer = Dialer(listener.address, max_message_bytes=LIMIT, queue=4)
        assert dialer.send([b"hello"], PATIENCE_S)
        received = listener.receive(PATIENCE_S)
        assert received is not None
        sent = 0
        while listener.send(received[0], [frame]):
            sent += 1
            assert sent < 10_000
        with dialed(listener) as (other, peer):  # the others do not notice
            assert listener.send(peer, [b"x"])
            assert other.receive(PATIENCE_S) is not None
        dialer.close()


def test_a_queue_whose_messages_were_read_is_not_full() -> None:
    """ZeroMQ by itself notices room late: it would refuse many of these."""
    with (
        Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT, queue=1) as listener,
        dialed(listener) as (dialer, peer),
    ):
        for _ in range(500):
            assert listener.send(peer, [b"x"])
            assert dialer.receive(PATIENCE_S) is not None


def test_a_dialer_with_nobody_there_reports_a_full_queue() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with Dialer(f"tcp://127.0.0.1:{closed.getsockname()[1]}", max_message_bytes=LIMIT, queue=3) as dialer:
            assert [dialer.send([b"x"], 0.01) for _ in range(4)] == [True, True, True, False]


def test_a_listener_that_starts_later_gets_what_was_sent(listener: Listener) -> None:
    address = listener.address
    listener.close()
    with Dialer(address, max_message_bytes=LIMIT) as dialer:
        assert dialer.send([b"early"], PATIENCE_S)
        with Listener(address, max_message_bytes=LIMIT) as later:
            received = later.receive(PATIENCE_S)
            assert received is not None
            assert bytes(received[1][0]) == b"early"


def test_who_reconnects_under_the_same_identity_takes_over(listener: Listener) -> None:
    with dialed(listener, b"me"), dialed(listener, b"me") as (second, peer):
        assert listener.send(peer, [b"to the second"])
        assert second.receive(PATIENCE_S) is not None


def test_an_oversize_frame_is_dropped_and_harms_nobody_else(listener: Listener) -> None:
    with dialed(listener) as (good, peer), dialed(listener) as (bad, _):
        assert bad.send([b"head", bytes(LIMIT + 1)], PATIENCE_S)
        assert good.send([bytes(LIMIT)], PATIENCE_S)
        received = listener.receive(PATIENCE_S)
        assert received is not None
        assert (received[0], received[1][0].nbytes) == (peer, LIMIT)
        assert listener.receive(0.1) is None
        assert listener.send(peer, [b"still here"])
        assert good.receive(PATIENCE_S) is not None


def test_frames_outlive_the_socket_and_large_ones_are_writable_views() -> None:
    listener = Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT)
    with Dialer(listener.address, max_message_bytes=LIMIT) as dialer:
        assert dialer.send([b"small", b"L" * ZERO_COPY_BYTES], PATIENCE_S)
        received = listener.receive(PATIENCE_S)
    listener.close()
    assert received is not None
    small, large = received[1]
    assert bytes(small) == b"small"
    assert bytes(large) == b"L" * ZERO_COPY_BYTES
    assert not large.readonly


@pytest.mark.parametrize("direction", ["to listener", "to dialer"])
def test_a_thousand_ragged_messages_arrive_equal_and_in_order(listener: Listener, direction: str) -> None:
    rng = random.Random(0)
    sizes = [0, 1, 254, 255, 256, 8191, 8192, 8193, ZERO_COPY_BYTES - 1, ZERO_COPY_BYTES, ZERO_COPY_BYTES + 1]
    messages = [[rng.randbytes(rng.choice(sizes)) for _ in range(rng.randint(1, 4))] for _ in range(1000)]
    with dialed(listener) as (dialer, peer):
        for first in range(0, len(messages), 50):  # below the bound of the queue
            for message in messages[first : first + 50]:
                assert dialer.send(message, PATIENCE_S) if direction == "to listener" else listener.send(peer, message)
            for message in messages[first : first + 50]:
                if direction == "to listener":
                    received = listener.receive(PATIENCE_S)
                    frames = received and received[1]
                else:
                    frames = dialer.receive(PATIENCE_S)
                assert frames is not None
                assert [bytes(frame) for frame in frames] == message


def test_closing_with_undelivered_messages_ends_soon() -> None:
    """In a process of its own: a wrong linger would hang for ever, here and at interpreter exit."""
    program = """
import socket
from dapo_async.transport.sockets import Dialer
with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    dialer = Dialer(f"tcp://127.0.0.1:{closed.getsockname()[1]}", max_message_bytes=1 << 20)
    assert all(dialer.send([b"head", bytes(200_000)], 1.0) for _ in range(5))
    dialer.close()
"""
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


def test_closing_delivers_what_was_just_sent(listener: Listener) -> None:
    """More than the buffers of a connection hold, so that some of it is still to be sent."""
    dialer = Dialer(listener.address, max_message_bytes=LIMIT)
    for _ in range(30):
        assert dialer.send([bytes(LIMIT // 2)], PATIENCE_S)
    dialer.close()
    for _ in range(30):
        assert listener.receive(PATIENCE_S) is not None


def test_the_contract_needs_no_torch() -> None:
    program = (
        "import sys, dapo_async.transport.sockets, dapo_async.transport.messages; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
