"""``dapo-async check CONFIG --parity``: the same tokens through the workers' engine and through the learner's model.

Workers answer a few training prompts with the learner's own weights; the learner then computes the log-probs of the
very tokens they sampled. Whatever differs is arithmetic, and would sit in every importance ratio of the run.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from dapo_async.check import Material
from dapo_async.config import Config
from dapo_async.errors import StallError
from dapo_async.evaluation import EvaluationJob
from dapo_async.intake import Answer
from dapo_async.launch import make_hub, make_publisher, make_update, start_workers
from dapo_async.mismatch import Mismatch, band
from dapo_async.peers import Incarnation
from dapo_async.prompts import PromptStream
from dapo_async.weights import serving_tensors

PROMPTS = 16
SAMPLES = 4
POLL_S = 0.1


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
        worker = config.model.precision if config.weights.dtype == "auto" else config.weights.dtype
        verdict = "passed" if self.passed else "FAILED: importance ratios would carry this error from the first batch"
        return (
            f"# parity: workers ({config.workers.engine}, {worker}) against learner ({config.model.precision}), "
            f"{self.num_tokens} tokens at temperature {config.sampling.temperature:g}\n"
            f"#   difference of log-probs, nats: mean {found['mean']:.2e}, max {found['max']:.2e}, "
            f"k1 {found['k1']:+.2e}, k3 {found['k3']:.2e}\n"
            f"#   band for these precisions: mean up to {self.band:g}: {verdict}"
        )


def check_parity(material: Material, progress: Callable[[int, int, str], None]) -> Parity:
    """Sample and compare. ``progress`` hears how many prompts of how many are answered. Raises ``DapoError``."""
    config = _on_free_ports(material.config)
    torch.set_num_threads(config.learner.threads)
    prompts = material.train.prompts[:PROMPTS]
    with contextlib.ExitStack() as cleanup:
        logs = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dapo-async-parity-"))
        incarnation = Incarnation("parity", "0")
        publisher = make_publisher(config, incarnation)
        cleanup.callback(publisher.close)
        update = make_update(config)
        stream = PromptStream(material.train, config.run.seed, False, 1)
        hub = make_hub(config, stream, update.model, publisher, incarnation)
        cleanup.callback(hub.close)
        hub.withdraw()
        hub.start()
        dtype = config.model.precision if config.weights.dtype == "auto" else config.weights.dtype
        publisher.publish(0, serving_tensors(update.model, getattr(torch, dtype)))
        supervisor = start_workers(config, hub.address, Path(logs))
        cleanup.callback(supervisor.stop, lambda: hub.stop_workers("the check has ended"), 5.0)
        job = EvaluationJob(
            prompts,
            samples=SAMPLES,
            max_tokens=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            top_p=1.0,
            min_version=0,
        )
        hub.evaluate(job)
        heard, answered = time.monotonic(), 0
        while not job.done:
            hub.check()
            publisher.check()
            for ended in supervisor.poll():
                hub.worker_ended(ended.name)
            progress(len(job.groups), len(prompts), "prompts answered for parity")
            time.sleep(POLL_S)
            if len(job.groups) != answered:
                heard, answered = time.monotonic(), len(job.groups)
            if time.monotonic() - heard > config.run.stall_timeout_s:
                raise StallError(hub.stall_report("answers for parity", time.monotonic() - heard))
    answers = [
        Answer(number, number, prompts[number - job.first], group, "") for number, group in sorted(job.groups.items())
    ]
    mismatch = Mismatch()
    behaviour = np.concatenate([answer.group.logprobs for answer in answers])
    mismatch.add(update.logprobs(answers), torch.from_numpy(behaviour))
    return Parity(config, mismatch.num_tokens, mismatch.results(), band(config))


def _on_free_ports(config: Config) -> Config:
    """One worker on this machine is enough, whatever the run will use."""
    replace = msgspec.structs.replace
    return replace(
        config,
        network=replace(config.network, control="tcp://127.0.0.1:*", weights="tcp://127.0.0.1:*"),
        workers=replace(config.workers, count=1),
    )
