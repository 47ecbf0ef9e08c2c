"""``dapo-async eval``: a checkpoint's held-out accuracy, sampled by workers as in training, without a learner."""

import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from dapo_async.check import load_material
from dapo_async.config import Config
from dapo_async.config_file import build_config, load_config
from dapo_async.console import LiveView, Terminal
from dapo_async.errors import CheckpointError, ConfigError, StallError
from dapo_async.evaluation import make_job, summarise
from dapo_async.launch import make_hub, make_publisher, start_workers
from dapo_async.model import load_policy
from dapo_async.peers import Incarnation
from dapo_async.prompts import PromptStream
from dapo_async.weights import serving_tensors

POLL_S = 0.1


def evaluate_checkpoint(path: Path, *, config_file: str = "", data: str = "", samples: int = 0) -> dict[str, Any]:
    """avg@k, pass@k and lengths of the model at ``path`` on ``data`` (default: the run's held-out prompts).

    Settings come from the run the checkpoint belongs to, or from ``config_file``. Raises ``DapoError``.
    """
    material = load_material(_config(path, config_file, data, samples))
    config = material.config
    started = time.monotonic()
    with contextlib.ExitStack() as cleanup:
        terminal = Terminal(stderr=True, highlight=False, markup=False, emoji=False)  # stdout is for the result
        view = cleanup.enter_context(LiveView(1, path, console=terminal))
        logs = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dapo-async-eval-"))
        incarnation = Incarnation("eval", "0")
        publisher = make_publisher(config, incarnation)
        cleanup.callback(publisher.close)
        model = load_policy(config.model, torch.device("cpu"))
        hub = make_hub(config, PromptStream(material.train, 0, False, 1), model, publisher, incarnation)
        cleanup.callback(hub.close)
        hub.withdraw()
        hub.start()
        dtype = config.model.precision if config.weights.dtype == "auto" else config.weights.dtype
        publisher.publish(0, serving_tensors(model, getattr(torch, dtype)))
        supervisor = start_workers(config, hub.address, Path(logs))
        cleanup.callback(supervisor.stop, lambda: hub.stop_workers("the evaluation has ended"), 5.0)
        job = make_job(config, material.heldout, 0)
        hub.evaluate(job)
        answered = 0
        while not job.done:
            hub.check()
            publisher.check()
            for ended in supervisor.poll():
                hub.worker_ended(ended.name)
            view.progress(len(job.groups), len(job.prompts), "held-out prompts")
            time.sleep(POLL_S)
            if len(job.groups) != answered:
                started, answered = time.monotonic(), len(job.groups)
            if time.monotonic() - started > config.run.stall_timeout_s:
                raise StallError(hub.stall_report("held-out evaluation", time.monotonic() - started))
        view.progress(len(job.prompts), len(job.prompts), "held-out prompts")
    result = {name.removeprefix("heldout/"): value for name, value in summarise(job).items()}
    return {"checkpoint": str(path), "data": config.data.heldout, **result}


def _config(path: Path, config_file: str, data: str, samples: int) -> Config:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no model here; name a checkpoint such as runs/NAME/checkpoints/step_100")
    run_config = path.absolute().parent.parent / "config.json"
    if config_file:
        config = load_config(config_file)
    elif run_config.is_file():
        config = build_config(json.loads(run_config.read_text(encoding="utf-8")), str(run_config))
    else:
        raise ConfigError(f"{path} is no checkpoint of a run (there is no {run_config}): say --config FILE")
    heldout = data or config.data.heldout
    if not heldout:
        raise ConfigError(f"{path}: its run has no held-out prompts; say --data FILE")
    replace = msgspec.structs.replace
    return replace(
        config,
        demo=replace(config.demo, task=""),
        model=replace(config.model, path=str(path), attention="auto"),
        data=replace(config.data, train=heldout, heldout=heldout),
        schedule=replace(config.schedule, groups_per_batch=1),
        learner=replace(config.learner, minibatches=1),
        workers=replace(config.workers, count=max(1, config.workers.count)),
        evaluation=replace(config.evaluation, samples=samples or config.evaluation.samples),
        network=replace(config.network, control="tcp://127.0.0.1:*", weights="tcp://127.0.0.1:*"),
    )
