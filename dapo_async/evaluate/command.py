"""``dapo-async eval``: how good a checkpoint or a hub model is, sampled by workers as in training, without a learner.

Waits for the workers' answers (``run.stall_timeout_s`` without any ends it). With ``--out`` every answered prompt is
kept beside it at once, so that an evaluation that was interrupted goes on where it stopped.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config, load_config, plain
from dapo_async.coordinator.evaluation import make_job, scored_answers
from dapo_async.data.prompts import PromptSet
from dapo_async.errors import CheckpointError, ConfigError
from dapo_async.evaluate.answers import AnswerFile
from dapo_async.evaluate.gather import LOCAL, gather
from dapo_async.model.forward_pass import PLAIN
from dapo_async.model.policy import load_policy
from dapo_async.observe.checkpoint_folder import latest_checkpoint
from dapo_async.observe.console import LiveView, Terminal, print_scores
from dapo_async.observe.files import write_json
from dapo_async.rl.scores import ScoredAnswer, score
from dapo_async.run.check import load_material
from dapo_async.system.signals import StopSignals
from dapo_async.weight_sync.encoding import encode_weights, serving_tensors


class EvalOptions(NamedTuple):
    """What the command line says; what it leaves empty comes from the run, or from ``config_file``."""

    model: str  # a checkpoint, a model folder or a hub id
    config_file: str = ""
    data: str = ""
    k: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    engine: str = ""
    out: Path | None = None
    resume: bool = False


class EvalResult(NamedTuple):
    """How an evaluation ended."""

    result: dict[str, Any] | None  # None: it was interrupted
    interrupted: int | None  # the signal


def evaluate(options: EvalOptions) -> EvalResult:
    """Evaluate as asked, print a table on the terminal and write the result. Raises ``DapoError``."""
    stop = StopSignals()
    if options.resume and options.out is None:
        raise ConfigError("--resume needs --out FILE: the answers of an interrupted evaluation are kept beside it")
    material = load_material(_config(options))
    config = material.config
    terminal = Terminal(stderr=True, highlight=False, markup=False, emoji=False)  # stdout is for the result
    with stop.installed(), LiveView(1, options.model, console=terminal) as view:
        limit = config.evaluation.max_prompts or len(material.heldout)
        heldout = PromptSet(config.data.heldout, list(material.heldout[:limit]), material.train.counts)
        model = load_policy(config.model, PLAIN, torch.device("cpu"))
        tensors = serving_tensors(model, getattr(torch, config.serving_dtype))
        vocab_size = int(model.get_output_embeddings().weight.shape[0])
        del model
        with contextlib.ExitStack() as cleanup:
            file = None
            if options.out is not None:
                subject = _subject(config, heldout, tensors)
                path = options.out.with_suffix(".answers.jsonl")
                file = cleanup.enter_context(AnswerFile(path, subject, len(heldout), resume=options.resume))
            answers = dict(file.kept) if file is not None else {}
            job = make_job(config, material.heldout, 0, waited_for=True, answered=set(answers))

            def progress(done: int, total: int) -> None:
                view.progress(done, total, "held-out prompts")

            coming = contextlib.closing(gather(config, material, job, tensors, vocab_size, progress, stop))
            for place, group in cleanup.enter_context(coming):
                answers[place] = scored_answers(group)
                if file is not None:
                    file.write(place, heldout[place].id, answers[place])
        if len(answers) < len(heldout):
            kept = f"kept in {file.path}: go on with --resume" if file else "not kept; --out FILE would have kept them"
            view.message(f"interrupted: {len(answers)} of {len(heldout)} prompts are answered, {kept}")
            return EvalResult(None, stop.received)
    result = _result(options, config, [answers[place] for place in sorted(answers)])
    print_scores(terminal, result)
    if options.out is not None:
        write_json(options.out, result)
    return EvalResult(result, None)


def _subject(config: Config, heldout: PromptSet, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What two halves of one evaluation must share. The engine is not among it: both sample the same distribution."""
    push, _ = encode_weights(0, tensors, "")
    return {
        "weights": push.digest,
        "prompts": heldout.fingerprint,
        **_settings(config),
        "stop_token_ids": config.sampling.stop_token_ids,
        "verifier": config.reward.verifier,
        "boxed_fallback": config.reward.boxed_fallback,
    }


def _settings(config: Config) -> dict[str, Any]:
    settings = config.evaluation
    return {
        "k": settings.samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": config.sampling.max_tokens,
        "seed": config.run.seed,
    }


def _result(options: EvalOptions, config: Config, answers: list[list[ScoredAnswer]]) -> dict[str, Any]:
    scores = score(answers, seed=config.run.seed)
    return {
        "model": options.model,
        "data": config.data.heldout,
        "engine": config.workers.engine,
        "prompts": len(answers),
        **_settings(config),
        "scores": {name: msgspec.to_builtins(one) for name, one in scores.items()},
    }


def _config(options: EvalOptions) -> Config:
    """The run's configuration, or the file's, turned into one for this evaluation. Raises ``ConfigError``."""
    path = Path(options.model)
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():
        newest = latest_checkpoint(path / "checkpoints")
        advice = f"name its newest checkpoint: {newest}" if newest else "it has no complete checkpoint yet"
        raise CheckpointError(f"{path}: is a run folder; {advice}")
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no model here; name a checkpoint such as runs/NAME/checkpoints/step_100")
    run_config = path.absolute().parent.parent / "config.json"
    if options.config_file:
        config = load_config(options.config_file)
    elif path.exists() and run_config.is_file():
        config = build_config(json.loads(run_config.read_text(encoding="utf-8")), str(run_config))
    elif path.exists():
        raise ConfigError(f"{path} is no checkpoint of a run (there is no {run_config}): say --config FILE")
    else:
        raise ConfigError(f"{options.model}: no such folder; if it is a hub id, say --config FILE too")
    heldout = options.data or config.data.heldout
    if not heldout:
        raise ConfigError(f"{options.model}: its run has no held-out prompts; say --data FILE")
    table = plain(config)
    table["demo"] |= {"task": ""}
    table["model"] |= {"path": options.model, "attention": "auto"}
    table["data"] |= {"train": heldout, "heldout": heldout}
    table["schedule"] |= {"groups_per_batch": 1}
    table["learner"] |= {"minibatches": 1}
    table["workers"] |= {"count": max(1, config.workers.count), "engine": options.engine or config.workers.engine}
    table["network"] |= LOCAL
    sampling = {"samples": options.k, "temperature": options.temperature, "top_p": options.top_p}
    table["evaluation"] |= {name: value for name, value in sampling.items() if value is not None}
    return build_config(table, "eval")
