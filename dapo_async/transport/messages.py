"""What workers and learner say to each other, and the check that every message passes when it is decoded.

A message is one msgpack map (frame 0, tagged with its type and the protocol version) followed by one frame
per array: raw little-endian ``int32`` or ``float32``, never copied. Nothing here opens a socket, and nothing
is ever unpickled. Facts travel, judgements stay: a group says what was sampled and what the verifier said;
shaping, advantages and staleness are the learner's business.
"""

from collections.abc import Sequence
from typing import Annotated as A
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from dapo_async.errors import ProtocolError

PROTOCOL = 6

Count = A[int, Meta(ge=0, lt=2**53)]
Kind = Literal["train", "eval"]
Key = tuple[Kind, Count]  # what a lease and its group are filed under: (kind, number)
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"  # may stand in one line of a log
Name = A[str, Meta(min_length=1, max_length=200, pattern=PRINTABLE)]
Word = A[str, Meta(max_length=255, pattern=PRINTABLE)]
Sentence = A[str, Meta(max_length=2000)]  # for people; ``printable`` before it is shown
Seconds = A[float, Meta(ge=0, le=1e9)]
DTYPES = {"<i4": np.dtype("<i4"), "<f4": np.dtype("<f4")}


class Message(Struct, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every message."""

    protocol: int = PROTOCOL


# --- worker to learner, control socket -------------------------------------------------------------------


WorkerPhase = Literal["decode", "prefill", "verify", "swap", "idle", "other"]
WORKER_PHASES: tuple[WorkerPhase, ...] = get_args(WorkerPhase)


class Hello(Message, tag="hello", kw_only=True):
    """A worker introduces itself, at start and whenever the learner does not know it."""

    worker: Name
    pid: Count
    host: Word
    engine: Word
    capacity: A[int, Meta(ge=0, le=10**6, description="groups it will hold at the same time; 0: not ready yet")]
    version: A[int, Meta(ge=-1, description="weights it serves; -1: none yet")]
    incarnation: A[Word, Meta(description="learner it last worked for; empty: none")] = ""
    holding: A[list[Count], Meta(description="leases it still works on or could not deliver yet")] = field(
        default_factory=list
    )
    proof: A[Word, Meta(description="of a worker that the learner started itself: what only it was told")] = ""


class DecodeSums(Struct, kw_only=True, forbid_unknown_fields=True):
    """Sums over decode steps, from which their time as a function of the completions in them can be fitted."""

    steps: Count = 0
    rows: Count = 0  # completions that got a token in a step
    rows_squared: Count = 0
    seconds: Seconds = 0.0
    rows_seconds: A[float, Meta(ge=0, le=1e18)] = 0.0  # of the product of the two

    def __post_init__(self) -> None:
        if not self.steps and (self.rows or self.rows_squared or self.seconds or self.rows_seconds):
            raise ValueError("decode sums of no steps must all be 0")

    def add(self, rows: int, seconds: float) -> None:
        """One more step, of ``rows`` completions."""
        self.steps += 1
        self.rows += rows
        self.rows_squared += rows * rows
        self.seconds += seconds
        self.rows_seconds += rows * seconds


class Beat(Message, tag="beat", kw_only=True):
    """A worker is alive. Sent every ``heartbeat_s``, and at once after a weight swap. Totals since its start."""

    version: A[int, Meta(ge=-1)]
    running: A[Count, Meta(description="completions being decoded now")]
    holding: A[list[Key], Meta(description="leases it still works on or could not deliver yet")]
    refused_weights: Count = 0
    refusal: A[
        Word, Meta(description="why the newest weights that came do not serve; empty: they do, or none came")
    ] = ""
    seconds: A[dict[WorkerPhase, Seconds], Meta(description="wall time by phase")] = field(default_factory=dict)
    decode: DecodeSums = field(default_factory=DecodeSums)


class Completion(Struct, kw_only=True, forbid_unknown_fields=True):
    """One answer. Its tokens and log-probs are its slice of the group's arrays."""

    num_tokens: A[int, Meta(ge=1, le=10**8, description="stop token included")]
    spans: A[list[tuple[Count, A[int, Meta(ge=1)]]], Meta(min_length=1, description="(version, num_tokens) in order")]
    finish: Literal["stop", "length"]
    correct: bool
    verdict: Literal["ok", "error", "timeout"] = "ok"
    predicted: A[str, Meta(max_length=500, description="the answer the verifier saw")] = ""
    second: A[
        Literal["", "right", "wrong", "error", "timeout"],
        Meta(description="what reward.compare_with says; never part of a reward"),
    ] = ""


class Group(Message, tag="group", kw_only=True):
    """All completions of one lease. ``logprobs`` are nats, of the distribution each token was sampled from."""

    lease: Count
    kind: Kind = "train"
    incarnation: Word
    completions: A[list[Completion], Meta(min_length=1, max_length=100_000)]
    token_ids: np.ndarray  # int32 [sum of num_tokens]
    logprobs: np.ndarray  # float32 [sum of num_tokens]


class Released(Message, tag="released", kw_only=True):
    """A worker is ending and gives back all leases that it holds."""

    reason: Sentence


# --- learner to worker, control socket -------------------------------------------------------------------


class Welcome(Message, tag="welcome", kw_only=True):
    """The learner's answer to ``Hello``: everything a worker needs, so that it can be started with an address only."""

    incarnation: A[str, Meta(min_length=1, description="changes whenever the learner process starts anew")]
    weights_address: str
    config: A[dict[str, Any], Meta(description="the resolved configuration")]


class Lease(Message, tag="lease", kw_only=True):
    """The right and duty to answer one prompt ``num_samples`` times."""

    lease: Count
    kind: Kind = "train"
    incarnation: Word
    truth: str
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    num_samples: A[int, Meta(ge=1, le=100_000)]
    seed: A[int, Meta(ge=0, le=2**63 - 1, description="completion i samples with (seed, i)")]
    min_version: A[
        Count, Meta(description="sample no token with older weights; for an evaluation, nor with newer ones")
    ]
    max_tokens: A[int, Meta(ge=1)]
    temperature: A[float, Meta(gt=0)]
    top_p: A[float, Meta(gt=0, le=1)] = 1.0


AckOutcome = Literal["accepted", "filtered_all_right", "filtered_all_wrong", "duplicate", "refused"]


class Ack(Message, tag="ack", kw_only=True):
    """The learner has taken charge of a group, or will never want it: the worker may forget it."""

    lease: Count
    kind: Kind = "train"
    outcome: AckOutcome
    detail: str = ""


class Cancel(Message, tag="cancel", kw_only=True):
    """Stop working on these leases; nobody waits for them any more."""

    leases: list[Count]
    kind: Kind = "train"


PROOF = "DAPO_ASYNC_PROOF"  # environment of the workers that a learner starts itself: what ``Hello.proof`` must say
NAME_TAKEN = "name_taken"  # the one refusal that ends a worker: of a Hello, as another one of its name is connected


class Refused(Message, tag="refused", kw_only=True):
    """A message could not be accepted. The connection stays."""

    reason: str
    detail: str


class Reintroduce(Message, tag="reintroduce", kw_only=True):
    """The learner does not know the sender: say ``Hello`` again."""


class LearnerBeat(Message, tag="learner_beat", kw_only=True):
    """The learner is alive. Sent every ``heartbeat_s``."""


class Stop(Message, tag="stop", kw_only=True):
    """End now; the run is over."""

    reason: str


# --- weights socket --------------------------------------------------------------------------------------


class WeightsRequest(Message, tag="weights_request", kw_only=True):
    """A worker asks for the newest weights; answered as soon as there are some newer than ``have``."""

    worker: Name
    reader: A[Name, Meta(description="this process and no other, whatever its name and connection")]
    incarnation: Word
    have: A[int, Meta(ge=-1)]
    base: A[int, Meta(ge=-1, description="set whose bits it keeps to apply a delta to; -1: none")] = -1
    unshared: A[
        str, Meta(max_length=500, description="why it cannot read the learner's shared memory; empty: let it try")
    ] = ""


class WeightsReleased(Message, tag="weights_released", kw_only=True):
    """A worker no longer reads these shared sets. Not answered."""

    reader: Name
    versions: A[list[Count], Meta(max_length=1000)]


class TensorInfo(Struct, kw_only=True, forbid_unknown_fields=True):
    """One tensor of a weights message: its bytes are the frame of the same index."""

    name: Name
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: list[Count]


class WeightsPush(Message, tag="weights", kw_only=True):
    """A whole set of weights. Frame ``i + 1`` holds the bytes of ``tensors[i]``, C order, little endian."""

    version: Count
    incarnation: Word
    digest: A[str, Meta(min_length=1, max_length=200)]
    tensors: list[TensorInfo]


class TensorDelta(Struct, kw_only=True, forbid_unknown_fields=True):
    """What changed in one tensor: its share of the gaps and of the values of a step (see ``delta``)."""

    tensor: A[Count, Meta(description="its place in the set")]
    changed: A[int, Meta(ge=1, lt=2**53, description="elements")]
    gaps: A[int, Meta(ge=1, lt=2**53, description="gaps and escapes")]
    gap_bytes: Literal[1, 2]
    value_bytes: Literal[2, 4]


class WeightsDelta(Message, tag="weights_delta", kw_only=True):
    """The steps from set ``base`` to ``version``. Frames 2i + 1 and 2i + 2 hold gaps and values of step i."""

    version: Count
    base: Count
    incarnation: Word
    digest: A[str, Meta(min_length=1, max_length=200, description="of the whole set that results")]
    steps: A[list[list[TensorDelta]], Meta(min_length=1, max_length=100)]


class WeightsShared(Message, tag="weights_shared", kw_only=True):
    """A whole set of weights in memory of the learner's host; the worker maps it (see ``shared_memory``)."""

    version: Count
    incarnation: Word
    digest: A[str, Meta(min_length=1, max_length=200)]
    tensors: list[TensorInfo]
    pid: A[Count, Meta(description="of the process that holds the file open")]
    descriptor: Count
    file: A[Name, Meta(description="the file's name, which nobody can guess")]
    files: A[list[Name], Meta(max_length=100, description="files in use; mappings of others can be dropped")]


class WeightsUnchanged(Message, tag="weights_unchanged", kw_only=True):
    """Nothing newer yet. Sent every ``heartbeat_s`` to a request, which stays open, so that silence means trouble."""


FROM_WORKER = Hello | Beat | Group | Released
FROM_LEARNER = Welcome | Lease | Ack | Cancel | Refused | Reintroduce | LearnerBeat | Stop
ON_WEIGHTS = WeightsRequest | WeightsReleased | WeightsPush | WeightsDelta | WeightsShared | WeightsUnchanged | Refused
RAW_FRAMES = WeightsPush | WeightsDelta  # what their frames hold, ``weight_sync`` checks

Frame = bytes | bytearray | memoryview

# What decoding bytes that are no message can raise; RecursionError is for nesting made to exhaust the stack.
UNDECODABLE = (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError)
MAX_DETAIL = 500  # characters of a refusal, some of which a peer may choose


class Codec:
    """Encodes and decodes the messages of one direction. Not thread-safe; one per socket."""

    def __init__(self, messages: Any) -> None:
        self._arrays: list[Frame] = []  # of the message being encoded
        self._frames: Sequence[Frame] = ()  # of the message being decoded
        self._used: set[int] = set()  # those it refers to
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._put_array)
        self._decoder = msgspec.msgpack.Decoder(messages, dec_hook=self._get_array)
        self._peek = msgspec.msgpack.Decoder(dict[str, Any])

    def encode(self, message: Message) -> list[Frame]:
        """Frames of ``message``; arrays are not copied, so they must not change until sent."""
        self._arrays = []
        head = self._encoder.encode(message)
        arrays, self._arrays = self._arrays, []
        return [head, *arrays]

    def decode(self, frames: Sequence[Frame]) -> Any:
        """The checked message in ``frames``; its arrays are read-only views of them.

        Raises ``ProtocolError`` with reason ``empty``, ``protocol`` (another version) or ``malformed``.
        """
        if not frames:
            raise ProtocolError("empty", "a message needs at least one frame")
        self._frames, self._used = frames, set()
        try:
            message = self._decoder.decode(frames[0])
        except UNDECODABLE as error:
            raise self._explain(frames[0], error) from None
        finally:
            self._frames = ()
        if message.protocol != PROTOCOL:
            raise _other_protocol(message.protocol)
        if len(self._used) != len(frames) - 1 and not isinstance(message, RAW_FRAMES):
            raise ProtocolError("malformed", f"{len(frames) - 1} array frames came, the message has {len(self._used)}")
        if isinstance(message, Group):
            try:
                check_group(message)
            except ProtocolError as error:
                error.key = (message.kind, message.lease)
                raise
        if isinstance(message, Lease):
            check_lease(message)
        return message

    def _explain(self, head: Frame, error: Exception) -> ProtocolError:
        try:
            fields = self._peek.decode(head)
        except UNDECODABLE:
            fields = {"protocol": PROTOCOL}
        if fields.get("protocol") != PROTOCOL:
            return _other_protocol(fields.get("protocol"))
        return ProtocolError("malformed", str(error)[:MAX_DETAIL], _claimed_key(fields))

    def _put_array(self, array: Any) -> dict[str, Any]:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"cannot send a {type(array).__name__}")
        array = np.ascontiguousarray(array)
        dtype = array.dtype.newbyteorder("<").str
        if dtype not in DTYPES or array.ndim != 1:
            raise TypeError(f"arrays must be one-dimensional int32 or float32, got {array.ndim}-d {array.dtype}")
        self._arrays.append(array.astype(dtype, copy=False).data)
        return {"frame": len(self._arrays), "dtype": dtype}

    def _get_array(self, kind: type, value: Any) -> np.ndarray:
        if kind is not np.ndarray or not isinstance(value, dict) or set(value) != {"frame", "dtype"}:
            raise ValueError("expected an array reference with frame and dtype")
        index, dtype = value["frame"], DTYPES.get(value["dtype"])
        if dtype is None or type(index) is not int or not 1 <= index < len(self._frames) or index in self._used:
            raise ValueError(f"array frame {index} of type {value['dtype']} does not exist or is used twice")
        if memoryview(self._frames[index]).nbytes % dtype.itemsize:
            raise ValueError(f"array frame {index} is truncated")
        self._used.add(index)
        array = np.frombuffer(self._frames[index], dtype=dtype)
        array.flags.writeable = False
        return array


def _claimed_key(fields: dict[str, Any]) -> Key | None:
    """Which lease a group that could not be decoded claims to answer."""
    kind, lease = fields.get("kind", "train"), fields.get("lease")
    if fields.get("type") == "group" and kind in get_args(Kind) and type(lease) is int and 0 <= lease < 2**53:
        return kind, lease
    return None


def check_group(group: Group) -> None:
    """Check what a group claims about itself; what it claims about the learner is checked by the coordinator.

    Raises ``ProtocolError``: ``lengths``, ``spans``, ``logprobs`` or ``tokens``.
    """
    total = sum(c.num_tokens for c in group.completions)
    if group.token_ids.dtype != DTYPES["<i4"] or group.logprobs.dtype != DTYPES["<f4"]:
        raise ProtocolError("malformed", "token_ids must be int32 and logprobs float32")
    if len(group.token_ids) != total or len(group.logprobs) != total:
        got = f"{len(group.token_ids)} ids and {len(group.logprobs)} log-probs"
        raise ProtocolError("lengths", f"completions hold {total} tokens, got {got}")
    for completion in group.completions:
        versions = [version for version, _ in completion.spans]
        if sum(tokens for _, tokens in completion.spans) != completion.num_tokens or versions != sorted(set(versions)):
            got = str(completion.spans)[:MAX_DETAIL]
            raise ProtocolError("spans", f"versions must rise and tokens sum to {completion.num_tokens}, got {got}")
    # min and max let NaN through as NaN, and NaN fails both comparisons.
    if not (float(group.logprobs.min()) >= -np.finfo(np.float32).max and float(group.logprobs.max()) <= 1e-4):
        raise ProtocolError("logprobs", "log-probs must be finite and not above 0")
    if int(group.token_ids.min()) < 0:
        raise ProtocolError("tokens", "token ids must not be negative")


def check_lease(lease: Lease) -> None:
    """Check the prompt of a lease. Raises ``ProtocolError``: ``malformed`` or ``tokens``."""
    if lease.prompt_ids.dtype != DTYPES["<i4"]:
        raise ProtocolError("malformed", "prompt_ids must be int32")
    if not len(lease.prompt_ids) or int(lease.prompt_ids.min()) < 0:
        raise ProtocolError("tokens", "a prompt needs at least one token id, and none may be negative")


def _other_protocol(protocol: Any) -> ProtocolError:
    return ProtocolError("protocol", f"this side speaks protocol {PROTOCOL}, the message says {str(protocol)[:20]}")
