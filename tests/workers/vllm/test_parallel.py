"""vLLM across several processes, on its CPU build: every part of every tensor is what was published, or it is refused.

Two processes need two cores, and take about half a minute to start.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_async.config.settings import Vllm
from dapo_async.config.toml import build_config
from dapo_async.errors import ConfigError, DapoError
from tests.workers.vllm.test_engine import (
    _children_find_the_package,  # noqa: F401
    drain,
    make_model,
    needs_vllm,
    open_engine,
    put,
    reference,
    request,
)
from workers.engines import make_engine
from workers.vllm import engine as vllm_engine
from workers.vllm.engine import VllmEngine

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def _damage(_children_find_the_package: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """Where to write what is to be damaged; see ``vllm_damaging.py``."""
    patch, order = pytest.MonkeyPatch(), tmp_path_factory.mktemp("damage") / "order"
    patch.setenv("DAMAGE", str(order))
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2]))
    patch.setattr(vllm_engine, "EXTENSION", "tests.workers.vllm.damaging.Extension")
    yield order
    patch.undo()


def check_swaps(engine: VllmEngine, order: Path, damage: str, told: str, *, generate: bool, **shape: Any) -> None:
    """Serves what was published through two swaps, and refuses the third one's damage."""
    order.unlink(missing_ok=True)
    for seed in (1, 2):
        model = make_model(seed=seed, **shape)
        version = put(engine, model)
        for number in range(3 * generate):
            engine.add(request(number))
        done = drain(engine)
        assert len(done) == 12 * generate
        for one in done:
            assert one.spans == [(version, len(one.token_ids))]
            assert one.logprobs == pytest.approx(reference(model, one), abs=1e-4)
    order.write_text(damage)
    with pytest.raises(DapoError, match=rf"could not take weights {version + 1}: .*{told}"):
        put(engine, make_model(seed=3, **shape))


@pytest.mark.slow
@needs_two_cores
def test_tensor_parallel_serves_what_was_published_or_nothing(_damage: Path, tmp_path: Path) -> None:  # noqa: PT019
    """Both processes hold the one KV head; half of the columns of o_proj are in the second one."""
    engine = open_engine(tmp_path, model=make_model(kv_heads=1), settings=Vllm(tensor_parallel_size=2))
    try:
        name = "model.layers.1.self_attn.o_proj.weight"
        told = rf"process 1 of 2: {name} in vLLM is not what was published"
        check_swaps(engine, _damage, f"1 {name} 3 64", told, generate=True, kv_heads=1)
    finally:
        engine.close()


@pytest.mark.slow
@needs_two_cores
def test_pipeline_parallel_takes_what_was_published_or_nothing(_damage: Path, tmp_path: Path) -> None:  # noqa: PT019
    """Each process holds one of the two layers. Not generated: vLLM 0.32 cannot, across stages on CPU (see below)."""
    engine = open_engine(tmp_path, settings=Vllm(pipeline_parallel_size=2))
    try:
        name = "model.layers.1.mlp.down_proj.weight"
        told = rf"process 1 of 2: {name} in vLLM is not what was published"
        check_swaps(engine, _damage, f"1 {name} 3 5", told, generate=False)
    finally:
        engine.close()


def test_stages_on_cpu_are_refused(tmp_path: Path) -> None:
    table = {
        "model": {"path": str(tmp_path)},
        "data": {"train": "elsewhere"},
        "workers": {"engine": "vllm"},
        "vllm": {"pipeline_parallel_size": 2},
    }
    with pytest.raises(
        ConfigError, match=r"vllm\.pipeline_parallel_size = 2: vLLM 0\.32 starts its stages on CPU, but"
    ):
        make_engine(build_config(table, "test"))


# --- the parts, against vLLM's own loaders -----------------------------------------------------------------


def layers() -> dict[str, tuple[Any, list[list[int]], list[Any]]]:
    """Per layout: how vLLM makes the layer, the shapes of published tensors, and what its loader calls each."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    kind = {"bias": False, "params_dtype": torch.float32}
    return {
        "column": (lambda: linear.ColumnParallelLinear(6, 16, **kind), [[16, 6]], [None]),
        "row": (lambda: linear.RowParallelLinear(16, 6, **kind), [[6, 16]], [None]),
        "gate and up": (lambda: linear.MergedColumnParallelLinear(6, [8, 16], **kind), [[8, 6], [16, 6]], [0, 1]),
        "gate and up in one": (lambda: linear.MergedColumnParallelLinear(6, [8, 16], **kind), [[24, 6]], [None]),
        "heads": (lambda: linear.QKVParallelLinear(6, 2, 8, 4, **kind), [[16, 6], [8, 6], [8, 6]], ["q", "k", "v"]),
        "few KV heads": (
            lambda: linear.QKVParallelLinear(6, 2, 8, 2, **kind),
            [[16, 6], [4, 6], [4, 6]],
            ["q", "k", "v"],
        ),
        "few KV heads in one": (lambda: linear.QKVParallelLinear(6, 2, 8, 1, **kind), [[20, 6]], [None]),
        "vocabulary": (lambda: VocabParallelEmbedding(150, 6, torch.float32), [[150, 6]], [None]),
        "output layer": (lambda: ParallelLMHead(150, 6, params_dtype=torch.float32), [[150, 6]], [None]),
        "replicated": (lambda: linear.ReplicatedLinear(6, 16, **kind), [[16, 6]], [None]),
    }


LAYOUTS = [
    "column", "row", "gate and up", "gate and up in one", "heads", "few KV heads", "few KV heads in one", "vocabulary",
    "output layer", "replicated",
]  # fmt: skip


def built(layout: str, rank: int, size: int, patch: pytest.MonkeyPatch) -> Any:
    """The layer as it is in process ``rank`` of ``size``, which need not exist for this."""
    from vllm import config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    for module in (linear, parameter, vocab_parallel_embedding):
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    with config.set_current_vllm_config(config.VllmConfig()):
        return layers()[layout][0]()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_are_those_that_vllm_loads(layout: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.vllm.shards import shard

    _, shapes, ids = layers()[layout]
    sources = [torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + 1 for rows, columns in shapes]
    for rank in range(size):
        layer = built(layout, rank, size, monkeypatch)
        for source, name in zip(sources, ids, strict=True):
            layer.weight.weight_loader(layer.weight, source, *([] if name is None else [name]))
        part = shard(layer, "weight", sources)
        assert torch.equal(layer.weight[: len(part)], part)
        assert not layer.weight[len(part) :].any()
        assert size == 1 or layout == "replicated" or part.numel() < sum(source.numel() for source in sources)


@pytest.mark.parametrize("layout", ["column", "row", "gate and up in one", "heads"])
def test_tensors_of_other_sizes_have_no_part(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.vllm.shards import shard

    layer = built(layout, 0, 2, monkeypatch)
    with pytest.raises(ValueError, match=r" not "):
        shard(layer, "weight", [torch.zeros(rows + 2, columns + 2) for rows, columns in layers()[layout][1]])
