"""Shared sets: read in another process, never changed under a reader, and gone with the last process that has them."""

import errno
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch
from torch import Tensor

from dapo_async.errors import WeightsError
from dapo_async.transport.messages import WeightsShared
from dapo_async.weight_sync import buffers as buffers_module
from dapo_async.weight_sync import shared_memory
from dapo_async.weight_sync.buffers import MAX_BUFFERS, OLD_SETS, Buffer, Buffers
from dapo_async.weight_sync.encoding import digest_of, serving_tensors, tensor_infos
from dapo_async.weight_sync.shared_memory import SharedFile, SharedReader, Unreachable, available
from dapo_async.weight_sync.snapshot import Snapshot, fill

pytestmark = pytest.mark.skipif(not available(), reason="needs Linux")
LIFE_S = 60

# A learner: publishes one set of sixteen elements, says how to find it, and waits to be killed.
LEARNER = """
import sys, time, torch, msgspec
sys.path.insert(0, ".")
from tests.weight_sync.test_shared_memory import snapshot_of, message_of
snapshot = snapshot_of({"w": torch.arange(16.0)}, 3)
print(msgspec.json.encode(message_of(snapshot)).decode(), flush=True)
time.sleep(60)
"""


def snapshot_of(tensors: dict[str, Tensor], version: int, buffer: Buffer | None = None) -> Snapshot:
    infos = tensor_infos(tensors.items())
    if buffer is None:
        buffer = Buffers(shared=True).take(version, sum(-(-t.nbytes // 64) * 64 for t in tensors.values()), None)
    return fill(buffer, version, tensors, infos)


def message_of(snapshot: Snapshot) -> WeightsShared:
    file = snapshot.buffer.file
    assert file is not None
    return WeightsShared(
        version=snapshot.version,
        incarnation="life",
        digest=snapshot.digest,
        tensors=snapshot.infos,
        pid=file.pid,
        descriptor=file.descriptor,
        file=file.name,
        files=[file.name],
    )


@contextmanager
def learner() -> Iterator[tuple[subprocess.Popen[str], WeightsShared]]:
    process = subprocess.Popen([sys.executable, "-c", LEARNER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, msgspec.json.decode(process.stdout.readline(), type=WeightsShared)
    finally:
        process.kill()
        process.communicate(timeout=LIFE_S)


def test_a_set_of_another_process_outlives_it_and_leaves_nothing() -> None:
    reader = SharedReader()
    with learner() as (process, message):
        tensors = reader.read(message)
        assert tensors["w"].tolist() == list(range(16))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=LIFE_S)
    assert tensors["w"].tolist() == list(range(16))
    with pytest.raises(Unreachable, match="cannot open /proc/"):
        SharedReader().read(message)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dapo-async")]


def test_a_set_is_released_once_its_last_tensor_is_gone() -> None:
    reader = SharedReader()
    snapshot = snapshot_of({"a": torch.ones(3), "e": torch.empty(0, 2), "b": torch.ones(2, 2)}, 5)
    tensors = reader.read(message_of(snapshot))
    row = tensors["b"][0]
    del tensors
    assert (reader.has_released, reader.released()) == (False, [])
    del row
    assert (reader.has_released, reader.released(), reader.released()) == (True, [5], [])


# A worker that writes to what it reads: the processor ends it before the last line.
WRITER = """
import sys, torch
sys.path.insert(0, ".")
from tests.weight_sync.test_shared_memory import message_of, snapshot_of
from dapo_async.weight_sync.shared_memory import SharedReader
snapshot = snapshot_of({"w": torch.arange(4.0)}, 3)
tensor = SharedReader().read(message_of(snapshot))["w"]
print(tensor.tolist(), flush=True)
tensor.fill_(7.0)
print("written")
"""


def test_no_worker_can_write_to_a_set() -> None:
    done = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, timeout=LIFE_S, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "[0.0, 1.0, 2.0, 3.0]\n"), done.stderr


def test_a_mapping_is_used_again_and_shows_the_next_set() -> None:
    reader = SharedReader()
    snapshot = snapshot_of({"a": torch.ones(3)}, 5)
    first = reader.read(message_of(snapshot))
    again = snapshot_of({"a": torch.zeros(3)}, 6, snapshot.buffer)
    second = reader.read(message_of(again))
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["a"].tolist() == [0, 0, 0]


def test_a_file_that_holds_another_set_by_now_or_half_of_one_is_refused() -> None:
    reader = SharedReader()
    snapshot = snapshot_of({"a": torch.ones(3)}, 5)
    message = message_of(snapshot)
    assert reader.read(message)["a"].tolist() == [1, 1, 1]
    snapshot_of({"a": torch.zeros(3)}, 6, snapshot.buffer)
    with pytest.raises(WeightsError, match=f"does not hold version 5 with {snapshot.digest}"):
        reader.read(message)
    same = snapshot_of({"a": torch.ones(3)}, 7, snapshot.buffer)
    assert reader.read(message_of(same))["a"].tolist() == [1, 1, 1]
    assert same.buffer.file is not None
    same.buffer.file.open()  # the next set is about to be written to it
    with pytest.raises(WeightsError, match="does not hold version 7"):
        reader.read(message_of(same))


def test_a_set_whose_making_fails_is_never_read() -> None:
    snapshot = snapshot_of({"a": torch.ones(3)}, 5)
    with pytest.raises(WeightsError, match="changed its shape"):
        fill(snapshot.buffer, 6, {"a": torch.ones(2)}, snapshot.infos)
    with pytest.raises(WeightsError, match="does not hold version 5"):
        SharedReader().read(message_of(snapshot))


def test_the_file_cannot_be_cut_off_and_is_the_users_own() -> None:
    file = SharedFile(100)
    with pytest.raises(PermissionError):
        os.ftruncate(file.descriptor, 10)
    again = os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDWR)
    with pytest.raises(PermissionError):  # nor written to, but through the learner's own mapping
        os.pwrite(again, b"other", 0)
    os.close(again)
    assert os.fstat(file.descriptor).st_mode & 0o777 == 0o600
    assert len(file.name) > 32
    assert SharedFile(100).name != file.name
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def other_process(message: WeightsShared) -> None:
    message.pid = os.getppid()


def other_descriptor(message: WeightsShared) -> None:
    message.descriptor = 0


def other_name(message: WeightsShared) -> None:
    message.file = message.file[:-1] + "x"


def other_file(message: WeightsShared) -> None:
    message.file = message.file[:-2] + "00" if message.file[-2:] != "00" else message.file[:-2] + "11"


def larger(message: WeightsShared) -> None:
    message.tensors[0].shape = [100]


def nested(message: WeightsShared) -> None:
    message.tensors[0].shape = [3] + [1] * 20


def repeated(message: WeightsShared) -> None:
    message.tensors *= 2


def reshaped(message: WeightsShared) -> None:
    message.tensors[0].shape = [3, 1]


def forged(message: WeightsShared) -> None:
    message.digest += "0"


@pytest.mark.parametrize(
    ("tamper", "kind", "told"),
    [
        (other_process, Unreachable, "is another file here|cannot open"),
        (other_descriptor, Unreachable, "is another file here"),
        (other_file, Unreachable, "is another file here"),
        (other_name, WeightsError, "is no name of a shared file"),
        (larger, WeightsError, "version 5 has 448 bytes, its file has another size"),
        (nested, WeightsError, "more than 16 dimensions"),
        (repeated, WeightsError, "a comes 2 times"),
        (reshaped, WeightsError, "does not hold version 5"),
        (forged, WeightsError, "does not hold version 5"),
    ],
)
def test_what_does_not_agree_is_refused(
    tamper: Callable[[WeightsShared], None], kind: type[Exception], told: str
) -> None:
    reader = SharedReader()
    snapshot = snapshot_of({"a": torch.ones(3)}, 5)
    message = message_of(snapshot)
    tamper(message)
    with pytest.raises(kind, match=told):
        reader.read(message)
    assert reader.released() == [5]


# --- copies and their buffers ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_snapshot_is_the_rounded_model_bit_for_bit(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_async.weight_sync.encoding.PARALLEL_BYTES", 1 << 20)
    model = torch.nn.Sequential(torch.nn.Linear(700, 1100), torch.nn.LayerNorm(3))
    live = {**dict(model.named_parameters()), "turned": torch.randn(5, 7).T, "scalar": torch.tensor(2.5)}
    infos = tensor_infos(live.items(), dtype)
    snapshot = fill(Buffer(4 << 20, shared), 1, live, infos)
    expected = {name: tensor.detach().to(dtype).contiguous() for name, tensor in live.items()}
    frames = [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in expected.values()]
    assert [bytes(frame) for frame in snapshot.frames()] == frames
    assert snapshot.digest == digest_of(infos, frames)
    assert serving_tensors(model, dtype)["0.weight"].equal(expected["0.weight"])


def test_a_buffer_is_used_again_once_nobody_reads_it() -> None:
    buffers = Buffers(shared=True)
    first = buffers.take(0, 64, None)
    first.readers |= {"a", "b"}
    second = buffers.take(1, 64, first)
    assert second is not first
    buffers.release("a", [0])
    third = buffers.take(2, 64, second)
    assert third not in (first, second)
    buffers.release("b", [2, 1])  # of other versions
    assert first.readers == {"b"}
    buffers.release("b", [0])
    assert buffers.take(3, 64, third) is first
    assert buffers.dropped == 0
    buffers.release("a", [0])  # late: the buffer holds another version by now
    assert len(buffers.names) == MAX_BUFFERS


def test_a_buffer_that_is_not_given_back_is_dropped_and_never_written() -> None:
    """Its readers keep what they read: a stopped or dead worker never sees a set change."""
    buffers, reader = Buffers(shared=True), SharedReader()
    held, serving = None, None
    for version in range(MAX_BUFFERS + 3):
        serving = buffers.take(version, 64, serving)
        snapshot = snapshot_of({"a": torch.full((3,), float(version))}, version, serving)
        if version == 0:
            held = reader.read(message_of(snapshot))
        serving.readers.add("stopped")
        del snapshot
    assert held is not None
    assert held["a"].tolist() == [0, 0, 0]
    assert buffers.dropped == 3
    assert len(buffers.names) == MAX_BUFFERS


def test_what_a_dead_worker_reads_is_not_kept_for_ever_though_the_others_can_take_turns() -> None:
    buffers, serving = Buffers(shared=False), None
    for version in range(OLD_SETS + 3):
        serving = buffers.take(10 * version, 64, serving)  # not every version is published
        if version == 0:
            serving.readers.add("dead")
            dead = weakref.ref(serving)
        if version <= OLD_SETS:
            assert dead() in buffers._all
    assert dead() not in buffers._all
    assert (buffers.dropped, buffers.made) == (1, 3)


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_that_the_network_may_still_read_are_not_written(shared: bool) -> None:
    buffers = Buffers(shared)
    tensors = {"a": torch.arange(6.0), "none": torch.zeros(0), "b": torch.ones(3)}
    snapshot = snapshot_of(tensors, 0, buffers.take(0, 256, None))
    first = snapshot.buffer
    one, other = snapshot.lent_frames(), snapshot.lent_frames()
    assert [bytes(frame) for frame in one] == [bytes(frame) for frame in snapshot.frames()]
    assert buffers.take(1, 256, None) is not first
    del one
    assert buffers.take(2, 256, first) is not first
    last = other[2]
    del other
    assert len(first.readers) == 1  # one frame is still on its way
    del last
    assert not first.readers
    assert first in [buffers.take(version, 256, None) for version in (3, 4)]
    assert buffers.take(5, 512, None).num_bytes == 512


def test_a_worker_that_may_not_map_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of({"w": torch.arange(4.0)}, 3)

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", refuse)
    with pytest.raises(Unreachable, match=r"cannot map .*: Cannot allocate memory"):
        SharedReader().read(message_of(snapshot))


def test_a_learner_without_room_for_shared_memory_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(num_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(buffers_module, "SharedFile", refuse)
    buffers = Buffers(shared=True)
    with caplog.at_level("WARNING"):
        assert buffers.take(0, 64, None).file is None
    assert "weights travel over the network" in caplog.text
    assert not buffers.shared


def test_a_set_that_is_not_read_counts_as_released() -> None:
    reader = SharedReader()
    reader.let_go(7)
    assert reader.released() == [7]
