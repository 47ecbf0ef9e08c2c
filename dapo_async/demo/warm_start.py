"""A short supervised run that teaches a tiny model to answer. It knows no task and no files.

Loss on the answer tokens only, averaged over all of a batch. Muon for the matrices, AdamW for the rest: at this
size AdamW alone learned far less from as many examples (docs/log.md). Legend: N examples, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from dapo_async.demo.muon import Muon

PROGRESS_EVERY_S = 0.25
MICROBATCH_TOKENS = 1024

Progress = Callable[[int, int, str], None]


class Example(NamedTuple):
    """A prompt with the answer to be taught, as token ids; the answer ends with the stop token.

    ``choice_weight`` weighs the loss of the answer's first token, by which the model chooses a form of answer. It lets
    the model learn one form more often than it is to choose it.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    choice_weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def warm_start(
    model: PreTrainedModel, examples: Iterator[Example], iterations: int, batch: int, lr: float, progress: Progress
) -> list[float]:
    """Train ``model`` in place for ``iterations`` steps of ``batch`` examples; each step's loss, in nats per token.

    The learning rate rises over the first twentieth and falls to 0 as a cosine. ``progress(done, total, text)`` is
    called a few times a second, and at the end.
    """
    optimizers = make_optimizers(model, lr)
    losses: list[float] = []
    told = -math.inf
    model.train()
    for iteration in range(iterations):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(iteration, iterations)
        losses.append(backward(model, [next(examples) for _ in range(batch)]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if time.monotonic() - told >= PROGRESS_EVERY_S or iteration + 1 == iterations:
            told = time.monotonic()
            progress(iteration + 1, iterations, "warm start")
    model.eval()
    return losses


def make_optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0)]


def schedule(iteration: int, iterations: int) -> float:
    """Factor on the learning rate: linear warm-up over the first twentieth, then a cosine to 0."""
    warmup = max(1, iterations // 20)
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration + 1 - warmup) / (iterations - warmup + 1)))


def backward(model: PreTrainedModel, examples: list[Example]) -> float:
    """Add the gradient of the mean loss over all answer tokens, however they are split; returns that loss."""
    num_tokens = sum(len(example.answer_ids) for example in examples)
    total = 0.0
    for part in microbatches(examples):
        loss = answer_loss_sum(model, part) / num_tokens
        loss.backward()
        total += loss.item()
    return total


def microbatches(examples: list[Example]) -> Iterator[list[Example]]:
    """Examples of similar length together, ``MICROBATCH_TOKENS`` with padding at most (one example at least)."""
    part: list[Example] = []
    for example in sorted(examples, key=lambda e: e.num_tokens):
        if part and (len(part) + 1) * example.num_tokens > MICROBATCH_TOKENS:
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def answer_loss_sum(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Sum of the weighted negative log-likelihoods of all answer tokens, in nats."""
    width = max(example.num_tokens for example in examples)
    ids_NT = torch.zeros(len(examples), width, dtype=torch.long)
    weight_NT = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids_NT[row, : example.num_tokens] = torch.tensor(example.prompt_ids + example.answer_ids)
        weight_NT[row, len(example.prompt_ids) : example.num_tokens] = 1.0
        weight_NT[row, len(example.prompt_ids)] = example.choice_weight
    # Padding stands on the right of a causal model, so no answer token sees it and no mask is needed.
    hidden = model.base_model(input_ids=ids_NT[:, :-1], use_cache=False).last_hidden_state
    answers = weight_NT[:, 1:] > 0
    logits_TV = model.get_output_embeddings()(hidden[answers])
    losses_T = functional.cross_entropy(logits_TV, ids_NT[:, 1:][answers], reduction="none")
    return (losses_T * weight_NT[:, 1:][answers]).sum()
