"""The parts of a run, each made from the configuration: what trains, publishes, coordinates, generates."""

import os
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dapo_async.config.settings import Config
from dapo_async.coordinator.coordinator import Coordinator
from dapo_async.coordinator.supervisor import Supervisor
from dapo_async.coordinator.workers import Incarnation
from dapo_async.data.prompts import PromptStream
from dapo_async.learner.update import Update
from dapo_async.model.cpu.proof import prove
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.loading import load_architecture
from dapo_async.model.policy import load_policy, make_accelerator, make_optimizer
from dapo_async.system.placement import place_workers, visible_to
from dapo_async.transport.keys import LearnerKeys
from dapo_async.weight_sync.publisher import Publisher


def make_update(config: Config) -> Update:
    """Model, optimizer and, with a KL penalty, the frozen reference model."""
    accelerator = make_accelerator(config.model)
    architecture = load_architecture(config.model.path, trust_remote_code=config.model.trust_remote_code)
    forward_pass = resolve_forward_pass(config, hardware_of(accelerator.device), architecture)
    model = load_policy(config.model, forward_pass, accelerator.device)
    reference: PreTrainedModel | None = None
    if config.objective.kl_coef:
        reference = load_policy(config.model, forward_pass, accelerator.device).eval().requires_grad_(False)
    forward_pass = prove(forward_pass, model)
    optimizer = make_optimizer(model, config.optimizer, accelerator)
    return Update(config, model, optimizer, accelerator, forward_pass, reference=reference)


def make_publisher(config: Config, incarnation: Incarnation, keys: LearnerKeys | None = None) -> Publisher:
    """A publisher that listens on ``network.weights``, with its threads running."""
    network = config.network
    return Publisher(
        network.weights,
        incarnation=incarnation.name,
        max_message_bytes=network.max_message_mb << 20,
        heartbeat_s=network.heartbeat_s,
        insecure=network.insecure,
        keys=keys.for_listeners if keys else None,
        way=config.weights.way,
    )


def make_coordinator(
    config: Config,
    stream: PromptStream,
    model: PreTrainedModel,
    publisher: Publisher,
    incarnation: Incarnation,
    keys: LearnerKeys | None,
) -> Coordinator:
    """A coordinator that leases ``stream`` and sends workers to ``publisher`` for their weights."""
    return Coordinator(
        config,
        stream,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        weights_address=publisher.address,
        incarnation=incarnation,
        keys=keys.for_listeners if keys else None,
    )


def start_workers(
    config: Config, coordinator: Coordinator, logs: Path, *, learner: bool = True, keys: Path | None = None
) -> Supervisor:
    """Start ``workers.count`` rollout workers that connect to ``coordinator``, each on its GPUs.

    ``learner``: whether one computes beside them. ``keys``: their folder, where the wire is encrypted.
    """
    places = place_workers(config, torch.cuda.device_count(), learner=learner)

    def command(name: str) -> list[str]:
        own = ["--keys", str(keys)] if keys else []
        return [sys.executable, "-P", "-m", "workers.start", "--connect", coordinator.address, "--name", name, *own]

    env = os.environ | {
        "OMP_NUM_THREADS": str(config.workers.threads),
        # Idle threads of a pool must not spin on a core that somebody else needs.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    names = [f"w{number}" for number in range(config.workers.count)]
    env |= coordinator.reserve(names)
    supervisor = Supervisor(
        names,
        command,
        logs,
        env=env,
        own_env=dict(zip(names, visible_to(places, os.environ), strict=False)),
        max_restarts=config.workers.max_restarts,
    )
    supervisor.start()
    return supervisor
