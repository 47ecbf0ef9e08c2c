"""The loop: draw a batch, train on it, publish the new weights, write down what happened.

The threads of the learner's process, and who wakes whom:

    workers' groups and heartbeats                                                        workers' requests
          |                                                                                         |
          v                                                                                         v
    [coordinator] -- a message was handled --> [main] -- publish --> [weights encoder] -- a set is ready --> [weights
          ^                                     |  ^                         |                              publisher]
          '--- trained, announced, evaluate ----'  '-------- copied ---------'

    main                waits for a full batch (``Coordinator.next_batch``), for the copy of the weights before each
                        optimizer step (``Publisher.wait_copied``) and, at the start and the end, for held-out answers;
                        each for ``run.stall_timeout_s`` at most, and the error says for what. In between it computes.
    coordinator         waits for a message, until the next heartbeat is due
    weights encoder     waits for ``publish``; copies the live parameters while the main thread is in the next forward
                        and backward passes
    weights publisher   waits for a request or a new set, until the next heartbeat is due

A thread that ends by itself is found by the main thread's ``check``, a few times a second, and ends the run.
"""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from dapo_async.config.settings import Config
from dapo_async.coordinator.coordinator import Coordinator, TrainBatch
from dapo_async.coordinator.evaluation import EvaluationJob, make_job, summarise
from dapo_async.coordinator.liveness import look_after
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import Prompt
from dapo_async.errors import DapoError, MismatchError, SaveError, StallError
from dapo_async.learner.checkpoint import latest_checkpoint, save_checkpoint
from dapo_async.learner.out_of_memory import explained
from dapo_async.learner.samples import SampleWriter
from dapo_async.learner.step_metrics import StepMetrics, Totals, staleness, summary
from dapo_async.learner.update import TrainResult, Update
from dapo_async.observe.console import LiveView
from dapo_async.observe.records import TrainedBatch
from dapo_async.observe.run_folder import RunFolder
from dapo_async.rl.mismatch import band
from dapo_async.weight_sync.encoding import live_tensors
from dapo_async.weight_sync.publisher import Publisher

log = logging.getLogger(__name__)

FAR = 3.0  # times the band of a mismatch that rounding explains: there something is wrong


class Interrupted(Exception):
    """Somebody asked the run to end; it can be resumed."""


class Parts(NamedTuple):
    """What the learner drives."""

    update: Update
    coordinator: Coordinator
    publisher: Publisher
    supervisor: Supervisor | None  # of this machine's workers


class Life(NamedTuple):
    """Which life of which run this process is, and what it takes over from the ones before."""

    incarnation: Incarnation
    fixed: dict[str, Any]  # settings that no resume may change
    totals: Totals


class Learner:
    """See the module. ``asked_to_stop()`` turns true on Ctrl-C or SIGTERM."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        life: Life,
        *,
        heldout: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        folder: RunFolder,
        view: LiveView,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.update, self.coordinator, self.publisher, self.supervisor = parts
        self.totals = life.totals
        self.heldout = heldout
        self.tokenizer = tokenizer
        self.folder = folder
        self.view = view
        self.step_metrics = StepMetrics(self.coordinator, self.supervisor, self.totals)
        self._life = life
        self._samples = SampleWriter(folder, tokenizer, config.logging)
        self._asked_to_stop = asked_to_stop
        self._started = time.monotonic()
        self._evaluation: EvaluationJob | None = None
        self._phases: defaultdict[str, float] = defaultdict(float)
        self._published = -1
        self._warned = False  # of a mismatch
        # Weights are copied in the background, from the live parameters.
        self.update.before_step = lambda: self.publisher.wait_copied(config.run.stall_timeout_s)

    def run(self) -> dict[str, Any]:
        """Train until a limit is reached. Returns the summary. Raises ``Interrupted`` after saving a checkpoint.

        Whatever else ends it, a checkpoint is saved too, unless the weights are in the middle of a batch.
        """
        self._publish()
        self.totals.start = self.totals.start or self._evaluate_now()
        self.totals.final = self.totals.final or self.totals.start
        self._phases.clear()
        self.step_metrics.restart_clock()
        try:
            while not self._finished():
                batch = self.coordinator.next_batch(self._wait_tick, self._finished)
                if batch is None:
                    break
                self._step(batch)
        finally:
            if (error := sys.exception()) is not None:
                self._save_early(error)
        if not self._finished():
            log.warning(
                "all prompts are used up after %d batches (data.epochs): %s", self.version, self.coordinator.arrivals()
            )
        self.coordinator.withdraw()
        self._save()
        self.totals.final = self._evaluate_now() or self.totals.final
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """``summary.json`` as of now."""
        return summary(self.totals, self.coordinator, self.wall_s)

    @property
    def version(self) -> int:
        """Batches trained so far."""
        return self.coordinator.version

    @property
    def wall_s(self) -> float:
        """Seconds this run has taken, former processes and the warm start included."""
        return self.totals.wall_s + time.monotonic() - self._started

    # --- one batch ----------------------------------------------------------------------------------------

    def _step(self, batch: TrainBatch) -> None:
        with explained(self.config, f"training batch {self.version + 1}", self._kept):
            result = self.update.train(batch.groups, batch.version, self._tick)
        leases, prompt_ids = [one.lease for one in batch.groups], [one.prompt.id for one in batch.groups]
        # First: a batch that is counted, and so is in a checkpoint, is in the ledger whatever happens.
        self.folder.ledger.write(TrainedBatch(step=self.version + 1, leases=leases, prompt_ids=prompt_ids))
        self.coordinator.batch_trained()
        self.update.unfinished = False  # schedule and weights agree again
        if self.version % self.config.weights.push_every == 0:
            with self._timed("publish"):
                self._publish()
        self._write(batch, result)
        every = self.config.checkpoint.every
        if every and self.version % every == 0:
            with self._timed("checkpoint"):
                self._save()

    def _publish(self) -> None:
        """Hand the weights to the publisher's thread; workers may fetch them from now on."""
        if self.version > self._published:
            dtype = getattr(torch, self.config.serving_dtype)
            self.publisher.publish(self.version, live_tensors(self.update.model), dtype)
            self.coordinator.announce(self.version)
            self._published = self.version

    def _write(self, batch: TrainBatch, result: TrainResult) -> None:
        """Metrics, samples and ledger of the batch just trained; ``step`` counts from 1."""
        step = self.version
        values = self.step_metrics.batch(batch, result, self._phases)
        self._phases.clear()
        values |= self._heldout_results(step)
        known = self._samples.known
        values["batch/unknown_tokens"] = sum(int((a.group.token_ids >= known).sum()) for a in batch.groups)
        values |= self.publisher.metrics()
        self.folder.metrics.log(step, values)
        self.folder.metrics.histogram("staleness/histogram", staleness(batch), step)
        self.folder.lengths.write(self.step_metrics.lengths(step))
        self._samples.write(result, step)
        self.view.update(values, step=step)
        self._check_mismatch(result.metrics)

    def _check_mismatch(self, metrics: dict[str, float]) -> None:
        """Warn where sampler and learner disagree beyond rounding; raise ``MismatchError`` where they do by far."""
        mean, limit = metrics.get("mismatch/mean", 0.0), band(self.config)
        if mean <= limit:
            return
        engine, learner = self.config.workers.engine, self.config.model.precision
        told = (
            f"mismatch/mean = {mean:.3g} nats: the workers' engine ({engine}, {self.config.serving_dtype}) and the "
            f"learner ({learner}) disagree on tokens of the same weights by more than their precisions explain "
            f"({limit:g}), and every importance ratio carries that; dapo-async check CONFIG --parity compares them"
        )
        if not mean <= FAR * limit and self.config.learner.on_mismatch == "end":  # NaN is beyond any limit
            raise MismatchError(f'{told}. To train all the same: learner.on_mismatch = "warn"')
        if not self._warned:
            self._warned = True
            log.warning("%s", told)

    # --- evaluation ---------------------------------------------------------------------------------------

    def _heldout_results(self, step: int) -> dict[str, float]:
        """Results of an evaluation that has come in, and a new one if it is time."""
        values = {}
        if self._evaluation is not None and self._evaluation.done:
            values = self.totals.final = summarise(self._evaluation, self.config.run.seed)
            self._evaluation = None
        every = self.config.evaluation.every
        last = step >= self.config.run.batches  # another evaluation follows at once
        if every and step % every == 0 and not last and self.heldout and self._evaluation is None:
            self._evaluation = make_job(self.config, self.heldout, self.coordinator.published)
            self.coordinator.evaluate(self._evaluation)
        return values

    def _evaluate_now(self) -> dict[str, float]:
        """Evaluate the newest weights and wait for the result; empty without held-out prompts."""
        if not self.heldout:
            return {}
        with self._timed("evaluation"):
            self._publish()
            self._evaluation = None
            job = make_job(self.config, self.heldout, self.version, waited_for=True)
            self.coordinator.evaluate(job)
            heard, answered = time.monotonic(), 0
            while not job.done:
                self.coordinator.check()
                self._tick()
                self.view.update({}, waiting=f"held-out evaluation, {len(job.groups)} of {len(job.prompts)} prompts")
                time.sleep(0.05)
                now = time.monotonic()
                if len(job.groups) != answered:
                    heard, answered = now, len(job.groups)
                if now - heard > self.config.run.stall_timeout_s:
                    raise StallError(self.coordinator.stall_report("held-out evaluation", now - heard))
        result = summarise(job, self.config.run.seed)
        self.folder.metrics.log(self.version, result)
        self.view.update(result, waiting="")
        return result

    # --- keeping house ------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        limits = self.config.run
        if self.version >= limits.batches:
            return True
        if limits.max_minutes and self.wall_s > 60 * limits.max_minutes:
            return True
        return 0.0 < limits.target_accuracy <= self.totals.final.get("heldout/accuracy", 0.0)

    def _wait_tick(self, cause: str) -> None:
        """Called a few times a second while waiting for a batch."""
        self._tick()
        status = self.coordinator.status()
        gauges = {"workers/alive": len(status.workers), "buffer/groups": status.buffered}
        self.view.update(gauges, waiting=cause)
        if (report := self.coordinator.report()) is not None:
            log.info("no batch for %.0f s (%s): %s", report.waited_s, cause, report.arrivals)
            self.folder.metrics.log(self.version, self.step_metrics.standing() | report.metrics())

    def _tick(self) -> None:
        """Called a few times a second while waiting, and before each microbatch."""
        if self._asked_to_stop():
            raise Interrupted
        self.publisher.check()
        if self.supervisor is not None:
            look_after(self.supervisor, self.coordinator)

    def _save_early(self, error: BaseException) -> None:
        """The run ends by ``error``: save, unless a batch is half trained. ``error`` stays what ended the run."""
        if isinstance(error, SaveError):
            return  # the disk has just refused
        if self.update.unfinished:
            log.error("%s", self._kept())
            return
        try:
            self._save()
        except (DapoError, RuntimeError, MemoryError) as failure:  # of a device that has failed, or of no memory
            if isinstance(error, Interrupted):
                raise
            log.error("%s", failure)

    def _kept(self) -> str:
        """What a resume will find if the run ends now."""
        if not self.update.unfinished:
            return f"no optimizer step of the batch had begun, so a checkpoint of step {self.version} is saved"
        latest = latest_checkpoint(self.folder.checkpoints)
        stands = f"{latest} stands" if latest else "and there is no earlier one"
        return f"an optimizer step of the batch had begun, so no checkpoint is saved: {stands}"

    def _save(self) -> None:
        """Write a checkpoint of the state between two batches."""
        totals = msgspec.to_builtins(self.totals) | {"wall_s": self.wall_s}
        self.folder.ledger.sync()
        save_checkpoint(
            self.folder.checkpoints,
            self.version,
            model=self.update.model,
            tokenizer=self.tokenizer,
            optimizer=self.update.optimizer,
            state={"coordinator": self.coordinator.state(), "totals": totals, "run_id": self._life.incarnation.run_id},
            fixed=self._life.fixed,
            keep_last=self.config.checkpoint.keep_last,
        )

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._phases[phase] += time.monotonic() - started
