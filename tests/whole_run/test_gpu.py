"""What only a CUDA device can show: copies beside training, the sampler, memory, and a whole run. ``pytest -m gpu``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from dapo_async.config.settings import Config
from dapo_async.learner.update import Update
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.policy import make_accelerator, make_optimizer
from dapo_async.rl.logprobs import selected_logprobs
from dapo_async.run.launch import train
from dapo_async.run.memory import Item, learner_device
from dapo_async.run.memory_check import shape_of
from dapo_async.weight_sync import gpu_copy
from dapo_async.weight_sync.buffers import Buffer
from dapo_async.weight_sync.encoding import encode_weights, offsets_of, serving_tensors, tensor_infos
from dapo_async.weight_sync.publisher import Publisher
from dapo_async.weight_sync.shared_memory import available
from dapo_async.weight_sync.snapshot import fill
from tests.run.test_memory import answers, small
from tests.run.test_memory import settings as learner_settings
from tests.whole_run.test_training import check_account, check_trained_once, demo, settings, steps  # noqa: F401  # a fixture
from tests.workers.torch.test_engine import MAX_LEN, drain, model_of, request_of, weights_of
from workers.torch.engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
CUDA = torch.device("cuda", 0)
SECOND = 2_000_000_000  # cycles of ``torch.cuda._sleep``: about a second, or two


def masters(elements: int = 24 << 20) -> dict[str, torch.Tensor]:
    """float32 on the GPU, more than the digest does in one thread; one is transposed."""
    plain = {name: torch.randn(elements, device="cuda") for name in ("one", "two")}
    return plain | {"turned": torch.randn(256, 512, device="cuda").T}


@pytest.fixture
def _own_precision() -> Iterator[None]:
    """accelerate keeps the device and precision of a process's first learner."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "shared", [pytest.param(True, marks=pytest.mark.skipif(not available(), reason="Linux")), False]
)
def test_a_copy_waits_for_the_weights_and_for_nothing_queued_later(shared: bool) -> None:
    tensors = masters()
    infos = tensor_infos(tensors.items(), torch.bfloat16)
    buffer = Buffer(offsets_of(infos)[1], shared)
    assert gpu_copy.pin(buffer.whole, buffer, CUDA)
    buffer.pinned = True
    fill(buffer, 0, tensors, infos)  # loads kernels, which waits for the whole device
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND // 4)  # what makes the weights: a copy that did not wait would see them as they were
    for tensor in tensors.values():
        tensor.mul_(3.0)
    ready, later = gpu_copy.moment(tensors.values()), torch.cuda.Event()
    torch.cuda._sleep(SECOND)
    later.record()
    snapshot = fill(buffer, 1, tensors, infos, ready)
    assert not later.query()  # a copy on the learner's stream would have waited for it
    torch.cuda.synchronize()
    served = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    assert snapshot.digest == encode_weights(1, served, "")[0].digest


def test_publishing_from_the_gpu_reuses_pinned_buffers_and_never_mixes_two_steps() -> None:
    tensors = masters()
    publisher = Publisher("tcp://127.0.0.1:*", incarnation="life", max_message_bytes=1 << 30, heartbeat_s=0.2)
    try:
        for version in range(4):
            expected = encode_weights(version, serving_tensors(_Module(tensors), torch.bfloat16), "")[0].digest
            publisher.publish(version, tensors, torch.bfloat16)
            publisher.wait_copied(30.0)
            for tensor in tensors.values():
                tensor.add_(1.0)  # the next step
            while publisher.published < version:
                publisher.check()
            ready = publisher._ready
            assert ready is not None
            assert ready.snapshot.digest == expected
            assert ready.snapshot.buffer.pinned
        assert publisher._buffers.made == 2
    finally:
        publisher.close()


class _Module(torch.nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_publishing_again_and_again_takes_no_more_memory_of_the_gpu() -> None:
    """PyTorch keeps what was freed on a stream for that stream: new streams would each keep their own."""
    tensors = masters()
    infos = tensor_infos(tensors.items(), torch.bfloat16)
    buffer = Buffer(offsets_of(infos)[1], False)
    before = torch.cuda.memory_reserved()
    for version in range(40):
        fill(buffer, version, tensors, infos, gpu_copy.moment(tensors.values()))
    assert torch.cuda.memory_reserved() - before <= 4 * 2 * gpu_copy.PIECE


def test_memory_that_cannot_be_pinned_is_filled_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    tensors = masters(1 << 20)
    infos = tensor_infos(tensors.items(), torch.bfloat16)
    buffer = Buffer(offsets_of(infos)[1], False)
    assert gpu_copy.pin(buffer.whole, buffer, CUDA)  # pinned twice is an error
    snapshot = fill(buffer, 1, tensors, infos, gpu_copy.moment(tensors.values()))
    assert buffer.pinned is False
    assert "cannot be pinned" in caplog.text
    served = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    assert snapshot.digest == encode_weights(1, served, "")[0].digest


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "module"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_the_samplers_logprobs_are_the_models(kind: str, fused: bool) -> None:
    engine = TorchEngine(model_of(kind), slots=16, max_len=MAX_LEN, stop_token_ids=[], device="cuda", fused=fused)
    requests = [request_of(key, length=5 + 9 * key, samples=6, max_tokens=20) for key in range(3)]
    for request in requests:
        engine.add(request)
    found, model = drain(engine), model_of(kind).double()
    assert len(found) == 18
    for (key, _), done in found.items():
        ids = torch.from_numpy(np.append(requests[key].prompt_ids, done.token_ids)).long()
        logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        expected = logp[len(requests[key].prompt_ids) - 1 : -1].gather(1, ids[len(requests[key].prompt_ids) :, None])
        assert np.abs(done.logprobs - expected[:, 0].detach().numpy()).max() < 1e-4


@pytest.mark.parametrize("kv_cache", ["keep", "recompute"])
def test_a_swap_in_flight_changes_the_tokens_after_it(kv_cache: str) -> None:
    old, new = model_of("qwen3"), model_of("qwen3", seed=1)
    engine = TorchEngine(
        model_of("qwen3"), slots=8, max_len=MAX_LEN, stop_token_ids=[], device="cuda", kv_cache=kv_cache
    )
    engine.swap(0, weights_of(old))
    request = request_of("x", samples=4, max_tokens=20)
    engine.add(request)
    for _ in range(8):
        assert not engine.step()
    engine.swap(1, weights_of(new))
    for done in drain(engine).values():
        assert done.spans == [(0, 8), (1, 12)]
        ids = torch.from_numpy(np.append(request.prompt_ids, done.token_ids)).long()
        start = len(request.prompt_ids)
        before, after = (
            m.double()(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)[start - 1 : -1]
            .gather(1, ids[start:, None])[:, 0].detach().numpy()
            for m in (old, new)
        )  # fmt: skip
        assert np.abs(done.logprobs[:8] - before[:8]).max() < 1e-4
        if kv_cache == "recompute":
            assert np.abs(done.logprobs[8:] - after[8:]).max() < 1e-4
        else:
            assert np.abs(done.logprobs[8:] - before[8:]).max() > 1e-2


def test_chunked_logprobs_hold_two_chunks_of_logits_and_agree_with_all_of_them() -> None:
    rows, chunk, vocab, size = 4096, 512, 50_000, 64
    hidden = torch.randn(rows, size, device="cuda", requires_grad=True)
    head = (torch.randn(vocab, size, device="cuda") * 0.1).requires_grad_()
    target = torch.randint(vocab, (rows,), device="cuda")

    def run(chunk_tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        hidden.grad = head.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logp, _ = selected_logprobs(hidden, head, target, temperature=1.0, chunk_tokens=chunk_tokens)
        logp.sum().backward()
        assert hidden.grad is not None
        return logp.detach(), hidden.grad.clone(), torch.cuda.max_memory_allocated() - before

    run(chunk)  # cuBLAS takes its workspace
    (logp, gradient, peak), (all_logp, all_gradient, all_peak) = run(chunk), run(rows)
    torch.testing.assert_close(logp, all_logp, rtol=1e-5, atol=1e-4)
    assert float((gradient - all_gradient).norm() / all_gradient.norm()) < 1e-4
    assert peak < 2.3 * chunk * vocab * 4 + 4 * (2 * rows + 3 * vocab) * size
    assert all_peak > 1.9 * rows * vocab * 4


@pytest.mark.usefixtures("_own_precision")
@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"model": {"precision": "bfloat16"}},
        {"model": {"precision": "bfloat16", "attention": "sdpa"}},
        {"model": {"precision": "bfloat16", "gradient_checkpointing": True}},
        {"learner": {"microbatch_tokens": 209, "logprob_chunk_tokens": 40}},
    ],
    ids=["float32", "bfloat16", "bfloat16 padded", "checkpointed", "chunks"],
)
def test_the_learners_estimate_is_the_peak_of_a_step(tables: dict[str, dict[str, Any]]) -> None:
    """As on a CPU: 0.95 to 1.35 of what PyTorch had allocated at one time; the context is not its."""
    tables = {name: {"device": "cuda", "path": "x"} | t if name == "model" else t for name, t in tables.items()}
    base = {"learner": {"microbatch_tokens": 209}, "model": {"device": "cuda", "path": "x"}}
    config = learner_settings(**(base | tables))
    accelerator = make_accelerator(config.model)
    forward_pass = resolve_forward_pass(config, hardware_of(accelerator.device))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = small("qwen3", vocab=3000)
    model.set_attn_implementation(forward_pass.attention)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.to("cuda").train(config.model.gradient_checkpointing)
    update = Update(config, model, make_optimizer(model, config.optimizer, accelerator), accelerator, forward_pass)
    for number in range(2):
        update.train(answers(16), number, lambda: None)
    peak = torch.cuda.max_memory_allocated() - before
    items: list[Item] = learner_device(shape_of(model), config, forward_pass)
    estimate = sum(item.num_bytes for item in items if item.what != "CUDA context")
    assert 0.95 <= estimate / peak <= 1.35, f"{items}, peak {peak}"


@pytest.mark.slow
@pytest.mark.usefixtures("_own_precision")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_the_gpu_and_its_resumption(demo: Config, tmp_path: Path, precision: str) -> None:  # noqa: F811
    tables: dict[str, dict[str, Any]] = {
        "model": {"device": "cuda", "precision": precision},
        "workers": {"device": "cuda", "gpus": "shared", "slots": 16},
        "checkpoint": {"every": 3},
        "evaluation": {"max_prompts": 4},
    }
    first = train(settings(demo, tmp_path, **tables, run={"batches": 3}))
    assert first.folder is not None
    longer = settings(demo, tmp_path, **tables, run={"batches": 6})
    AcceleratorState._reset_state(reset_partial_state=True)
    second = train(longer, resume=True)
    assert second.folder == first.folder
    check_account(second.summary)
    check_trained_once(first.folder, 6)
    logged = steps(first.folder)
    assert all(line["memory/gpu_bytes"] > 0 for line in logged)
    fresh = [line["mismatch/mean"] for line in logged if "mismatch/mean" in line]
    assert fresh
    assert max(fresh) < (1e-4 if precision == "float32" else 0.05)
