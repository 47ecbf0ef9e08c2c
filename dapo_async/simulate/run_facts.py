"""What a run folder says about its machines and its task: the facts that ``plan`` simulates with.

Reads ``config.json``, ``metrics.jsonl`` and ``lengths.jsonl`` of any run, finished or not. Only steady batches count:
not the first ones, whose groups were generated while nothing was trained, and none during which a held-out evaluation
took the workers' time. A folder that cannot carry a plan is refused with a ``ConfigError``.
"""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct

from dapo_async.config.settings import Config
from dapo_async.config.toml import build_config
from dapo_async.errors import ConfigError
from dapo_async.schedule.schedule import CAUSES
from dapo_async.simulate.cluster import Cluster
from dapo_async.simulate.workload import ALL_WRONG, MIXED, GroupSpec

MIN_BATCHES = 5
Line = dict[str, Any]


class Facts(Struct, kw_only=True):
    """Measured in the steady part of a run. Shares are of the time of the learner, or of all workers."""

    config: Config
    batches: int  # that were taken into account
    cluster: Cluster
    groups: list[GroupSpec]  # in the order of their leases
    groups_per_s: float  # trained
    waits: dict[str, float]  # share of the learner's time, by cause
    busy: float  # share of its time that the learner trained
    worker_time: dict[str, float]  # share of the workers' time, by phase
    filtered: float  # share of the groups that arrived


def read_facts(folder: Path) -> Facts:
    """The facts of this run folder. Raises ``ConfigError`` if it holds too little."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: not a run folder: it has no config.json")
    try:
        config = build_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))
    except OSError as error:
        raise ConfigError(f"{folder / 'config.json'}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not even text, or no JSON
        raise ConfigError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not config.workers.in_flight:
        raise ConfigError(f"{folder}: workers.in_flight = false is not modelled; plan with a run that swaps in flight")
    lines = [line for line in _lines(folder / "metrics.jsonl") if "time/step" in line or "heldout/accuracy" in line]
    steady = _steady(lines, config)
    if len(steady) < MIN_BATCHES:
        trained = sum("time/step" in line for line in lines)
        raise ConfigError(
            f"{folder}: too short for a plan: {trained} batches in metrics.jsonl, of which {len(steady)} are steady "
            f"(not the first ones, and no evaluation beside them); needed are {MIN_BATCHES}"
        )
    if not all("decode/steps" in line for line in steady):
        raise ConfigError(
            f"{folder}: metrics.jsonl says nothing of decode steps (decode/steps): only runs of engine torch and of "
            f"this version can be planned with"
        )
    steps = {line["step"] for line in steady}
    groups = list(read_groups(folder, steps).values())
    if not any(group.verdicts == MIXED for group in groups):
        raise ConfigError(f"{folder}: lengths.jsonl tells of no group that passed the filter; a plan needs some")
    return _facts(config, steady, groups)


def read_groups(folder: Path, steps: Collection[int] | None = None) -> dict[int, GroupSpec]:
    """The groups that a run was answered, by lease and in their order; only those that came before these batches."""
    path, found = folder / "lengths.jsonl", {}
    for line in _lines(path):
        if steps is None or line["step"] in steps:
            if "leases" not in line:
                raise ConfigError(f"{path}: tells no leases: a run of an earlier version cannot be planned")
            for lease, tokens, kept in zip(line["leases"], line["groups"], line["accepted"], strict=True):
                found[lease] = GroupSpec(tuple(tokens), MIXED if kept else ALL_WRONG)
    return dict(sorted(found.items()))


def fit_steps(lines: Iterable[Line]) -> tuple[float, float]:
    """a and b of the time a + b * n of a decode step of n completions: least squares over all steps, neither negative.

    From the mean and the token-weighted mean of every interval, which together hold the sums of n, n², t and n * t.
    """
    steps = rows = squares = seconds = products = 0.0
    for line in lines:
        count, tokens = line["decode/steps"], line["decode/steps"] * line["decode/running_mean"]
        steps, rows, seconds = steps + count, rows + tokens, seconds + count * line["decode/step_s"]
        squares += tokens * line["decode/running_seen"]
        products += tokens * line["decode/token_s"]
    spread = steps * squares - rows * rows
    slope = (steps * products - rows * seconds) / spread if spread > 1e-9 * rows * rows else 0.0
    slope = min(max(0.0, slope), seconds / rows)
    return (seconds - slope * rows) / steps, slope


def _lines(path: Path) -> list[Line]:
    """The lines of a file that the run may still be writing: its last one may be torn."""
    try:
        raw = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a plan needs it") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is no text: {error}") from None
    try:
        lines = [json.loads(line) for line in raw if line.endswith("\n")]
    except ValueError as error:
        raise ConfigError(f"{path}: holds a line that is not JSON: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ConfigError(f"{path}: holds a line that is no JSON object")
    return lines


def _steady(lines: list[Line], config: Config) -> list[Line]:
    trained = sum("time/step" in line for line in lines)
    warm_up = max(config.schedule.max_staleness + 2, trained // 10)
    every, evaluating, steady = config.evaluation.every, False, []
    for line in lines:
        if "time/step" not in line:
            continue
        if line["step"] > warm_up and not evaluating and "heldout/accuracy" not in line:
            steady.append(line)
        if "heldout/accuracy" in line:
            evaluating = False
        evaluating = evaluating or bool(every and line["step"] % every == 0)
    return steady


def _facts(config: Config, steady: list[Line], groups: list[GroupSpec]) -> Facts:
    def total(name: str) -> float:
        return sum(line.get(name, 0.0) for line in steady)

    def weighted(name: str) -> float:
        return sum(line.get(name, 0.0) * line["time/step"] for line in steady)

    seconds, pushes = total("time/step"), len(steady) / config.weights.push_every
    workers = round(median(line["workers/alive"] for line in steady)) or 1
    worker_s = {phase: weighted(f"worker_time/{phase}") * workers for phase in ("prefill", "verify", "swap", "other")}
    arrived = weighted("throughput/generated_groups_per_s") or 1.0
    step_s, step_row_s = fit_steps(steady)
    swap_s = worker_s["swap"] / (pushes * workers)
    # The lag ends with the heartbeat after the first step on new weights, and begins in the middle of another one.
    lag_s = median([line["publish/lag_s"] for line in steady if "publish/lag_s" in line] or [0.0])
    mean_step_s = total("time/step") and weighted_mean(steady, "decode/step_s", "decode/steps")
    cluster = Cluster(
        workers=workers,
        slots=config.workers.slots,
        prefetch_groups=config.workers.prefetch_groups,
        step_s=step_s + worker_s["other"] / total("decode/steps"),
        step_row_s=step_row_s,
        group_s=(worker_s["prefill"] + worker_s["verify"]) / arrived,
        train_batch_s=(total("time/other") + total("time/checkpoint")) / len(steady),
        train_token_s=(total("time/forward_backward") + total("time/optimizer")) / total("batch/tokens"),
        publish_s=total("time/publish") / pushes,
        push_s=max(0.0, lag_s - swap_s - 1.5 * mean_step_s),
        swap_s=swap_s,
        push_every=config.weights.push_every,
    )
    return Facts(
        config=config,
        batches=len(steady),
        cluster=cluster,
        groups=groups,
        groups_per_s=weighted("throughput/trained_groups_per_s") / seconds,
        waits={cause: total(f"time/wait_{cause}") / seconds for cause in CAUSES},
        busy=(total("time/forward_backward") + total("time/optimizer")) / seconds,
        worker_time={
            phase: weighted(f"worker_time/{phase}") / seconds
            for phase in ("decode", "prefill", "verify", "swap", "idle", "other")
        },
        filtered=sum(group.verdicts != MIXED for group in groups) / len(groups),
    )


def weighted_mean(lines: Iterable[Line], name: str, weight: str) -> float:
    """Mean of ``name`` over ``lines``, weighted by ``weight``."""
    pairs = [(line[name], line[weight]) for line in lines]
    return sum(value * by for value, by in pairs) / sum(by for _, by in pairs)
