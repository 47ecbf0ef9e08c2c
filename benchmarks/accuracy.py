"""How accurate a checkpoint is, and when a run got there: the same ruler for every trainer.

Owned here: one evaluator (the embedded engine in this process, all held-out prompts, temperature 1, the same random
numbers for every checkpoint), and time to accuracy by interpolation. Not owned: clocks and checkpoints of runs.
Checkpoints are evaluated after the runs, so that no evaluation disturbs what is timed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dapo_async.config.settings import Config, Data, Reward
from dapo_async.data.prompts import Prompt, load_prompts
from dapo_async.model.tokenizer import TextDecoder
from dapo_async.rl.rewards import group_rewards
from dapo_async.verify.verifier import make_verifier
from workers.engine import Request
from workers.torch.engine import TorchEngine

SLOTS = 128


class Point(NamedTuple):
    """One checkpoint of a run."""

    seconds: float  # of training, on the run's own clock
    accuracy: float  # share of right answers
    length: float  # mean tokens of an answer


class Evaluator:
    """Held-out accuracy of model folders that share tokenizer and settings."""

    def __init__(self, config: Config, model: str, heldout: str, *, samples: int) -> None:
        """``config`` gives lengths and verifier; ``heldout`` is a file of prompts; ``samples`` answers to each."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._stops = [tokenizer.eos_token_id]  # saved weights may come without a tokenizer
        self._decode = TextDecoder(tokenizer)
        self._prompts: Sequence[Prompt] = load_prompts(heldout, tokenizer, config.data).prompts
        self._reward, self._max_tokens = config.reward, config.sampling.max_tokens
        self._longest, self._samples = config.longest_sequence_tokens, samples

    def __call__(self, model: str | Path) -> tuple[float, float]:
        """Accuracy and mean answer length of the model in this folder."""
        engine = engine_of(model, self._stops, SLOTS, self._longest)
        for place, prompt in enumerate(self._prompts):
            engine.add(Request(place, prompt.ids, self._samples, place, self._max_tokens))
        texts, truths, lengths = [], [], []
        while engine.running or engine.waiting:
            for finished in engine.step():
                texts.append(self._decode(finished.token_ids))
                truths.append(self._prompts[finished.key].truth)  # type: ignore[call-overload]
                lengths.append(len(finished.token_ids))
        engine.close()
        return float(np.mean(verdicts(texts, truths, self._reward))), float(np.mean(lengths))


def engine_of(model: str | Path, stops: Sequence[int], slots: int, longest: int) -> TorchEngine:
    """The embedded engine, serving the weights of this model folder in float32."""
    disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return TorchEngine(module, slots=slots, max_len=longest, stop_token_ids=stops)


def verdicts(texts: Sequence[str], truths: Sequence[str], reward: Reward) -> list[bool]:
    """What the configuration's verifier says of each text, in order."""
    verifier = make_verifier(reward)
    found: dict[Any, bool] = {}
    try:
        for place, (text, truth) in enumerate(zip(texts, truths, strict=True)):
            verifier.submit(place, text, truth)
        while len(found) < len(texts):
            found |= {place: verdict.correct for place, verdict in verifier.poll(0.05)}
    finally:
        verifier.close()
    return [found[place] for place in range(len(texts))]


def rewards(texts: Sequence[str], truths: Sequence[str], num_tokens: Sequence[int], config: Config) -> list[float]:
    """What the learner would make of these completions: verdict and soft overlong punishment, in order."""
    shaped = group_rewards(
        verdicts(texts, truths, config.reward),
        num_tokens,
        max_tokens=config.sampling.max_tokens,
        overlong_cache_tokens=config.reward.overlong_cache_tokens,
        overlong_penalty=config.reward.overlong_penalty,
    )
    return [float(reward) for reward in shaped]


def curve(evaluate: Evaluator, checkpoints: Sequence[tuple[float, Path]]) -> list[Point]:
    """Evaluate checkpoints, given with the training seconds at which they were written."""
    return [Point(seconds, *evaluate(path)) for seconds, path in checkpoints]


def time_to(points: Sequence[Point], target: float) -> float | None:
    """Seconds until accuracy first reached ``target``, interpolated between checkpoints; None if it never did."""
    for before, after in zip([points[0], *points], points, strict=False):
        if after.accuracy >= target:
            rise = after.accuracy - before.accuracy
            share = (target - before.accuracy) / rise if rise > 0 else 0.0
            return before.seconds + max(0.0, share) * (after.seconds - before.seconds)
    return None


def plain_prompts() -> Data:
    """How prompts are read where a trainer knows no chat template: as they are."""
    return Data(chat_template="never")


def one_thread() -> None:
    """Evaluate with one thread, as a worker does."""
    torch.set_num_threads(1)
