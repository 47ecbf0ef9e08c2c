"""``model``: log-probs and gradients in every layout against plain forward passes, on CPU and on CUDA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dapo_async.errors import ConfigError
from dapo_async.model import varlen
from dapo_async.model.batching import build_microbatch
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.policy import completion_logprobs, load_policy
from dapo_async.model.varlen import VARLEN
from tests.learner.test_update import settings
from tests.model.model_cases import VOCAB, batch_logprobs, make_batch, plain_logprobs, save, summed_gradient, tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize(("attention", "padded"), [("sdpa", True), ("sdpa", False), ("eager", True)])
def test_logprobs_equal_a_plain_forward_pass_per_sequence(family: str, attention: str, padded: bool) -> None:
    model, batch = tiny(family, attention).double(), make_batch()
    with torch.no_grad():
        logp, entropy = batch_logprobs(model, batch, padded=padded)
        want_logp, want_entropy = plain_logprobs(model, batch, 0.8)
    torch.testing.assert_close(logp, want_logp, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-10)


def test_a_head_with_bias_and_no_entropy() -> None:
    model, batch = tiny("llama").double(), make_batch(4)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    micro = build_microbatch(batch, [0, 1, 2, 3], padded=True)
    logp, entropy = completion_logprobs(model, micro, temperature=0.8, chunk_tokens=9, with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logp, plain_logprobs(model, batch, 0.8)[0], rtol=0, atol=1e-10)


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, _edges_k: Tensor, _q: int, _k: int, **options: Any
) -> Tensor:
    """What ``torch.nn.attention.varlen`` computes, sequence by sequence: [N, H, D]."""
    left, right = options["window_size"]
    assert right == 0
    if key.shape[1] != query.shape[1]:
        assert options["enable_gqa"]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        place = torch.arange(end - start)
        seen = (place[:, None] >= place) & ((place[:, None] - place <= left) if left >= 0 else True)
        scores = (q @ k.transpose(1, 2) * options["scale"]).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_varlen_glue_passes_the_packed_layout_to_the_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference)  # the kernel itself runs on CUDA only
    batch = make_batch()
    with torch.no_grad():
        logp, _ = batch_logprobs(tiny(family, VARLEN).double(), batch, padded=False)
        want, _ = plain_logprobs(tiny(family).double(), batch, 0.8)
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-10)


def test_varlen_glue_gives_the_kernel_grouped_heads_as_they_are() -> None:
    """PyTorch's own checks of heads, shapes and gradients, on tensors without numbers: those need CUDA."""
    with FakeTensorMode():
        query, key, value = (torch.empty(1, heads, 5, 16, requires_grad=True) for heads in (8, 2, 2))
        edges = torch.tensor([0, 2, 5], dtype=torch.int32)
        output, _ = varlen.varlen_attention(torch.nn.Identity(), query, key, value, None, 0.25, None, edges, 3)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert output.shape == (1, 5, 8, 16)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def test_varlen_glue_keeps_sliding_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference)
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    batch = make_batch()
    with torch.no_grad():
        logp, _ = batch_logprobs(tiny("qwen3", VARLEN, **window).double(), batch, padded=False)
        padded, _ = batch_logprobs(tiny("qwen3", **window).double(), batch, padded=True)
        want, _ = plain_logprobs(tiny("qwen3", **window).double(), batch, 0.8)
        without, _ = plain_logprobs(tiny("qwen3").double(), batch, 0.8)
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(padded, want, rtol=0, atol=1e-10)
    assert not torch.allclose(want, without)


def test_varlen_refuses_what_the_kernel_lacks() -> None:
    row = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ConfigError, match=r'"varlen" lacks softcap of Identity; use "sdpa"'):
        varlen.varlen_attention(torch.nn.Identity(), row, row, row, None, softcap=30.0)
    with pytest.raises(ValueError, match="one packed row"):
        varlen.varlen_attention(torch.nn.Identity(), row, row, row, None)


def test_what_stands_in_padding_does_not_matter() -> None:
    model, batch = tiny("qwen3"), make_batch()
    micro = build_microbatch(batch, range(len(batch)), padded=True)  # type: ignore[arg-type]
    lengths = torch.tensor([sequence.num_inputs for sequence in batch])
    padding = torch.arange(micro.max_length) >= lengths[:, None]
    assert padding.any()
    results = []
    for filler in (0, 5, VOCAB - 1):
        ids = torch.where(padding, filler, micro.input_ids)
        logp, _ = completion_logprobs(model, micro._replace(input_ids=ids), temperature=1.0, chunk_tokens=50)
        gradients = torch.autograd.grad(logp.sum(), list(model.parameters()))
        results.append((logp, *gradients))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradient_does_not_depend_on_how_the_batch_is_split(family: str) -> None:
    model, batch = tiny(family).double(), make_batch()
    whole = summed_gradient(model, batch, 10_000, padded=True)
    assert whole.norm() > 1e-3
    for budget in (22, 60, 150):
        for padded in (True, False):
            split = summed_gradient(model, batch, budget, padded=padded)
            assert (split - whole).norm() <= 1e-10 * whole.norm()


def test_bfloat16_logprobs_are_close_to_float32() -> None:
    model, batch = tiny("llama"), make_batch()
    with torch.no_grad():
        want, _ = plain_logprobs(model, batch, 0.8)
        with torch.autocast("cpu", torch.bfloat16):
            logp, _ = batch_logprobs(model, batch, padded=True)
            plain, _ = plain_logprobs(model, batch, 0.8)
    # Judged against the error of the plain bfloat16 forward pass.
    assert (logp - want).abs().mean() <= 2 * (plain - want).abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["varlen", "flash"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_packed_kernels_on_cuda_match_padded_float32(family: str, attention: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if attention == "flash" and not hardware_of(torch.device("cuda")).flash_attn:
        pytest.skip("needs the flash-attn package")
    cuda, batch, results = torch.device("cuda"), make_batch(), []
    save(tiny(family), tmp_path)
    for choice, precision in ((attention, "bfloat16"), ("sdpa", "bfloat16"), ("sdpa", "float32")):
        config = settings(model={"path": str(tmp_path), "attention": choice, "precision": precision})
        forward_pass = resolve_forward_pass(config, hardware_of(cuda))
        model, padded = load_policy(config.model, forward_pass, cuda), forward_pass.layout == "padded"
        micro = build_microbatch(batch, list(range(len(batch))), padded=padded, device=cuda)
        with torch.autocast("cuda", torch.bfloat16, precision == "bfloat16"):
            logp, _ = completion_logprobs(model, micro, temperature=1.0, chunk_tokens=16)
        (logp * micro.advantage_T).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
        results.append((logp.detach(), gradients))
    packed, plain, exact = results
    # Judged against the error of plain padded bfloat16.
    for got, low, want in zip(packed, plain, exact, strict=True):
        assert (got - want).norm() <= 2 * (low - want).norm()
