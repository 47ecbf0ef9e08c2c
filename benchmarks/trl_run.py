"""One run of TRL's GRPOTrainer with DAPO's loss on the demo's task, in a process of its own; ``vs_trl`` starts it.

Same model, prompts, reward, batch, learning rate, clipping and sampling as the configuration of ``dapo-async``.
What TRL would spend on logging, saving, bf16 and gradient checkpointing is off. Writes told.json: seconds and tokens
per step on a clock that stands still while weights are saved, and the folders of the saved weights.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

try:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise SystemExit(
        f"this benchmark runs TRL, which is not here ({error.name} is missing): "
        'install it, for example with pip install "dapo-async[bench]"'
    ) from None

from benchmarks.accuracy import plain_prompts, rewards
from dapo_async.config.settings import Config
from dapo_async.config.toml import load_config
from dapo_async.data.prompts import load_prompts
from dapo_async.model.tokenizer import TextDecoder


class Rewarder:
    """TRL's reward function: the verifier and the punishment that the learner of ``dapo-async`` applies.

    The first batch is checked: TRL's texts are those a worker would send to the verifier, every completion ends with
    the stop token or at the length limit, and holds no stop token before.
    """

    __name__ = "verdict_and_overlong_punishment"

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._config, self._decode, self._eos = config, TextDecoder(tokenizer), tokenizer.eos_token_id
        self.tokens: list[int] = []  # generated, one entry per call
        self.right: list[float] = []

    def __call__(
        self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], truth: Sequence[str], **_: Any
    ) -> list[float]:
        if not self.tokens:
            self._check(completions, completion_ids)
        self.tokens.append(sum(map(len, completion_ids)))
        found = rewards(completions, truth, [len(ids) for ids in completion_ids], self._config)
        self.right.append(sum(reward > 0 for reward in found) / len(found))
        return found

    def _check(self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> None:
        for text, ids in zip(completions, completion_ids, strict=True):
            ours = self._decode(torch.tensor(ids, dtype=torch.int32).numpy())
            assert text == ours, f"TRL judges {text!r}, a worker would judge {ours!r}"
            assert self._eos not in ids[:-1], f"a stop token within {ids}"
            whole = ids[-1] == self._eos or len(ids) == self._config.sampling.max_tokens
            assert whole, f"{ids} ends neither with the stop token nor at the length limit"


class Clock(TrainerCallback):
    """Seconds of training at the end of each step, and weights saved off that clock."""

    def __init__(self, folder: Path, every: int, max_seconds: float) -> None:
        self._folder, self._every, self._limit = folder, every, max_seconds
        self._started = self._excluded = 0.0
        self.seconds: list[float] = []
        self.saved: list[tuple[float, str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._started - self._excluded)
        if self._every and state.global_step % self._every == 0:
            path = self._folder / f"step_{state.global_step}"
            model.save_pretrained(path)
            self.saved.append((self.seconds[-1], str(path)))
        if self._limit and self.seconds[-1] > self._limit:
            control.should_training_stop = True
        self._excluded += time.monotonic() - now


def settings(config: Config, arguments: argparse.Namespace) -> GRPOConfig:
    """The configuration of ``dapo-async`` in TRL's words."""
    groups, size, optimizer = config.schedule.groups_per_batch, config.sampling.group_size, config.optimizer
    if (groups * size) % arguments.microbatch:
        raise SystemExit(f"--microbatch must divide the {groups * size} completions of a batch")
    return GRPOConfig(
        output_dir=str(arguments.out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=arguments.microbatch,
        gradient_accumulation_steps=groups * size // arguments.microbatch,
        num_generations=size,
        max_completion_length=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        loss_type="dapo",
        epsilon=config.objective.clip_low,
        epsilon_high=config.objective.clip_high,
        beta=0.0,
        learning_rate=arguments.lr or optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.warmup_batches,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=0.0 if arguments.lr else optimizer.weight_decay,
        max_grad_norm=optimizer.grad_clip,
        max_steps=arguments.steps,
        seed=arguments.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="TOML file of dapo-async")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--out", type=Path, required=True, help="folder for saved weights")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--max-seconds", type=float, default=0.0, help="of training; 0: no limit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--microbatch", type=int, default=128, help="completions per forward pass")
    parser.add_argument("--lr", type=float, default=0.0, help="0: the configuration's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's own dependencies
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, arguments.set)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = load_prompts(config.data.train, tokenizer, plain_prompts()).prompts
    rewarder, clock = Rewarder(config, tokenizer), Clock(arguments.out, arguments.save_every, arguments.max_seconds)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32),
        reward_funcs=[rewarder],  # type: ignore[list-item]
        args=settings(config, arguments),
        train_dataset=Dataset.from_list([{"prompt": prompt.text, "truth": prompt.truth} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    told = {"seconds": clock.seconds, "tokens": rewarder.tokens, "right": rewarder.right, "saved": clock.saved}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "told.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
