"""Puts a run together: demo, data, parts, learner; and takes it apart again in order.

``train`` starts workers on this machine and learns; ``learn`` is the same with ``workers.count = 0``. Everything
that can be refused is refused before the first process starts.
"""

import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from dapo_async.config.settings import Config
from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import PromptStream
from dapo_async.demo.demo import prepare_demo
from dapo_async.errors import DamagedCheckpoint, DapoError
from dapo_async.learner.checkpoint import load_checkpoint
from dapo_async.learner.learner import Interrupted, Learner, Life, Parts
from dapo_async.learner.step_metrics import Totals
from dapo_async.learner.update import Update
from dapo_async.observe.checkpoint_folder import checkpoints_to_try, read_manifest, set_aside
from dapo_async.observe.console import LiveView
from dapo_async.observe.records import NO_STEP
from dapo_async.observe.run_folder import RunFolder, begin_life, check_ledger, new_run, only_writer, run_to_resume
from dapo_async.run.check import Material, check_early, load_material
from dapo_async.run.memory_check import check_memory
from dapo_async.run.parts import make_coordinator, make_publisher, make_update, start_workers
from dapo_async.schedule.deadlines import check_room
from dapo_async.system.cores import crowding, num_cores
from dapo_async.system.malloc import keep_freed_memory
from dapo_async.system.signals import StopSignals
from dapo_async.transport.addresses import from_outside
from dapo_async.transport.keys import LearnerKeys

log = logging.getLogger(__name__)

TEMPLATE_DATE = "data.template_date"  # its name among the settings that are fixed


class RunResult(NamedTuple):
    """How a run ended."""

    folder: Path | None  # None: it ended before it had one
    summary: dict[str, Any]
    interrupted: int | None  # the signal that ended it


def train(config: Config, *, resume: bool = False, resume_from: str = "", stop: StopSignals | None = None) -> RunResult:
    """Run ``config`` to its end, on this machine's workers and on any that connect. Raises ``DapoError``.

    ``resume_from`` names the checkpoint that a resumed run goes on from, such as ``step_40``; empty: the newest.
    """
    stop = stop or StopSignals()
    started = time.monotonic()
    check_early(config)
    check_memory(config)
    with contextlib.ExitStack() as cleanup:
        path, checkpoints = None, list[Path]()
        if resume:
            path, _ = run_to_resume(config)
            cleanup.enter_context(only_writer(path))
            checkpoints = checkpoints_to_try(path / "checkpoints", resume_from)
        config = with_date_of(config, checkpoints)
        cleanup.enter_context(stop.installed())
        view = cleanup.enter_context(LiveView(config.run.batches, path or config.run.name, config.run.max_minutes))

        def progress(done: int, total: int, text: str) -> None:
            if stop():
                raise Interrupted
            view.progress(done, total, text)

        try:
            config, warm_start_s = prepare_demo(config, progress)
        except Interrupted:
            view.message("interrupted during the warm start; nothing was kept")
            return RunResult(None, {}, stop.received)
        material = load_material(config)
        if path is None:
            path = new_run(config)
            cleanup.enter_context(only_writer(path))
        view.run_folder = path
        result = _run(material, path, checkpoints, view, stop, warm_start_s, started, resume)
        view.summary(result.summary, path)
        return result


def _run(
    material: Material,
    path: Path,
    checkpoints: Sequence[Path],
    view: LiveView,
    stop: StopSignals,
    warm_start_s: float,
    started: float,
    resume: bool,
) -> RunResult:
    config = material.config
    torch.set_num_threads(config.learner.threads)
    keep_freed_memory()
    torch.manual_seed(config.run.seed)
    update = make_update(config)
    fixed = fixed_settings(config, material)
    state = _load_first_whole(checkpoints, update, fixed)
    if state is not None:
        state.setdefault("coordinator", state.get("hub"))  # its name in checkpoints of before
        # Before anything is written.
        check_room(state["coordinator"]["schedule"], config.schedule)
        check_ledger(path, state["coordinator"]["schedule"]["version"])
    incarnation = _incarnation(state)
    totals = msgspec.convert(state["totals"], Totals) if state else Totals(warm_start_s=warm_start_s)
    totals.wall_s += time.monotonic() - started
    with contextlib.ExitStack() as cleanup:
        step = (state["coordinator"]["schedule"]["version"] if state else NO_STEP) if resume else None
        if step is not None:
            set_aside(path / "checkpoints", step)  # first: what is cut below would not go with them
        folder = RunFolder(path, step)
        cleanup.callback(folder.close)
        begin_life(folder, config)
        keys = LearnerKeys(config.network.keys) if config.network.keys else None
        publisher = make_publisher(config, incarnation, keys)
        cleanup.callback(publisher.close)
        stream = PromptStream(material.train, config.run.seed, config.data.shuffle, config.data.epochs)
        coordinator = make_coordinator(config, stream, update.model, publisher, incarnation, keys)
        cleanup.callback(coordinator.close)
        if state:
            coordinator.restore(state["coordinator"])
        coordinator.start()
        supervisor = _start_own_workers(config, coordinator, path / "logs", keys, cleanup)
        _warn(config, coordinator.address)
        learner = Learner(
            config,
            Parts(update, coordinator, publisher, supervisor),
            Life(incarnation, fixed, totals),
            heldout=material.heldout,
            tokenizer=material.tokenizer,
            folder=folder,
            view=view,
            asked_to_stop=stop,
        )
        return RunResult(path, _learn(learner, folder), stop.received)


def _load_first_whole(checkpoints: Sequence[Path], update: Update, fixed: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the first checkpoint that is what was written; those before it are told of. None: there is none.

    Raises ``CheckpointError`` for one that belongs to another run or model, or if all are damaged.
    """
    for checkpoint, *others in (checkpoints[place:] for place in range(len(checkpoints))):
        try:
            return load_checkpoint(checkpoint, model=update.model, optimizer=update.optimizer, fixed=fixed)
        except DamagedCheckpoint as error:
            if not others:
                raise
            log.warning("%s; %s is tried instead", error, others[0].name)
    return None


def _learn(learner: Learner, folder: RunFolder) -> dict[str, Any]:
    """The summary of the run, which is left in its folder however it ends."""
    try:
        summary = learner.run()
    except Interrupted:
        summary = learner.summary()
    finally:
        if sys.exception() is not None:
            try:
                folder.write_json("summary.json", learner.summary())
            except DapoError as failure:  # of no weight beside what ended the run
                log.error("%s", failure)
    folder.write_json("summary.json", summary)
    return summary


def _start_own_workers(
    config: Config, coordinator: Coordinator, logs: Path, keys: LearnerKeys | None, cleanup: contextlib.ExitStack
) -> Supervisor:
    """Start this machine's workers; ``cleanup`` ends them."""
    folder = cleanup.enter_context(keys.for_local_workers(logs.parent)) if keys else None
    supervisor = start_workers(config, coordinator, logs, keys=folder)
    cleanup.callback(supervisor.stop, lambda: coordinator.stop_workers("the run has ended"), 5.0)
    return supervisor


def _warn(config: Config, address: str) -> None:
    if config.network.insecure:
        log.warning("network.insecure = true: prompts, answers and weights travel unencrypted and unauthenticated")
    if crowded := crowding(config, num_cores()):
        log.warning("%s", crowded)
    if not config.workers.count:
        connect = from_outside(address) + (" --keys FOLDER" if config.network.keys else "")
        log.warning("no workers are started here; connect some with: dapo-async work --connect %s", connect)


def with_date_of(config: Config, checkpoints: Sequence[Path]) -> Config:
    """Lets a chat template print the day on which the run began, so that its prompts are the ones that it had."""
    began = ""
    for checkpoint in checkpoints:
        with contextlib.suppress(DamagedCheckpoint):  # told when it is loaded
            began = read_manifest(checkpoint).fixed.get(TEMPLATE_DATE, "")
            break
    if config.data.template_date or not began:
        return config
    return msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, template_date=began))


def fixed_settings(config: Config, material: Material) -> dict[str, Any]:
    """What must not change between two lives of a run: seed, prompts and the shape of groups and batches."""
    fixed = {
        "run.seed": config.run.seed,
        "data.shuffle": config.data.shuffle,
        "fingerprint of data.train's prompts": material.train.fingerprint,
        "sampling.group_size": config.sampling.group_size,
        "sampling.max_tokens": config.sampling.max_tokens,
        "schedule.groups_per_batch": config.schedule.groups_per_batch,
    }
    date = config.data.template_date
    return fixed | {TEMPLATE_DATE: date} if date else fixed


def _incarnation(state: dict[str, Any] | None) -> Incarnation:
    """A name for this life. Not counted: two lives may begin with the same checkpoint, and must not share a name."""
    run_id = secrets.token_hex(4) if state is None else str(state["run_id"])
    return Incarnation(run_id, secrets.token_hex(4))
