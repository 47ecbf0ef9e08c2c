"""Details of a base model and its tokenizer that ruin runs silently: where answers end, sizes of vocabularies, lengths.

Pure checks on configurations; each settles its detail, warns, or refuses with one sentence. Loading models is
``policy``'s business, encoding prompts ``prompts``'.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dapo_async.config.settings import Config
from dapo_async.data.prompts import Prompt, known_tokens
from dapo_async.errors import ConfigError
from dapo_async.model.loading import LOADING_ERRORS, load_architecture, reason_of

# Ends of a document and of a turn, as tokenizers of base and chat models spell them. A base model ends with the one
# and the chat template teaches the other, while its tokenizer and generation config name only one of them.
ENDS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>")
# Frequencies change with the longest sequence of a forward pass, beyond the original length.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Extend a model without training it at the new length; other kinds are trained with.
UNTRAINED = ("linear", "dynamic", "yarn")

log = logging.getLogger(__name__)


# --- where an answer ends --------------------------------------------------------------------------------


def choose_stop_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """``sampling.stop_token_ids`` or, if empty, every end of an answer that model and tokenizer name, rising.

    Raises ``ConfigError`` if there is none, or one is outside the model's vocabulary.
    """
    path, chosen = config.model.path, config.sampling.stop_token_ids
    ends = _declared_ends(config, tokenizer)
    stops = chosen or sorted(ends | _named_ends(tokenizer, vocab_size))
    if not stops:
        raise ConfigError(
            f"sampling.stop_token_ids: {path} names no end-of-sequence token; list the tokens that end an answer"
        )
    if max(stops) >= vocab_size:
        raise ConfigError(f"sampling.stop_token_ids = {stops}: the model knows only {vocab_size} tokens")
    if missed := sorted(ends - set(stops)):
        log.warning(
            "sampling.stop_token_ids = %s leaves out %s, with which the model is said to end: answers may run on to "
            "the length limit",
            stops,
            _spelled(missed, tokenizer),
        )
    log.info("answers end with %s", _spelled(stops, tokenizer))
    return stops


def _declared_ends(config: Config, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end tokens of tokenizer and generation config; of config.json where there is no generation config.

    Raises ``ConfigError`` for a generation config that cannot be read, or an end that is no token.
    """
    path, file = config.model.path, "generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(path)
    except LOADING_ERRORS as error:
        # Of a hub id without one, and of an unreachable hub, transformers says the same.
        if (Path(path) / file).is_file() or not isinstance(error, OSError):
            raise ConfigError(f'model.path = "{path}": {file} cannot be read: {reason_of(error)}') from None
        architecture = load_architecture(path, trust_remote_code=config.model.trust_remote_code)
        file, generation = "config.json", GenerationConfig.from_model_config(architecture)
    return _tokens(f'model.path = "{path}": {file}', generation.eos_token_id) | _tokens(
        f'model.path = "{path}": the tokenizer', tokenizer.eos_token_id
    )


def _tokens(place: str, ends: Any) -> set[int]:
    """``eos_token_id`` as a set: a number, a list of them, or none; a negative number means none."""
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for end in listed:
        if isinstance(end, bool) or not isinstance(end, int):
            raise ConfigError(f"{place} says eos_token_id = {ends!r}: must be the number of a token, or a list of them")
    return {end for end in listed if end >= 0}


def _named_ends(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> set[int]:
    """Tokens of ``ENDS`` that the model can sample."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[end] for end in ENDS if end in vocabulary and vocabulary[end] < vocab_size}


def _spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    return ", ".join(f"{number} ({words.get(number, 'unknown')})" for number in ids)


# --- vocabularies of different sizes ---------------------------------------------------------------------


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], path: str, vocab_size: int) -> None:
    """Refuse prompts with tokens that the model at ``path`` lacks; say it if the tokenizer lacks tokens of the model.

    Raises ``ConfigError`` naming the prompt.
    """
    known = known_tokens(tokenizer)
    for prompt in prompts:
        highest = int(np.max(prompt.ids))
        if highest >= vocab_size:
            raise ConfigError(
                f'prompt "{prompt.id}" holds token {_spelled([highest], tokenizer)}, but the model at model.path = '
                f"{path} knows only {vocab_size} tokens: resize its embeddings to the tokenizer's {known}, or give it "
                "its own tokenizer"
            )
    if vocab_size > known:
        log.info(
            "the model has %d tokens, the tokenizer %d: sampled ones beyond decode to nothing and are counted "
            "(batch/unknown_tokens)",
            vocab_size,
            known,
        )


# --- how long a sequence may be --------------------------------------------------------------------------


class Rope(NamedTuple):
    """Rotary position embedding of one kind of layer."""

    kind: str
    factor: float
    original: int  # positions before scaling


def check_positions(config: Config, architecture: PreTrainedConfig) -> None:
    """Refuse sequences longer than the model can tell positions apart, or than sampler and learner see alike.

    Raises ``ConfigError``; warns where rope scaling stretches the model beyond the length it was trained at.
    """
    text, path = architecture.get_text_config(), config.model.path
    longest, trained = config.longest_sequence_tokens, getattr(text, "max_position_embeddings", None)
    said = f"data.max_prompt_tokens + sampling.max_tokens = {longest}"
    if trained is None:
        return
    ropes = _ropes(text, trained)
    for rope in ropes:
        if rope.kind in LENGTH_DEPENDENT and longest > rope.original:
            raise ConfigError(
                f'{said} exceeds the {rope.original} positions beyond which the "{rope.kind}" rope scaling of '
                f"model.path = {path} changes with the longest sequence at hand, so that sampler and learner would "
                "disagree; lower one of the two, or use yarn"
            )
    limit = max([trained, *(int(rope.factor * rope.original) for rope in ropes)])
    if longest > limit:
        raise ConfigError(f"{said} exceeds what model.path = {path} was made for: {limit} positions")
    for rope in ropes:
        if rope.kind in UNTRAINED and longest > rope.original:
            log.warning(
                "%s goes beyond the %d positions that %s was trained at, on the strength of its %s rope scaling by %g",
                said, rope.original, path, rope.kind, rope.factor,
            )  # fmt: skip
            break


def _ropes(text: PreTrainedConfig, trained: int) -> list[Rope]:
    """The scaled rotary embeddings of a model; one per kind of layer where those differ."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    found = []
    for kind in kinds:
        name = str(kind.get("rope_type", "default"))
        if name != "default":
            original = int(kind.get("original_max_position_embeddings") or trained)
            found.append(Rope(name, float(kind.get("factor") or 1.0), original))
    return found
