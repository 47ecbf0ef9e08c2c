"""``logprobs``: values and gradients against full float64 log-softmax, chunking, and the memory promise."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dapo_async.rl.logprobs import selected_logprobs
from tests import ROOT

torch.set_num_threads(1)
VECTORS = json.loads((ROOT / "tests/data/dapo_vectors.json").read_text(encoding="utf-8"))["entropy"]


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, with full logits."""
    z = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = z[torch.arange(len(target)), target] - z.logsumexp(-1)
    return logp, z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)


def inputs(
    rows: int, size: int, vocab: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rows, size), (vocab, size), (vocab,))]
    target = torch.randint(vocab, (rows,), generator=generator)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in draw)
    return hidden, weight, bias, target


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_matches_the_recorded_vectors(temperature: float) -> None:
    logits = torch.tensor(VECTORS["input"]["logits"], dtype=torch.float64)
    expected = VECTORS["output"][f"T={temperature}"]
    for token in range(logits.shape[1]):
        target = torch.full((len(logits),), token)
        # The identity as output embedding makes the hidden states the logits.
        logp, entropy = selected_logprobs(
            logits, torch.eye(4, dtype=torch.float64), target, temperature=temperature, chunk_tokens=2
        )
        assert logp.tolist() == pytest.approx([row[token] for row in expected["logp"]], rel=1e-10, abs=1e-14)
        assert entropy is not None
        assert entropy.tolist() == pytest.approx(expected["entropy"], rel=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_the_definition(chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, target = inputs(7, 5, 11, torch.float64)
    parameters = (hidden, weight, bias) if with_bias else (hidden, weight)
    used = bias if with_bias else None
    logp, entropy = selected_logprobs(hidden, weight, target, temperature=0.7, chunk_tokens=chunk, bias_V=used)
    want_logp, want_entropy = reference(hidden, weight, used, target, 0.7)
    torch.testing.assert_close(logp, want_logp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    assert entropy is not None
    factors = torch.linspace(-1, 2, 7, dtype=torch.float64)
    got = torch.autograd.grad((factors * logp).sum() + (entropy * factors.flip(0)).sum(), parameters)
    want = torch.autograd.grad((factors * want_logp).sum() + (want_entropy * factors.flip(0)).sum(), parameters)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 8])
def test_gradcheck(chunk: int) -> None:
    hidden, weight, bias, target = inputs(5, 3, 6, torch.float64, seed=1)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return selected_logprobs(hidden, weight, target, temperature=1.3, chunk_tokens=chunk, bias_V=bias)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("output", [0, 1])
def test_each_output_alone_has_its_gradient(output: int) -> None:
    hidden, weight, bias, target = inputs(6, 4, 9, torch.float64, seed=2)
    ours = selected_logprobs(hidden, weight, target, temperature=0.9, chunk_tokens=4, bias_V=bias)[output]
    assert ours is not None
    theirs = reference(hidden, weight, bias, target, 0.9)[output]
    for got, want in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight, bias)),
        torch.autograd.grad(theirs.sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_float32_is_as_good_as_float32_can_be() -> None:
    hidden, weight, _, target = inputs(50, 32, 200, torch.float32, seed=3)
    logp, entropy = selected_logprobs(hidden, weight, target, temperature=1.0, chunk_tokens=16)
    want_logp, want_entropy = reference(hidden.double(), weight.double(), None, target, 1.0)
    assert logp.dtype == torch.float32
    # A log-prob is a difference of numbers of up to 20 in magnitude: a few float32 roundings of those.
    torch.testing.assert_close(logp.double(), want_logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=2e-5)  # type: ignore[union-attr]


def test_autocast_multiplies_in_bfloat16_but_normalises_in_float32() -> None:
    hidden, weight, _, target = inputs(20, 16, 30, torch.float32, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = selected_logprobs(hidden, weight, target, temperature=1.0, chunk_tokens=8)
    assert entropy is not None
    assert logp.dtype == entropy.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).double()
    want = rounded.log_softmax(-1)[torch.arange(20), target]
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-5)
    logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    want_grad = torch.autograd.grad(reference(hidden, weight, None, target, 1.0)[0].sum(), hidden)[0]
    # bfloat16 keeps 8 bits: errors of about 1 % of the largest entry.
    torch.testing.assert_close(hidden.grad, want_grad, rtol=0, atol=0.02 * float(want_grad.abs().max()))


def test_without_entropy_it_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dapo_async.rl.logprobs._entropy")
    hidden, weight, _, target = inputs(4, 3, 5, torch.float64)
    logp, entropy = selected_logprobs(hidden, weight, target, temperature=1.0, chunk_tokens=2, with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logp, reference(hidden, weight, None, target, 1.0)[0])
    logp.sum().backward()
    assert hidden.grad is not None


def test_no_rows_give_no_values_and_zero_gradient() -> None:
    hidden, weight, _, _ = inputs(0, 3, 5, torch.float32)
    target = torch.zeros(0, dtype=torch.int64)
    logp, entropy = selected_logprobs(hidden, weight, target, temperature=1.0, chunk_tokens=2)
    assert entropy is not None
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(("rows", "chunk"), [(64, 8), (64, 64), (61, 16)])
def test_no_tensor_exceeds_one_chunk_of_logits(rows: int, chunk: int) -> None:
    vocab, size = 300, 4
    hidden, weight, bias, target = inputs(rows, size, vocab, torch.float32)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logp, entropy = selected_logprobs(hidden, weight, target, temperature=1.0, chunk_tokens=chunk, bias_V=bias)
        assert entropy is not None
        (logp.sum() + entropy.sum()).backward()
    assert max(vocab * size, chunk * vocab // 2) < largest.numel <= chunk * vocab
    kept_logits = [numel for numel in saved if numel > max(vocab * size, rows * size)]
    assert kept_logits == ([rows * vocab] if rows <= chunk else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.zeros(3, dtype=torch.int64)}, "must agree"),
        ({"weight": torch.zeros(5, 2)}, "must agree"),
        ({"bias_V": torch.zeros(4)}, "bias must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"temperature": 1.0, "chunk_tokens": 2} | change
    weight = arguments.pop("weight", torch.zeros(5, 3))
    target = arguments.pop("target", torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=words):
        selected_logprobs(torch.zeros(4, 3), weight, target, **arguments)
