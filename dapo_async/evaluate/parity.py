"""``dapo-async check CONFIG --parity``: the same tokens through the workers' engine and through the learner's model.

Workers answer a few training prompts with the learner's own weights; the learner then computes the log-probs of the
very tokens they sampled. Whatever differs is arithmetic, and would sit in every importance ratio of the run.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from dapo_async.config.settings import Config
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.groups import RolloutGroup
from dapo_async.evaluate.gather import LOCAL, gather
from dapo_async.rl.mismatch import Mismatch, band
from dapo_async.run.check import Material
from dapo_async.run.parts import make_update
from dapo_async.weight_sync.encoding import serving_tensors

PROMPTS = 16
SAMPLES = 4


class Parity(NamedTuple):
    """What was compared, and how far apart it is."""

    config: Config
    num_tokens: int
    results: dict[str, float]  # see ``Mismatch.results``
    band: float  # largest mean that passes, in nats

    @property
    def passed(self) -> bool:
        """Whether the mean difference is one that the precisions explain."""
        return self.results["mean"] <= self.band

    def report(self) -> str:
        """A few lines for people."""
        config, found = self.config, self.results
        verdict = "passed" if self.passed else "FAILED: importance ratios would carry this error from the first batch"
        return (
            f"# parity: workers ({config.workers.engine}, {config.serving_dtype}) against learner "
            f"({config.model.precision}), {self.num_tokens} tokens at temperature {config.sampling.temperature:g}\n"
            f"#   difference of log-probs, nats: mean {found['mean']:.2e}, max {found['max']:.2e}, "
            f"k1 {found['k1']:+.2e}, k3 {found['k3']:.2e}\n"
            f"#   band for these precisions: mean up to {self.band:g}: {verdict}"
        )


def check_parity(material: Material, progress: Callable[[int, int], None]) -> Parity:
    """Sample and compare. ``progress`` hears how many prompts of how many are answered. Raises ``DapoError``."""
    config = _on_free_ports(material.config)
    torch.set_num_threads(config.learner.threads)
    prompts = material.train.prompts[:PROMPTS]
    update = make_update(config)
    tensors = serving_tensors(update.model, getattr(torch, config.serving_dtype))
    job = EvaluationJob(
        prompts,
        samples=SAMPLES,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        top_p=1.0,
        min_version=0,
        waited_for=True,
    )
    vocab_size = int(update.model.get_output_embeddings().weight.shape[0])
    coming = gather(config, material, job, tensors, vocab_size, progress, learner=True)
    groups = [
        RolloutGroup(place, place, prompts[place], group, "") for place, group in sorted(coming, key=lambda one: one[0])
    ]
    mismatch = Mismatch()
    behaviour = np.concatenate([rollout.group.logprobs for rollout in groups])
    mismatch.add(update.logprobs(groups), torch.from_numpy(behaviour))
    return Parity(config, mismatch.num_tokens, mismatch.results(), band(config))


def _on_free_ports(config: Config) -> Config:
    """One worker on this machine is enough, whatever the run will use."""
    replace = msgspec.structs.replace
    return replace(
        config,
        network=replace(config.network, **LOCAL),
        workers=replace(config.workers, count=1),
    )
