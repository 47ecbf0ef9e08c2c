"""Has workers of this machine answer prompts without a learner: for ``eval`` and for ``check --parity``."""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dapo_async.config.settings import Config
from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.evaluation import EvaluationJob
from dapo_async.coordinator.liveness import look_after
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import PromptStream
from dapo_async.errors import DapoError, StallError
from dapo_async.run.check import Material
from dapo_async.run.parts import make_publisher, start_workers
from dapo_async.transport.addresses import LOOPBACK
from dapo_async.transport.messages import Group
from dapo_async.weight_sync.publisher import Publisher

POLL_S = 0.1
# Of ``network``: it all stays on this machine, whatever the run does.
LOCAL: dict[str, Any] = {"control": LOOPBACK, "weights": LOOPBACK, "insecure": False, "keys": ""}

log = logging.getLogger(__name__)


def gather(
    config: Config,
    material: Material,
    job: EvaluationJob,
    tensors: Mapping[str, torch.Tensor],
    vocab_size: int,
    progress: Callable[[int, int], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
    *,
    learner: bool = False,
) -> Generator[tuple[int, Group], None, None]:
    """Answers to ``job``, each with its place in ``job.prompts``, as they come; ends early once asked to stop.

    ``tensors`` are the weights to sample with, ``progress`` hears how many prompts of how many are answered,
    ``learner`` says that one holds its GPU meanwhile. Raises ``StallError`` when no answer comes for
    ``run.stall_timeout_s``, and ``DapoError`` when the workers cannot work; their logs are kept then, and only then.
    """
    if job.done or asked_to_stop():
        return
    with contextlib.ExitStack() as cleanup:
        logs = cleanup.enter_context(_log_folder())
        incarnation = Incarnation("gather", "0")
        publisher = make_publisher(config, incarnation)
        cleanup.callback(publisher.close)
        stream = PromptStream(material.train, 0, False, 1)
        coordinator = Coordinator(
            config, stream, vocab_size=vocab_size, weights_address=publisher.address, incarnation=incarnation
        )
        cleanup.callback(coordinator.close)
        coordinator.withdraw()
        coordinator.start()
        publisher.publish(0, tensors)
        supervisor = start_workers(config, coordinator, logs, learner=learner)
        cleanup.callback(supervisor.stop, lambda: coordinator.stop_workers("all answers are in"), 5.0)
        coordinator.evaluate(job)
        yield from _collect(job, coordinator, publisher, supervisor, progress, asked_to_stop)


@contextlib.contextmanager
def _log_folder() -> Iterator[Path]:
    """A new folder for the workers' logs, removed in the end unless what was done inside failed."""
    folder, keep = Path(tempfile.mkdtemp(prefix="dapo-async-logs-")), False
    try:
        yield folder
    except DapoError:
        keep = any(folder.iterdir())
        if keep:
            log.warning("the workers' logs are kept in %s", folder)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder)


def _collect(
    job: EvaluationJob,
    coordinator: Coordinator,
    publisher: Publisher,
    supervisor: Supervisor,
    progress: Callable[[int, int], None],
    asked_to_stop: Callable[[], bool],
) -> Iterator[tuple[int, Group]]:
    heard, total = time.monotonic(), len(job.prompts)
    taken: set[int] = set()
    while True:
        ended = job.done or asked_to_stop()  # before the last look at the answers
        new = [(place, group) for place, group in list(job.groups.items()) if place not in taken]
        for place, group in new:
            taken.add(place)
            heard = time.monotonic()
            yield place, group
        progress(total - len(job.places) + len(taken), total)
        if ended:
            return
        coordinator.check()
        publisher.check()
        look_after(supervisor, coordinator)
        if time.monotonic() - heard > coordinator.config.run.stall_timeout_s:
            raise StallError(coordinator.stall_report("answers", time.monotonic() - heard))
        time.sleep(POLL_S)
