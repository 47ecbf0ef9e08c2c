"""Trains the model on one batch: rewards, advantages, microbatches, loss, optimizer steps.

Owns model, optimizer and reference model; knows no socket and no schedule. Complete groups come
in, numbers go out. Nothing in it depends on how the batch is split into microbatches but rounding.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dapo_async.config.settings import Config
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.model.batching import MicroBatch, TrainSequence, microbatches
from dapo_async.model.cpu.fused_forward import FusedForward
from dapo_async.model.forward_pass import ForwardPass
from dapo_async.model.policy import Accelerator, completion_logprobs
from dapo_async.rl.advantages import group_advantages
from dapo_async.rl.loss import LossSums, m2po_keep, policy_loss, token_weights
from dapo_async.rl.mismatch import Mismatch, same_weights
from dapo_async.rl.rewards import group_rewards


class ScoredGroup(NamedTuple):
    """A group with what the learner thinks of it."""

    rollout: RolloutGroup
    rewards: np.ndarray  # float64 [G], shaped
    advantages: np.ndarray  # float64 [G]


class TrainResult(NamedTuple):
    """What training one batch was like."""

    groups: list[ScoredGroup]
    metrics: dict[str, float]
    seconds: dict[str, float]  # forward_backward, optimizer
    steps: int  # optimizer steps taken
    skipped: int  # optimizer steps skipped because loss or gradient was not finite


class Update:
    """See the module. ``forward_pass`` as proved at load; ``reference`` with a KL penalty."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        forward_pass: ForwardPass,
        *,
        reference: PreTrainedModel | None = None,
    ) -> None:
        self.config = config
        self.model, self.optimizer, self.reference = model, optimizer, reference
        self.before_step: Callable[[], None] = lambda: None  # called before each change of the parameters
        self.unfinished = False  # a batch's first optimizer step has begun, and the learner has not counted the batch
        self._accelerator = accelerator
        self._layout = forward_pass.layout
        self._forward = FusedForward(model) if forward_pass.fused else None
        self._reference_forward = FusedForward(reference) if forward_pass.fused and reference is not None else None
        self._seconds: dict[str, float] = {}
        self._mismatch = Mismatch()

    def logprobs(self, groups: Sequence[RolloutGroup]) -> Tensor:
        """The model's log-probs of all completion tokens of ``groups``, in order; float32 [T], nats."""
        return self._all_logprobs(self.model, self._sequences(self._score(groups), 0), lambda: None)

    def train(self, groups: Sequence[RolloutGroup], batch_number: int, tick: Callable[[], None]) -> TrainResult:
        """Train on complete groups, in ``learner.minibatches`` optimizer steps; ``batch_number`` counts from 0.

        ``tick`` is called before each microbatch until the first optimizer step; what it raises leaves the model
        as it was.
        """
        self._seconds = {"forward_backward": 0.0, "optimizer": 0.0}
        self._mismatch = Mismatch()
        scored = self._score(groups)
        sequences = self._sequences(scored, batch_number)
        old = self._old_logprobs(sequences, tick)
        lr = self._set_lr(batch_number)
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[Part] = []
        for indices, part in self._minibatches(sequences):
            parts.append(self._minibatch(part, indices, old, tick, first=not parts))
        metrics = self._metrics(scored, sequences, parts) | {"optimizer/lr": lr}
        skipped = sum(not part.stepped for part in parts)
        return TrainResult(scored, metrics, dict(self._seconds), len(parts) - skipped, skipped)

    # --- from groups to sequences -------------------------------------------------------------------------

    def _score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        reward, sampling = self.config.reward, self.config.sampling
        scored = []
        for rollout in groups:
            rewards = group_rewards(
                rollout.correct,
                rollout.lengths,
                max_tokens=sampling.max_tokens,
                overlong_cache_tokens=reward.overlong_cache_tokens,
                overlong_penalty=reward.overlong_penalty,
            )
            advantages = group_advantages(rewards, divide_by_std=self.config.objective.advantage_std)
            scored.append(ScoredGroup(rollout, rewards, advantages))
        return scored

    def _sequences(self, groups: Sequence[ScoredGroup], version: int) -> list[TrainSequence]:
        """Every completion of the batch, in lease order; ``version`` is that of the weights now."""
        sequences = []
        for number, (rollout, _, advantages) in enumerate(groups):
            end = np.cumsum(rollout.lengths)
            for index, completion in enumerate(rollout.group.completions):
                own = slice(end[index] - completion.num_tokens, end[index])
                sequences.append(
                    TrainSequence(
                        prompt_ids=rollout.prompt.ids,
                        token_ids=rollout.group.token_ids[own],
                        behaviour_logp=rollout.group.logprobs[own],
                        advantage=float(advantages[index]),
                        group=number,
                        fresh=same_weights(completion.spans, version),
                        masked=self.config.reward.overlong_filter and completion.finish == "length",
                    )
                )
        return sequences

    def _minibatches(self, sequences: Sequence[TrainSequence]) -> Iterator[tuple[list[int], list[TrainSequence]]]:
        """Indices into the batch, and the sequences with their weights, of each optimizer step.

        Every n-th group each, so that old and new groups are spread evenly over the steps.
        """
        count, objective = self.config.learner.minibatches, self.config.objective
        for part in range(count):
            indices = [i for i, s in enumerate(sequences) if s.group % count == part]
            chosen = [sequences[i] for i in indices]
            weights = token_weights(
                [0 if s.masked else len(s.token_ids) for s in chosen],
                [s.group for s in chosen],
                aggregation=objective.aggregation,
                length_norm_tokens=objective.length_norm_tokens or self.config.sampling.max_tokens,
            )
            yield indices, [s._replace(weight=float(w)) for s, w in zip(chosen, weights, strict=True)]

    def _plan(self, sequences: Sequence[TrainSequence]) -> Iterator[MicroBatch]:
        budget = self.config.learner.microbatch_tokens
        return microbatches(sequences, budget, layout=self._layout, device=self._accelerator.device)

    # --- forward and backward -----------------------------------------------------------------------------

    def _logprobs(self, model: PreTrainedModel, micro: MicroBatch, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        with self._accelerator.autocast():
            return completion_logprobs(
                model,
                micro,
                temperature=self.config.sampling.temperature,
                chunk_tokens=self.config.learner.logprob_chunk_tokens,
                with_entropy=entropy,
                forward=self._forward if model is self.model else self._reference_forward,
            )

    def _old_logprobs(self, sequences: Sequence[TrainSequence], tick: Callable[[], None]) -> "OldLogprobs":
        """What is fixed before the first optimizer step, and only what the objective needs."""
        objective, lengths = self.config.objective, [len(s.token_ids) for s in sequences]
        proximal = reference = keep = None
        with self._timed("forward_backward"):
            if objective.ratio_against == "proximal":
                proximal = self._all_logprobs(self.model, sequences, tick)
            if self.reference is not None:
                reference = self._all_logprobs(self.reference, sequences, tick)
            if proximal is not None and objective.correction == "m2po":
                behaviour = torch.from_numpy(np.concatenate([s.behaviour_logp for s in sequences])).to(proximal)
                unmasked = torch.from_numpy(np.repeat([not s.masked for s in sequences], lengths)).to(proximal.device)
                keep = m2po_keep(behaviour, proximal, unmasked, objective.m2po_threshold)
        columns = {"proximal_T": proximal, "reference_T": reference, "keep_T": keep}
        return OldLogprobs({name: x.split(lengths) for name, x in columns.items() if x is not None})

    @torch.no_grad()
    def _all_logprobs(
        self, model: PreTrainedModel, sequences: Sequence[TrainSequence], tick: Callable[[], None]
    ) -> Tensor:
        """float32 [all completion tokens], in batch order."""
        result = torch.empty(sum(len(s.token_ids) for s in sequences), device=self._accelerator.device)
        for micro in self._plan(sequences):
            tick()
            logp_T, _ = self._logprobs(model, micro, entropy=False)
            result[micro.batch_T] = logp_T
        return result

    def _minibatch(
        self,
        sequences: list[TrainSequence],
        indices: list[int],
        old: "OldLogprobs",
        tick: Callable[[], None],
        *,
        first: bool,
    ) -> "Part":
        """One optimizer step on ``sequences``, which are the batch's ``indices``; ``first``: the batch's first one."""
        loss_sum = torch.zeros((), device=self._accelerator.device)
        sums, passes, places = None, 0, 0
        with self._timed("forward_backward"):
            for micro in self._plan(sequences):
                if first:
                    tick()
                logp_T, entropy_T = self._logprobs(self.model, micro, entropy=True)
                if first:  # the weights are still those of the version
                    self._mismatch.add(logp_T[micro.fresh_T], micro.behaviour_T[micro.fresh_T])
                loss, micro_sums = policy_loss(
                    logp_T=logp_T,
                    behaviour_T=micro.behaviour_T,
                    advantage_T=micro.advantage_T,
                    weight_T=micro.weight_T,
                    mask_T=micro.mask_T,
                    sequence_T=micro.sequence_T,
                    objective=self.config.objective,
                    entropy_T=entropy_T,
                    **old.of([indices[i] for i in micro.indices]),
                )
                self._accelerator.backward(loss)
                loss_sum += loss.detach()
                sums = micro_sums if sums is None else sums.merge(micro_sums)
                passes, places = passes + 1, places + micro.input_ids.numel()
        assert sums is not None  # a minibatch holds at least one group
        with self._timed("optimizer"):
            limit = self.config.optimizer.grad_clip or math.inf
            norm = float(self._accelerator.clip_grad_norm_(self.model.parameters(), limit))
            stepped = math.isfinite(norm) and math.isfinite(float(loss_sum))
            if stepped:
                self.before_step()
                self.unfinished = True
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return Part(float(loss_sum), norm, stepped, sums, passes, places)

    def _set_lr(self, batch_number: int) -> float:
        settings = self.config.optimizer
        lr = settings.lr * min(1.0, (batch_number + 1) / max(1, settings.warmup_batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase] += time.monotonic() - started

    def _metrics(
        self, groups: Sequence[ScoredGroup], sequences: Sequence[TrainSequence], parts: Sequence["Part"]
    ) -> dict[str, float]:
        sums = reduce(LossSums.merge, (part.sums for part in parts))
        rewards = np.concatenate([group.rewards for group in groups])
        correct = np.concatenate([group.rollout.correct for group in groups])
        lengths = np.concatenate([group.rollout.lengths for group in groups])
        completions = [c for group in groups for c in group.rollout.group.completions]
        places, inputs = sum(part.places for part in parts), sum(s.num_inputs for s in sequences)
        return {
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(),
            "reward/min": rewards.min(),
            "reward/max": rewards.max(),
            "reward/overlong": (rewards - np.where(correct, 1.0, -1.0)).mean(),
            "accuracy/trained": correct.mean(),
            "length/mean": lengths.mean(),
            "length/min": lengths.min(),
            "length/max": lengths.max(),
            "length/truncated_share": np.mean([c.finish == "length" for c in completions]),
            "staleness/mixed_version_share": np.mean([len(c.spans) > 1 for c in completions]),
            "policy/loss": sum(part.loss for part in parts) / len(parts),
            "optimizer/grad_norm": sum(part.grad_norm for part in parts) / len(parts),
            "batch/tokens": lengths.sum(),
            "batch/microbatches": sum(part.passes for part in parts),
            "batch/padding_share": max(0.0, 1.0 - inputs / places),
            "batch/shared_share": max(0.0, 1.0 - places / inputs),
            **{f"policy/{name}": value for name, value in sums.means().items()},
            **{f"mismatch/{name}": value for name, value in self._mismatch.results().items()},
        }


class OldLogprobs(NamedTuple):
    """Columns that are fixed before the first optimizer step of a batch."""

    columns: dict[str, tuple[Tensor, ...]]  # named as ``policy_loss`` takes them: one tensor per completion

    def of(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The columns of these completions, one after the other."""
        return {name: torch.cat([parts[i] for i in indices]) for name, parts in self.columns.items()}


class Part(NamedTuple):
    """One optimizer step."""

    loss: float
    grad_norm: float
    stepped: bool
    sums: LossSums
    passes: int
    places: int  # token places of its forward passes, padding included
