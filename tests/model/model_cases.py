"""Tiny random models, a batch to train on, and the plain way to its log-probs, for the tests of ``model``."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dapo_async.config import settings as config
from dapo_async.model.batching import TrainSequence, build_microbatch, plan_microbatches
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.policy import completion_logprobs

CPU = torch.device("cpu")
FUSED = PLAIN._replace(layout="shared", obstacle="", wish="auto")
VOCAB = 23
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def tiny(family: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention)
        )
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, attn_implementation=attention, **changes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEADS, attn_implementation=attention, **changes))
    for parameter in model.parameters():  # far from the near-uniform distribution of a fresh model
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def make_batch(count: int = 12, seed: int = 0) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    batch = []
    for number in range(count):
        prompt, tokens = rng.integers(1, 9), rng.integers(1, 14)
        batch.append(
            TrainSequence(
                rng.integers(VOCAB, size=prompt).astype(np.int32),
                rng.integers(VOCAB, size=tokens).astype(np.int32),
                -rng.random(tokens).astype(np.float32),
                advantage=float(rng.normal()),
                group=number // 4,
            )
        )
    return batch


def plain_logprobs(model: PreTrainedModel, batch: list[TrainSequence], temperature: float) -> tuple[Tensor, Tensor]:
    """One unpadded forward pass per sequence and a full log-softmax."""
    logps, entropies = [], []
    for sequence in batch:
        ids = torch.from_numpy(np.append(sequence.prompt_ids, sequence.token_ids)).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(sequence.prompt_ids) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        logps.append(logp.gather(1, ids[len(sequence.prompt_ids) :, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def batch_logprobs(
    model: PreTrainedModel, batch: list[TrainSequence], *, padded: bool, budget: int = 60, temperature: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in batch order, through microbatches."""
    total = sum(len(sequence.token_ids) for sequence in batch)
    logp, entropy = torch.full((total,), torch.nan).double(), torch.full((total,), torch.nan).double()
    for indices in plan_microbatches([sequence.num_inputs for sequence in batch], budget, padded=padded):
        micro = build_microbatch(batch, indices, padded=padded)
        values = completion_logprobs(model, micro, temperature=temperature, chunk_tokens=7)
        assert values[1] is not None
        logp[micro.batch_T], entropy[micro.batch_T] = values[0].double(), values[1].double()
    return logp, entropy


def summed_gradient(model: PreTrainedModel, batch: list[TrainSequence], budget: int, padded: bool) -> Tensor:
    model.zero_grad()
    for indices in plan_microbatches([sequence.num_inputs for sequence in batch], budget, padded=padded):
        micro = build_microbatch(batch, indices, padded=padded)
        logp, entropy = completion_logprobs(model, micro, temperature=1.2, chunk_tokens=16)
        assert entropy is not None
        (-(logp - micro.behaviour_T).exp() * micro.advantage_T - 0.01 * entropy).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def save(model: PreTrainedModel, folder: Path) -> config.Model:
    model.save_pretrained(folder)
    return config.Model(path=str(folder))
