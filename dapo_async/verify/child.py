"""A child process that runs a function, from both ends: ``Child`` for its owner, ``main`` for itself.

Imports nothing of this package, because the child runs this file by path. Frames in both directions are a
little-endian length and that many bytes of msgpack, over a socket that the child gets as standard input: ``Load``,
answered by ``Loaded``; then ``Ask``, each answered by one ``Reply``. The child ends when its owner does. What the
function prints goes to standard error; it cannot reach requests or replies by accident.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec

MAX_PREDICTED = 500  # characters; the wire's bound on Completion.predicted
MAX_ERROR = 2000  # characters
MAX_REPLY_BYTES = 1 << 20
HEADER = struct.Struct("<I")
IDLE_S = 60.0  # after which a wait for the next request is renewed
END_TIMEOUT_S = 10.0
SLICE_S = 0.05  # how soon a wait of the owner notices that it is to close

logger = logging.getLogger(__name__)


class Load(msgspec.Struct):
    """The function to be loaded, and where to look for its module."""

    module: str
    function: str
    path: list[str]


class Loaded(msgspec.Struct):
    """``error`` is empty if the function is there."""

    error: str = ""


class Ask(msgspec.Struct):
    """One text to be judged."""

    text: str
    truth: str


class Reply(msgspec.Struct):
    """The verdict on one text; ``error`` is empty or says why there is none."""

    correct: bool = False
    predicted: str = ""
    error: str = ""


Response = TypeVar("Response", Reply, Loaded)
Done = TypeVar("Done")


def frame(message: msgspec.Struct) -> bytes:
    """``message`` as it travels."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


def clean(text: str, limit: int | None = None) -> str:
    """At most ``limit`` characters that UTF-8 can carry."""
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def describe(error: BaseException) -> str:
    """``Type: message``, or the type alone of an exception whose text cannot be had."""
    try:
        return clean(f"{type(error).__name__}: {error}", MAX_ERROR)
    except Exception:  # noqa: BLE001 - the user's __str__ is the user's code
        return type(error).__name__


# --- the owner's end -------------------------------------------------------------------------------------


class ChildGone(Exception):
    """The child ended, or sent what no child of ours sends. The message says how."""


class Closing(Exception):
    """The verifier is being closed."""


class Child:
    """One running child. All methods are for the thread that made it: the kernel ends the child with that thread."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -P keeps this package's folder off the child's module path.
                    [sys.executable, "-P", __file__, str(os.getpid())],
                    stdin=theirs.fileno(),
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # out of reach of Ctrl-C; kill() gets what the child started, too
                )
            except OSError as error:
                self._socket.close()
                raise ChildGone(f"found no process to run in: {error}") from None
        self.pid = self._process.pid

    def exchange(self, message: msgspec.Struct, kind: type[Response], timeout_s: float) -> Response:
        """Send ``message`` and wait for the answer. Raises ``TimeoutError``, ``ChildGone`` or ``Closing``."""
        deadline = time.monotonic() + timeout_s
        unsent = memoryview(frame(message))
        while unsent:
            unsent = unsent[self._wait(partial(self._socket.send, unsent), deadline) :]
        length = HEADER.unpack(self._receive(HEADER.size, deadline))[0]
        body = self._receive(min(length, MAX_REPLY_BYTES), deadline)
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.DecodeError:
            raise ChildGone("sent what is no reply") from None

    def kill(self) -> None:
        """End the child and the processes it started, and wait for its end."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._socket.close()
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.error("the verifier's process %d does not end after SIGKILL", self._process.pid)

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            chunk = self._wait(partial(self._socket.recv, num_bytes - len(received)), deadline)
            if not chunk:
                raise self._gone()
            received += chunk
        return bytes(received)

    def _wait(self, operation: Callable[[], Done], deadline: float) -> Done:
        """Repeat a socket operation in short slices until it succeeds."""
        while True:
            if self._closing.is_set():
                raise Closing
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(min(remaining, SLICE_S))
            try:
                return operation()
            except TimeoutError:
                if self._exit() is not None:  # its own children may hold the socket open
                    raise self._gone() from None
            except OSError:
                raise self._gone() from None

    def _exit(self) -> str | None:
        """How the process ended; None while it runs. It is not reaped, so that ``kill`` cannot hit a reused pid."""
        info = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if info is None:
            return None
        how = "with exit code" if info.si_code == os.CLD_EXITED else "by signal"
        return f"ended the process {how} {info.si_status}"

    def _gone(self) -> ChildGone:
        for _ in range(100):  # a closed connection precedes the end of its process
            if (how := self._exit()) is not None:
                return ChildGone(how)
            time.sleep(0.01)
        return ChildGone("closed its connection")


# --- the child's end -------------------------------------------------------------------------------------


def main() -> None:
    """Serve the owner until it hangs up."""
    own_pid = os.getpid()
    die_with_owner(int(sys.argv[1]))
    owner = take_over_descriptors()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    load = msgspec.msgpack.decode(receive(owner), type=Load)
    # Reading in a thread lets an end of the owner interrupt a function that never returns.
    threading.Thread(target=pump, args=(owner, requests), name="requests", daemon=True).start()
    function, problem = find_function(load)
    owner.sendall(frame(Loaded(clean(problem, MAX_ERROR))))
    while function is not None:
        try:
            request = msgspec.msgpack.decode(requests.get(timeout=IDLE_S), type=Ask)
        except queue.Empty:
            continue
        reply = frame(answer(function, request))
        if os.getpid() != own_pid:  # a copy that the function forked: one question, one answer
            os._exit(0)
        owner.sendall(reply)


def die_with_owner(owner_pid: int) -> None:
    """Have the kernel kill this process when its owner dies, however that happens (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != owner_pid:  # it died before the line above
        os._exit(0)


def take_over_descriptors() -> socket.socket:
    """Move the owner's socket out of reach of ``print`` and ``input``."""
    owner = socket.socket(fileno=os.dup(0))
    owner.setblocking(True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # no standard error
        os.dup2(null, 1)
    os.close(null)
    return owner


def receive(owner: socket.socket) -> bytes:
    """The next frame's body. Waits without a deadline: the owner's end is noticed, and is the end of this process."""
    received = bytearray()
    expected = HEADER.size
    while len(received) < expected:
        try:
            chunk = owner.recv(min(expected - len(received), 1 << 20))
        except ConnectionError:
            chunk = b""
        if not chunk:
            os._exit(0)
        received += chunk
        if len(received) == HEADER.size:
            expected += HEADER.unpack(received)[0]
    return bytes(received[HEADER.size :])


def pump(owner: socket.socket, requests: "queue.SimpleQueue[bytes]") -> None:
    """Body of the reading thread."""
    while True:
        requests.put(receive(owner))


def find_function(load: Load) -> tuple[Callable[[str, str], Any] | None, str]:
    """The user's function and an empty string, or None and one sentence on why it cannot be had."""
    sys.path[:] = load.path
    try:
        module = importlib.import_module(load.module)
        function = getattr(module, load.function, None)
    except BaseException as error:  # noqa: BLE001 - the user's module may raise anything, SystemExit included
        if isinstance(error, ModuleNotFoundError) and f"{load.module}.".startswith(f"{error.name}."):
            return None, f'there is no module "{error.name}" in {", ".join(load.path)}'
        return None, f'importing module "{load.module}" failed with {describe(error)}'
    if not callable(function):
        where = getattr(module, "__file__", None) or "which has no file"
        return None, f'module "{load.module}" ({where}) has no function "{load.function}"'
    return function, ""


def answer(function: Callable[[str, str], Any], request: Ask) -> Reply:
    """Call the user's function; whatever it raises or returns becomes an answer."""
    try:
        correct, predicted = interpret(function(request.text, request.truth))
    except BaseException as error:  # noqa: BLE001 - the user's function may raise anything, SystemExit included
        return Reply(error=describe(error))
    return Reply(correct=correct, predicted=clean(predicted, MAX_PREDICTED))


def interpret(result: Any) -> tuple[bool, str]:
    """``(correct, predicted)`` of what the function returned; raises ``TypeError`` if it is no verdict."""
    value, predicted = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        value = value.item()  # a NumPy or torch scalar; what is none stays as it is
    if not (isinstance(value, bool | int | float) and value in (0, 1) and isinstance(predicted, str)):
        raise TypeError(
            f"returned {clean(repr(result), 200)}: answers are right or wrong, and there are no graded rewards; "
            "a verifier returns a bool, 1 or 0, or (bool, str)"
        )
    return bool(value), predicted


if __name__ == "__main__":
    main()
