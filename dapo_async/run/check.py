"""Loads what a run is made of, and refuses what cannot work, before anything is started."""

import contextlib
import errno
from collections.abc import Sequence
from datetime import date
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from dapo_async.config.settings import Config, Network
from dapo_async.data.prompts import Prompt, PromptSet, load_prompts, prints_date
from dapo_async.errors import ConfigError
from dapo_async.model.checks import check_positions, check_vocabulary, choose_stop_tokens
from dapo_async.model.forward_pass import hardware_of, resolve_forward_pass
from dapo_async.model.loading import empty_model
from dapo_async.model.policy import check_architecture, make_accelerator
from dapo_async.model.tokenizer import load_tokenizer
from dapo_async.model.weight_files import check_ties_of_files
from dapo_async.run.truths import READ_AS_MATHEMATICS, check_truths
from dapo_async.system.cores import num_cores, share_cores
from dapo_async.system.vllm_release import check_vllm
from dapo_async.transport.keys import LearnerKeys
from dapo_async.transport.sockets import Listener
from dapo_async.verify.verifier import check_verifier


class Material(NamedTuple):
    """What a run is made of besides the model's weights."""

    config: Config  # with everything resolved
    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    heldout: Sequence[Prompt]


def load_material(config: Config) -> Material:
    """Tokenizer and prompts of ``config`` (no demo left in it), and the configuration with all resolved that they tell.

    Raises ``ConfigError`` naming the setting, its value and what would be right.
    """
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    config = _with_date(config, tokenizer)
    # Of "exact" and of a user's own verifier a list may be what the truth is.
    load = partial(
        load_prompts, tokenizer=tokenizer, data=config.data, unwrap=config.reward.verifier in READ_AS_MATHEMATICS
    )
    train = load(config.data.train)
    heldout = load(config.data.heldout).prompts if config.data.heldout else []
    check_truths(config.reward, {config.data.train: train.prompts, config.data.heldout: heldout})
    config = _resolve(config, tokenizer, [*train.prompts, *heldout])
    batch = config.schedule.groups_per_batch
    if batch > len(train.prompts):
        raise ConfigError(
            f"schedule.groups_per_batch = {batch}: data.train = {config.data.train} holds only {len(train.prompts)} "
            "prompts; a batch must not be larger than the data"
        )
    return Material(config, tokenizer, train, heldout)


def _with_date(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Says which day the chat template prints, if it prints one: prompts must not change while the run goes on."""
    if config.data.template_date or config.data.chat_template == "never" or not prints_date(tokenizer):
        return config
    data = msgspec.structs.replace(config.data, template_date=date.today().isoformat())
    return msgspec.structs.replace(config, data=data)


def check_early(config: Config) -> None:
    """What can be refused before a demo is built or a model loaded: verifier, devices, ports, sizes of a demo.

    Raises ``ConfigError``.
    """
    check_verifier(config.reward)
    resolve_forward_pass(config, hardware_of(make_accelerator(config.model).device))
    if config.workers.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('workers.device = "cuda", but PyTorch finds no CUDA device here; use "cpu" or "auto"')
    if config.workers.engine == "vllm" and config.workers.count:
        check_vllm()
    if config.model.trust_remote_code and config.workers.engine == "vllm":
        raise ConfigError('model.trust_remote_code = true works with workers.engine = "torch" only, not with "vllm"')
    _check_ports(config.network)
    demo = config.demo
    if demo.task and config.schedule.groups_per_batch > demo.train_prompts:
        raise ConfigError(
            f"schedule.groups_per_batch = {config.schedule.groups_per_batch}: demo.train_prompts is only "
            f"{demo.train_prompts}; a batch must not be larger than the data"
        )
    if demo.task and config.data.max_prompt_tokens < 2 * demo.max_terms:
        raise ConfigError(
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens}: chains of demo.max_terms = {demo.max_terms} "
            f"terms have {2 * demo.max_terms} tokens"
        )


def _check_ports(network: Network) -> None:
    """Listen on both addresses for a moment, with the run's keys."""
    keys = LearnerKeys(network.keys).for_listeners if network.keys else None
    with contextlib.ExitStack() as listeners:
        for name, address in (("control", network.control), ("weights", network.weights)):
            size = network.max_message_mb << 20
            try:
                listener = Listener(address, max_message_bytes=size, insecure=network.insecure, keys=keys)
            except ConfigError as error:
                taken = getattr(error.__context__, "errno", None) == errno.EADDRINUSE
                hint = " (a run that is still going on?)" if taken else ""
                raise ConfigError(f"network.{name}: {error}{hint}") from None
            listeners.callback(listener.close)


def _resolve(config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Config:
    """Check model, tokenizer and lengths against each other; fill in stop tokens and threads: all agree on them."""
    model = empty_model(config.model.path, trust_remote_code=config.model.trust_remote_code)
    architecture = model.config
    check_architecture(model, config.model.path)
    check_ties_of_files(config.model.path, model)
    check_positions(config, architecture)
    vocab_size = architecture.get_text_config().vocab_size
    check_vocabulary(tokenizer, prompts, config.model.path, vocab_size)
    stops = choose_stop_tokens(config, tokenizer, vocab_size)
    config = share_cores(config, num_cores())
    return msgspec.structs.replace(config, sampling=msgspec.structs.replace(config.sampling, stop_token_ids=stops))
