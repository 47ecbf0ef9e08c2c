"""The encrypted wire: who may connect to whom, what each side is told otherwise, and that nobody else can read it."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dapo_async.transport.curve import MAX_NAMED, DialerKeys, KeyPair, ListenerKeys, new_pair, public_of
from dapo_async.transport.sockets import Dialer, Listener

LIMIT = 1 << 24
PATIENCE_S = 30.0
LEARNER, WORKER, STRANGER = new_pair(), new_pair(), new_pair()
TEXT = b"the answer is forty-two" * 4


@contextlib.contextmanager
def listening(admitted: set[bytes] | None = None, pair: KeyPair = LEARNER) -> Iterator[Listener]:
    admitted = {WORKER.public} if admitted is None else admitted
    keys = ListenerKeys(pair, lambda key: key in admitted)
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT, keys=keys) as listener:
        yield listener


def dial(address: str, pair: KeyPair | None = WORKER, listener: bytes = LEARNER.public) -> Dialer:
    keys = None if pair is None else DialerKeys(pair, listener)
    return Dialer(address, max_message_bytes=LIMIT, keys=keys)


def until(listener: Listener, done: Callable[[], bool]) -> None:
    """Serve until ``done()``."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert listener.receive(0.02) is None  # nobody gets through meanwhile
        assert time.monotonic() < deadline


def final(dialer: Dialer) -> str:
    dialer.handshakes.look()
    return dialer.handshakes.final


def test_both_ways_with_large_frames() -> None:
    with listening() as listener, dial(listener.address) as dialer:
        frames = [b"small", b"", bytes(1 << 22)]
        assert dialer.send(frames, PATIENCE_S)
        received = listener.receive(PATIENCE_S)
        while received is None:  # woken by the newcomer's key
            received = listener.receive(PATIENCE_S)
        peer, got = received
        assert [bytes(frame) for frame in got] == frames
        assert listener.send(peer, frames[::-1])
        assert [bytes(frame) for frame in dialer.receive(PATIENCE_S) or []] == frames[::-1]
        assert (final(dialer), dialer.handshakes.dropped) == ("", 0)


def test_a_frame_may_be_as_large_as_without_encryption() -> None:
    """The bytes that encryption adds do not count: a tensor at the limit would else never arrive."""
    with listening() as listener, dial(listener.address) as dialer:
        dialer.send([bytes(LIMIT)], PATIENCE_S)
        while (received := listener.receive(PATIENCE_S)) is None:
            pass
        assert len(received[1][0]) == LIMIT
        assert listener.send(received[0], [bytes(LIMIT)])
        assert [len(frame) for frame in dialer.receive(PATIENCE_S) or []] == [LIMIT]


def test_who_is_not_on_the_list_is_told_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with listening() as listener:
        for _ in range(2):
            with dial(listener.address, STRANGER) as dialer:
                dialer.send([b"let me in"], PATIENCE_S)
                until(listener, lambda: final(dialer) != "")
                assert final(dialer) == "it does not know this worker's key"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"refused a connection from 127.0.0.1: its key {STRANGER.public.decode()} is on no list"]


def test_the_list_may_change_while_the_listener_lives() -> None:
    admitted = {WORKER.public}
    with listening(admitted) as listener:
        admitted.add(STRANGER.public)
        with dial(listener.address, STRANGER) as dialer:
            dialer.send([b"now"], PATIENCE_S)
            while (received := listener.receive(PATIENCE_S)) is None:
                pass
            assert bytes(received[1][0]) == b"now"
        admitted.remove(STRANGER.public)
        with dial(listener.address, STRANGER) as dialer:
            dialer.send([b"again"], PATIENCE_S)
            until(listener, lambda: final(dialer) == "it does not know this worker's key")


def test_a_worker_without_keys_does_not_get_in_and_is_told() -> None:
    with listening() as listener, dial(listener.address, None) as dialer:
        dialer.send([b"plain"], PATIENCE_S)
        until(listener, lambda: final(dialer) == "it encrypts, and this worker was given no keys")


def test_a_worker_with_keys_does_not_talk_to_a_learner_without() -> None:
    with (
        Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT) as listener,
        dial(listener.address) as dialer,
    ):
        dialer.send([b"secret"], PATIENCE_S)
        until(listener, lambda: final(dialer) == "it does not encrypt, and this worker was given keys")


def test_a_worker_talks_to_nobody_but_its_own_learner() -> None:
    with listening(pair=STRANGER) as listener, dial(listener.address) as dialer:
        dialer.send([b"secret"], PATIENCE_S)
        until(listener, lambda: bool(final(dialer)) or dialer.handshakes.dropped > 1)
        assert final(dialer) == ""


def test_a_worker_finds_a_learner_that_comes_later_and_one_that_comes_back() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    keys = ListenerKeys(LEARNER, {WORKER.public}.__contains__)
    with dial(address) as dialer:
        for life in (b"first", b"second"):
            with Listener(address, max_message_bytes=LIMIT, keys=keys) as listener:
                deadline = time.monotonic() + PATIENCE_S
                received = None
                while received is None or bytes(received[1][0]) != life:
                    dialer.send([life], PATIENCE_S)
                    received = listener.receive(0.2)
                    assert time.monotonic() < deadline


class Tap:
    """Passes bytes between a dialer and a listener, and keeps them."""

    def __init__(self, address: str) -> None:
        self.seen = bytearray()
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._ends: list[socket.socket] = [self._server]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        one, _ = self._server.accept()
        other = socket.create_connection(self._target)
        self._ends += [one, other]
        for pair in ((one, other), (other, one)):
            thread = threading.Thread(target=self._pass, args=pair)
            self._threads.append(thread)
            thread.start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)

    def close(self) -> None:
        for end in reversed(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in list(self._threads):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("encrypted", [False, True])
def test_who_listens_on_the_wire_reads_nothing(encrypted: bool) -> None:
    keys = ListenerKeys(LEARNER, {WORKER.public}.__contains__) if encrypted else None
    with Listener("tcp://127.0.0.1:*", max_message_bytes=LIMIT, keys=keys) as listener:
        tap = Tap(listener.address)
        try:
            with dial(tap.address, WORKER if encrypted else None) as dialer:
                dialer.send([TEXT], PATIENCE_S)
                while (received := listener.receive(PATIENCE_S)) is None:
                    pass
                assert bytes(received[1][0]) == TEXT
        finally:
            tap.close()
    assert (TEXT in tap.seen) == (not encrypted)
    assert len(tap.seen) > len(TEXT)


def test_the_log_cannot_be_filled_by_strangers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.transport.curve.MAX_NAMED", 2)
    assert MAX_NAMED == 100
    with listening(set()) as listener:
        for _ in range(4):
            with dial(listener.address, new_pair()) as dialer:
                dialer.send([b"me"], PATIENCE_S)
                until(listener, lambda: final(dialer) != "")
    assert sum("is on no list" in record.getMessage() for record in caplog.records) == 2


def test_a_public_key_is_that_of_its_secret() -> None:
    assert public_of(WORKER.secret) == WORKER.public
    with pytest.raises(ValueError, match="secret key"):
        public_of(b"x" * 39)
    with pytest.raises(ValueError, match="no secret key"):
        public_of(b"\xff" * 40)
