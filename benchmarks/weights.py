"""What a push of weights costs: bytes and seconds as a whole set, as a delta and in shared memory, beside one memcpy.

    python -m benchmarks.weights --out FILE [--shapes 0.5 1.5 7] [--repeats 5] [--max-millions 800]

Tensors are synthetic: N(0, 0.02) in float32 at the shapes of Qwen2.5 (0.5B, 1.5B, 7B), served in bfloat16. Of a model
larger than ``--max-millions`` parameters the embedding and as many layers as fit are used; the result says how many.

Between two pushes every float32 master moves by lr x r, as AdamW moves it (weight decay 0), with lr = 1e-6:
  noise   r = m / sqrt(v) of a stationary AdamW (0.9, 0.999) whose gradients are noise without a mean, hence normal with
          standard deviation sqrt((1 - 0.9) / (1 + 0.9)) = 0.229. Gradients of RL are nearly that. The target is for it.
  first   r = +1 or -1: AdamW's very first step, and the most it can do. The worst case for a delta.

Parts are timed in one process, in turn, best and spread over the repeats: a memcpy of the served set into memory that
was touched before (one thread, and the publisher's threads); the publisher's copy and digest (``snapshot.fill``) into
private and into shared memory, from float32 and from a set that is in bfloat16 already; mapping in a worker, which
compares the set's stamp and reads nothing else of it; making a delta, and applying it in place, verified. A push is
then timed whole, with a real worker process over loopback, from ``publish`` until the worker holds the verified set.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.origin import origin, write_result
from dapo_async.config.settings import WeightsWay
from dapo_async.transport.messages import ON_WEIGHTS, Codec, WeightsDelta, WeightsShared
from dapo_async.weight_sync.buffers import Buffer
from dapo_async.weight_sync.delta import apply_delta, make_delta
from dapo_async.weight_sync.encoding import CHUNK_BYTES, bytes_of, digest_piece, in_parallel, offsets_of, tensor_infos
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.push import make_offer
from dapo_async.weight_sync.shared_memory import SharedReader
from dapo_async.weight_sync.snapshot import Snapshot, fill
from dapo_async.weight_sync.subscriber import Subscriber

LR, STD = 1e-6, 0.02
NOISE = math.sqrt((1 - 0.9) / (1 + 0.9))
PATIENCE_S = 300.0
LIMIT = 2 << 30
SEED = 0
WAYS: tuple[WeightsWay, ...] = ("full", "delta", "shm")
Set = dict[str, Tensor]


class Shape(NamedTuple):
    """A model of the Qwen2.5 family."""

    layers: int
    hidden: int
    mlp: int
    kv: int  # key-value heads x head size
    vocab: int
    tied: bool


SHAPES = {
    "0.5": Shape(24, 896, 4864, 128, 151936, True),
    "1.5": Shape(28, 1536, 8960, 256, 151936, True),
    "7": Shape(28, 3584, 18944, 512, 152064, False),
}


def layout(shape: Shape) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Layer (-1: none), name and shape of each tensor, in the order of a checkpoint."""
    hidden, kv = shape.hidden, shape.kv
    yield -1, "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        parts = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (shape.mlp, hidden),
            "mlp.up_proj.weight": (shape.mlp, hidden),
            "mlp.down_proj.weight": (hidden, shape.mlp),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        yield from ((layer, f"model.layers.{layer}.{name}", size) for name, size in parts.items())
    yield shape.layers, "model.norm.weight", (hidden,)
    if not shape.tied:
        yield shape.layers + 1, "lm_head.weight", (shape.vocab, hidden)


def masters_of(shape: Shape, max_parameters: int) -> tuple[Set, dict[str, int]]:
    """float32 masters of as much of the model as fits, and how much that is."""
    tensors = list(layout(shape))
    total = sum(math.prod(size) for _, _, size in tensors)
    embedding = math.prod(tensors[0][2])
    one_layer = sum(math.prod(size) for layer, _, size in tensors if layer == 0)
    layers = shape.layers if total <= max_parameters else max(1, (max_parameters - embedding) // one_layer)
    used = [(name, size) for layer, name, size in tensors if layer < layers or total <= max_parameters]
    generator = torch.Generator().manual_seed(SEED)
    masters = {name: torch.randn(size, generator=generator).mul_(STD) for name, size in used}
    measured = sum(tensor.numel() for tensor in masters.values())
    return masters, {
        "parameters": total,
        "measured_parameters": measured,
        "layers": shape.layers,
        "measured_layers": layers,
    }


def step(masters: Set, kind: str, generator: torch.Generator) -> None:
    """Move every master as AdamW does; see the module."""
    for tensor in masters.values():
        for piece in tensor.view(-1).split(1 << 24):
            r = torch.randn(piece.shape, generator=generator)
            piece.add_(r.mul_(NOISE) if kind == "noise" else r.sign_(), alpha=LR)


class Timer:
    """Wall and processor seconds of parts that are run in turn."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.setdefault(part, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(part, []).append(time.process_time() - cpu)

    def results(self) -> dict[str, dict[str, float]]:
        return {
            part: spread(times) | {"cpu_median": statistics.median(self.cpu[part])} for part, times in self.wall.items()
        }


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def copy_pieces(source: Tensor, target: Tensor) -> Callable[[], object]:
    """A plain copy by as many threads as the publisher has."""
    pairs = list(zip(source.split(CHUNK_BYTES), target.split(CHUNK_BYTES), strict=True))

    def copy(pair: tuple[Tensor, Tensor]) -> bytes:
        pair[1].copy_(pair[0])
        return b""

    return lambda: in_parallel(copy, pairs, source.numel())


def parts_of_a_push(masters: Set, repeats: int) -> dict[str, Any]:
    """Every part in turn, ``repeats`` times; one round before them touches all memory."""
    timer, generator, reader = Timer(), torch.Generator().manual_seed(SEED + 1), SharedReader()
    infos = tensor_infos(masters.items(), torch.bfloat16)
    _, num_bytes = offsets_of(infos)
    private, shared = [Buffer(num_bytes, False) for _ in range(2)], Buffer(num_bytes, True)
    deltas: dict[str, list[dict[str, float]]] = {"noise": [], "first": []}
    old = fill(private[0], 0, masters, infos)
    for version in range(1, repeats + 2):
        if version == 2:
            timer, deltas = Timer(), {"noise": [], "first": []}
        kind = ("noise", "first")[version % 2]
        for kind in ("noise", "first"):
            step(masters, kind, generator)
            target = private[1] if old.buffer is private[0] else private[0]
            with timer.of("copy_and_digest"):
                new = fill(target, version, masters, infos)
            deltas[kind].append(one_delta(old, new, timer, kind))
            old = new
        spare = private[1] if old.buffer is private[0] else private[0]
        with timer.of("memcpy"):
            spare.whole.copy_(old.buffer.whole)
        with timer.of("memcpy_same_threads"):
            copy_pieces(old.buffer.whole, spare.whole)()
        with timer.of("shm_copy_and_digest"):
            snapshot = fill(shared, version, masters, infos)
        map_it(reader, snapshot, timer, "shm_map")
        served = dict(zip((i.name for i in infos), views(old), strict=True))
        with timer.of("shm_copy_and_digest_bfloat16"):
            snapshot = fill(shared, version, served, infos)
        map_it(SharedReader(), snapshot, timer, "shm_map_anew")
        with timer.of("digest"):
            in_parallel(digest_piece, [bytes_of(p) for p in old.buffer.whole.split(CHUNK_BYTES)], num_bytes)
    return {"seconds": timer.results(), "deltas": {kind: medians(found) for kind, found in deltas.items()}}


def views(snapshot: Snapshot) -> list[Tensor]:
    return [
        torch.frombuffer(frame, dtype=torch.bfloat16).reshape(info.shape)
        for frame, info in zip(snapshot.frames(), snapshot.infos, strict=True)
    ]


def map_it(reader: SharedReader, snapshot: Snapshot, timer: Timer, part: str) -> None:
    offer = make_offer(snapshot, "life", (), [snapshot.buffer.file.name if snapshot.buffer.file else ""])
    message = Codec(ON_WEIGHTS).decode(offer.shared)
    assert isinstance(message, WeightsShared)
    with timer.of(part):
        reader.read(message)


def one_delta(old: Snapshot, new: Snapshot, timer: Timer, kind: str) -> dict[str, float]:
    """Make and apply one, verified; its size."""
    with timer.of(f"delta_make_{kind}"):
        delta = make_delta(0, 1, new.infos, old.frames(), new.frames())
    message = WeightsDelta(version=1, base=0, incarnation="", digest=new.digest, steps=[delta.parts])
    base = dict(zip((info.name for info in old.infos), views(old), strict=True))
    with timer.of(f"delta_apply_and_verify_{kind}"):
        apply_delta(message, [delta.gaps, delta.values], new.infos, base, unread=set(base))
    changed = sum(part.changed for part in delta.parts)
    elements = sum(tensor.numel() for tensor in base.values())
    return {
        "changed_share": changed / elements,
        "bytes": delta.num_bytes,
        "bytes_share": delta.num_bytes / new.num_bytes,
        "bytes_per_change": delta.num_bytes / max(1, changed),
    }


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


# --- whole pushes ----------------------------------------------------------------------------------------


def worker(address: str) -> None:
    """A worker process: says each version once it is verified, and lets go of it."""
    torch.set_num_threads(1)
    subscriber = Subscriber(address, worker="w", incarnation="life", max_message_bytes=LIMIT, heartbeat_s=0.2)
    while True:
        version, tensors = subscriber.wait_first(PATIENCE_S)
        del tensors
        print(version, flush=True)


def whole_pushes(masters: Set, way: WeightsWay, repeats: int) -> dict[str, Any]:
    """Seconds from ``publish`` to a verified set in a worker, and what the learner's thread loses of them.

    Blocked: in ``publish``, and in ``wait_copied`` after a pause as long as the copy has just taken, which stands for
    forward and backward passes; these take longer than one copy of the weights. ``blocked_at_once`` has no pause.
    """
    generator = torch.Generator().manual_seed(SEED + 2)
    publisher = Publisher("tcp://127.0.0.1:*", incarnation="life", max_message_bytes=LIMIT, heartbeat_s=0.2, way=way)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.weights", "--worker", publisher.address], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    seconds, blocked, at_once, sent = [], [], [], []
    try:
        for version in range(2 * repeats + 4):
            step(masters, "noise", generator)
            before = publisher.counts
            started = time.perf_counter()
            publisher.publish(version, masters, torch.bfloat16)
            pauses = version % 2 == 0
            if pauses:
                time.sleep(1.5 * before.copy_s / max(1, before.published))
            publisher.wait_copied(PATIENCE_S)
            if int(child.stdout.readline()) != version:
                raise RuntimeError("the worker skipped a version")
            took = time.perf_counter() - started
            after = publisher.counts
            if version >= 4:  # by then every buffer has been touched
                seconds.append(took)
                sent.append(after.sent_bytes - before.sent_bytes)
                (blocked if pauses else at_once).append(after.blocked_s - before.blocked_s)
            time.sleep(0.3)  # the worker lets go
        return {
            "seconds": spread(seconds),
            "sent_bytes": statistics.median(sent),
            "blocked_s": spread(blocked),
            "blocked_share": statistics.median(blocked) / statistics.median(seconds),
            "blocked_at_once_s": spread(at_once),
            "blocked_at_once_share": statistics.median(at_once) / statistics.median(seconds),
            "pushes": {"full": after.full, "delta": after.delta, "shm": after.shm},
        }
    finally:
        child.kill()
        child.communicate(timeout=PATIENCE_S)
        publisher.close()


def measure(name: str, max_parameters: int, repeats: int) -> dict[str, Any]:
    masters, measured = masters_of(SHAPES[name], max_parameters)
    set_bytes = 2 * measured["measured_parameters"]
    parts = parts_of_a_push(masters, repeats)
    seconds = {part: times["median"] for part, times in parts["seconds"].items()}
    shm = seconds["shm_copy_and_digest"] + seconds["shm_map"]
    same = seconds["shm_copy_and_digest_bfloat16"] + seconds["shm_map"]
    pushes = {way: whole_pushes(masters, way, repeats) for way in WAYS}
    return {
        **measured,
        "set_bytes": set_bytes,
        **parts,
        "pushes": pushes,
        "shm_over_memcpy": shm / seconds["memcpy"],
        "shm_over_memcpy_same_threads": shm / seconds["memcpy_same_threads"],
        "shm_over_memcpy_if_already_bfloat16": same / seconds["memcpy"],
        "shm_over_memcpy_same_threads_if_already_bfloat16": same / seconds["memcpy_same_threads"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and seconds of a push of weights.")
    parser.add_argument("--out", help="where the result goes, as JSON")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-millions", type=int, default=800, help="parameters in memory at once, in millions")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    torch.set_num_threads(1)  # one memcpy is by one; the publisher's threads are its own
    results = {name: measure(name, arguments.max_millions * 10**6, arguments.repeats) for name in arguments.shapes}
    for name, found in results.items():
        delta, pushes = found["deltas"]["noise"], found["pushes"]
        print(
            f"{name}B: delta {100 * delta['bytes_share']:.2f} % of full, {100 * delta['changed_share']:.2f} % changed, "
            f"shm {found['shm_over_memcpy']:.2f} x memcpy ({found['shm_over_memcpy_if_already_bfloat16']:.2f} from "
            f"bfloat16), blocked {100 * pushes['shm']['blocked_share']:.2f} % of a push; seconds of a push: "
            + ", ".join(f"{way} {pushes[way]['seconds']['median']:.3f}" for way in WAYS)
        )
    if arguments.out:
        result = {"origin": origin([SEED], arguments.repeats), "lr": LR, "std": STD, "shapes": results}
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
