"""Makes what ``[demo]`` asks for: data, tokenizer and a tiny warm-started model, kept in a cache folder.

The task's texts are ``sums``'s, the supervised run is ``warm_start``'s; this module owns the files.
"""

import errno
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from dapo_async.config.settings import Config, Demo
from dapo_async.demo import sums
from dapo_async.demo.warm_start import Example, Progress, warm_start
from dapo_async.errors import ConfigError

FORMAT = 1  # raise it when the same settings would build something else
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
FILES = ("train.jsonl", "heldout.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json")
MOST_THREADS = 8  # more only get in each other's way at this size
# Terse answers are hard to get right and need no skill to be chosen, so few are shown, with a larger say in the choice.
TERSE_SHOWN = 0.15


def prepare_demo(config: Config, progress: Progress) -> tuple[Config, float]:
    """Build the demo, or find it built, and fill in ``model.path``, ``data.train`` and ``data.heldout``.

    Returns the resolved configuration (``demo.task`` is empty in it) and the seconds the warm start took, 0.0 if
    nothing had to be built. A configuration without a demo comes back unchanged. ``progress(done, total, text)`` is
    called a few times a second while the model learns. Raises ``ConfigError`` if the cache folder cannot be used.
    """
    if not config.demo.task:
        return config, 0.0
    folder = cache_root(config.demo) / f"{config.demo.task}-{demo_key(config)}"
    seconds = 0.0
    try:
        if not folder.exists():
            seconds = _build_atomically(folder, config, progress)
    except OSError as error:
        raise ConfigError(f"demo.cache: cannot write to {folder.parent}: {error.strerror or error}") from None
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} has lost {', '.join(missing)}: delete that folder, and it will be built anew")
    replace = msgspec.structs.replace
    resolved = replace(
        config,
        demo=replace(config.demo, task=""),
        model=replace(config.model, path=str(folder / "model")),
        data=replace(config.data, train=str(folder / "train.jsonl"), heldout=str(folder / "heldout.jsonl")),
    )
    return resolved, seconds


def cache_root(demo: Demo) -> Path:
    """``demo.cache``, or ``dapo-async`` in the user's cache folder."""
    if demo.cache:
        return Path(demo.cache).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dapo-async"


def demo_key(config: Config) -> str:
    """A short hash of all that decides what is built."""
    demo = msgspec.structs.replace(config.demo, cache="")
    facts = [FORMAT, demo, config.run.seed, str(torch.__version__), transformers.__version__]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]


def _build_atomically(folder: Path, config: Config, progress: Progress) -> float:
    """Build beside ``folder`` and rename, so that it exists whole or not at all. Returns the warm start's seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary:
        built = Path(temporary) / "demo"
        built.mkdir()
        seconds = build_demo(built, config.demo, config.run.seed, progress)
        try:
            built.rename(folder)
        except OSError as error:
            # Another run built the same demo meanwhile: its files are as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    return seconds


def build_demo(folder: Path, demo: Demo, seed: int, progress: Progress) -> float:
    """Write data, tokenizer and warm-started model into ``folder``; the seconds that the warm start took.

    The same settings and seed give the same files, bit for bit, on one kind of machine.
    """
    rng = random.Random(f"sums-{seed}")
    train, heldout = sums.split_chains(demo.train_prompts, demo.heldout_prompts, demo.min_terms, demo.max_terms, rng)
    assert not set(train) & set(heldout)
    _write_prompts(folder / "train.jsonl", train)
    _write_prompts(folder / "heldout.jsonl", heldout)
    tokenizer = make_tokenizer()
    disable_progress_bar()  # of transformers; it would write through the live view
    tokenizer.save_pretrained(folder / "model")
    with _torch_settings(seed, demo.threads):
        model = make_model(tokenizer, demo)
        start = time.monotonic()
        examples = warm_start_examples(tokenizer, demo, frozenset(heldout), rng)
        warm_start(model, examples, demo.warm_start_iterations, demo.warm_start_batch, demo.warm_start_lr, progress)
        seconds = time.monotonic() - start
    model.save_pretrained(folder / "model")
    return seconds


def warm_start_examples(
    tokenizer: PreTrainedTokenizerFast, demo: Demo, heldout: frozenset[str], rng: random.Random
) -> Iterator[Example]:
    """Endless chains, none of them held out, worked or answered at once.

    They teach to answer at once with a probability of ``demo.terse_share``: answers are shown in other shares, and
    ``choice_weight`` makes up for it.
    """
    vocabulary = tokenizer.get_vocab()
    shown = min(TERSE_SHOWN, demo.terse_share)
    while True:
        chain = sums.draw_chain(rng, demo.min_terms, demo.max_terms)
        if chain in heldout:
            continue
        if rng.random() < shown:
            answer, weight = sums.terse_answer(chain), demo.terse_share / shown
        else:
            answer, weight = sums.worked_answer(chain), (1 - demo.terse_share) / (1 - shown)
        yield Example([vocabulary[c] for c in chain], [vocabulary[c] for c in answer] + [vocabulary[EOS]], weight)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task. No chat template, nothing added around a text."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *sums.ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, demo: Demo) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights and heads of 32; rotary angles suited to texts of a hundred tokens."""
    heads = max(2, demo.hidden_size // 32)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=demo.hidden_size,
            intermediate_size=3 * demo.hidden_size,
            num_hidden_layers=demo.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _write_prompts(path: Path, chains: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for chain in chains:
            file.write(json.dumps({"prompt": chain, "answer": str(sums.running_totals(chain)[-1])}) + "\n")


@contextmanager
def _torch_settings(seed: int, threads: int) -> Iterator[None]:
    """Seeded initialisation and this many threads (0: all cores), both as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or min(os.cpu_count() or 1, MOST_THREADS))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
