"""The command line: ``dapo-async train | learn | work | eval | ...``. User errors are one sentence.

Commands import what they need themselves: help comes at once, and Ctrl-C while PyTorch loads is no traceback.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dapo_async import __version__
from dapo_async.config.settings import Config
from dapo_async.config.toml import load_config
from dapo_async.errors import ConfigError, DapoError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 trouble, 2 the user's mistake, 128 + n ended by signal n."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("dapo_async").setLevel(logging.INFO)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("dapo-async: interrupted", file=sys.stderr)
        return 130
    except DapoError as error:
        print(f"dapo-async: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _train(arguments: argparse.Namespace) -> int:
    return _run(arguments, arguments.set)


def _learn(arguments: argparse.Namespace) -> int:
    return _run(arguments, [*arguments.set, "workers.count=0"])


def _run(arguments: argparse.Namespace, settings: list[str]) -> int:
    config = load_config(arguments.config, settings)
    from dapo_async.run.launch import train

    resume_from = arguments.resume_from
    result = train(config, resume=arguments.resume or bool(resume_from), resume_from=resume_from)
    return 128 + result.interrupted if result.interrupted else 0


def _check(arguments: argparse.Namespace) -> int:
    from dapo_async.config.toml import plain
    from dapo_async.run.check import check_early, load_material

    config = load_config(arguments.config, arguments.set)
    if arguments.memory or arguments.gpu_gib:
        return _memory(config, arguments.gpu_gib)
    check_early(config)
    if config.demo.task:
        print(f"# demo.task = {config.demo.task}: model and data are made when the run starts")
    else:
        material = load_material(config)
        config = material.config
        counts = ", ".join(f"{count} {name}" for name, count in material.train.counts._asdict().items())
        print(f"# data.train: {counts}; held out: {len(material.heldout)} prompts")
    _memory(config)
    print(json.dumps(plain(config), indent=2))
    return _parity(config) if arguments.parity else 0


def _memory(config: Config, gpu_gib: float = 0.0) -> int:
    from dapo_async.run.memory_check import described_machine, estimate_memory, this_machine

    estimate = estimate_memory(config, described_machine(config, gpu_gib) if gpu_gib else this_machine())
    print("\n".join(estimate.lines))
    if estimate.refusal:
        raise ConfigError(estimate.refusal)
    return 0


def _parity(config: Config) -> int:
    from dapo_async.demo.demo import prepare_demo
    from dapo_async.evaluate.parity import check_parity
    from dapo_async.observe.console import LiveView, Terminal
    from dapo_async.run.check import load_material

    terminal = Terminal(stderr=True, highlight=False, markup=False, emoji=False)  # stdout is for the result
    with LiveView(1, "parity", console=terminal) as view:
        config, _ = prepare_demo(config, view.progress)
        material = load_material(config)
        parity = check_parity(material, lambda done, total: view.progress(done, total, "prompts answered for parity"))
    print(parity.report())
    return 0 if parity.passed else 1


def _eval(arguments: argparse.Namespace) -> int:
    from dapo_async.evaluate.command import EvalOptions, evaluate

    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file")
    if out is not None and not (out.absolute().parent.is_dir() and os.access(out.absolute().parent, os.W_OK)):
        raise ConfigError(f"--out {out}: its folder does not exist or cannot be written; choose another place")
    asked = EvalOptions(
        arguments.model,
        config_file=arguments.config,
        data=arguments.data,
        k=arguments.k,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        engine=arguments.engine,
        out=out,
        resume=arguments.resume,
    )
    result, interrupted = evaluate(asked)
    if interrupted is not None and result is None:
        return 128 + interrupted
    print(json.dumps(result, indent=2))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from dapo_async.simulate.plan import make_plan, text

    plan = make_plan(Path(arguments.run))
    print(msgspec.json.format(msgspec.json.encode(plan)).decode() if arguments.json else text(plan))
    return 0


def _work(arguments: argparse.Namespace) -> int:
    # A worker is its own program, so that it never shares a process with a learner.
    command = [sys.executable, "-P", "-m", "workers.start", "--connect", arguments.connect]
    if arguments.name:
        command += ["--name", arguments.name]
    if arguments.engine:
        command += ["--engine", arguments.engine]
    if arguments.keys:
        command += ["--keys", arguments.keys]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until it knows what to do: no traceback
    os.execv(sys.executable, command)


def _keys(arguments: argparse.Namespace) -> int:
    from dapo_async.transport.keys import make_keys

    print(make_keys(Path(arguments.folder), arguments.worker))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    # Benchmarks stand above this package, which must not import them.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "benchmarks", *arguments.benchmark])


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**5:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 100000")
    return int(text)


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= 10**5:
        raise argparse.ArgumentTypeError(f"{text} is not a size in GiB")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dapo-async", description="Asynchronous DAPO training.")
    parser.add_argument("--version", action="version", version=f"dapo-async {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("train", _train, "train on this machine: starts workers and learner"),
        ("learn", _learn, "the learner alone; workers connect to network.control"),
        ("check", _check, "check a configuration and print it resolved"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("config", help="TOML file")
        sub.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
        (_add_check_options if name == "check" else _add_resume_options)(sub)
        sub.set_defaults(command=command)
    work = commands.add_parser("work", help="one rollout worker")
    work.add_argument("--connect", required=True, metavar="tcp://HOST:PORT", help="the learner's network.control")
    work.add_argument("--name", default="", help="name in logs and metrics; no other live worker may have it")
    work.add_argument("--engine", default="", choices=["torch", "vllm"], help="default: the run's workers.engine")
    work.add_argument("--keys", default="", metavar="DIR", help="this worker's keys, if the learner encrypts")
    work.set_defaults(command=_work)
    evaluate = commands.add_parser("eval", help="avg@k, pass@k and maj@k of a checkpoint or hub model")
    evaluate.add_argument("model", help="a checkpoint folder of a run; with --config also a model folder or a hub id")
    evaluate.add_argument(
        "--data", default="", help="file, folder or hub id of prompts; default: the run's held-out ones"
    )
    evaluate.add_argument("--k", type=_positive, help="answers per prompt; default: evaluation.samples")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="default: evaluation.temperature")
    evaluate.add_argument("--top-p", type=float, metavar="P", help="default: evaluation.top_p")
    evaluate.add_argument("--engine", default="", choices=["torch", "vllm"], help="default: workers.engine")
    evaluate.add_argument("--config", default="", help="TOML file, for a model that is no checkpoint of a run")
    evaluate.add_argument("--out", default="", help="JSON file for the result; answers are kept beside it as they come")
    evaluate.add_argument("--resume", action="store_true", help="go on from the answers kept beside --out")
    evaluate.set_defaults(command=_eval)
    bench = commands.add_parser("bench", help="measure this program; without a name, list the benchmarks")
    bench.add_argument("benchmark", nargs=argparse.REMAINDER, help="its name and arguments; NAME --help says which")
    bench.set_defaults(command=_bench)
    keys = commands.add_parser("keys", help="make keys that encrypt the wire between machines")
    keys.add_argument("folder", metavar="DIR", help="where they go: DIR/learner and DIR/worker")
    keys.add_argument("--worker", default="worker", metavar="NAME", help="whose keys to make beside the learner's")
    keys.set_defaults(command=_keys)
    plan = commands.add_parser("plan", help="what limits a run, and what other settings or machines would bring")
    plan.add_argument("run", help="a run folder, of a finished run or of one that goes on")
    plan.add_argument("--json", action="store_true", help="the same for programs")
    plan.set_defaults(command=_plan)
    return parser


def _add_check_options(check: argparse.ArgumentParser) -> None:
    check.add_argument("--parity", action="store_true", help="compare log-probs of worker and learner, by running")
    check.add_argument(
        "--memory", action="store_true", help="only estimate memory: needs the model's config.json, nothing else"
    )
    check.add_argument("--gpu-gib", type=_gib, default=0.0, metavar="GIB", help="the same, as if on GPUs of this size")


def _add_resume_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    run.add_argument("--resume-from", default="", metavar="step_N", help="go on from this checkpoint of the run")


if __name__ == "__main__":
    sys.exit(main())
