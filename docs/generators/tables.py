"""One small function per kind of result: from its JSON to the lines of a Markdown table, and nothing else.

A new results file needs a function here, or is shown by ``scalars``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
RAW = ("origin", "runs", "rounds", "placements", "curves")  # entries that a table of plain numbers leaves out


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def number(value: Any) -> str:
    """A number with about three digits; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def times(spread: Mapping[str, float] | None) -> str:
    """``1.89× (1.82–2.03)``; nothing without a spread."""
    return f"{spread['median']:.2f}× ({spread['min']:.2f}–{spread['max']:.2f})" if spread else ""


def ranged(median: float, bounds: Sequence[float]) -> str:
    """A ratio and its range, given separately."""
    return times({"median": median, "min": bounds[0], "max": bounds[1]})


def scalars(result: Result) -> list[str]:
    """Every number of a result that has no table of its own."""
    return table(["figure", "value"], [[name, number(value)] for name, value in _flat(result) if name])


def _flat(result: Result, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in result.items():
        if name in RAW:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        elif isinstance(value, int | float | str):
            yield prefix + name, value
        elif isinstance(value, list) and len(value) <= 4 and all(isinstance(item, int | float) for item in value):
            yield prefix + name, "–".join(map(number, value))


def quickstart(result: Result) -> list[str]:
    """One row per seed."""
    rows = [
        [
            str(run["seed"]),
            f"{run['start_accuracy']:.3f} → {run['final_accuracy']:.3f}",
            f"{run['start_length']:.1f} → {run['final_length']:.1f}",
            f"{run['warm_start_s']:.0f}",
            f"{run['command_wall_s']:.0f}",
        ]
        for run in result["runs"]
    ]
    return table(["seed", "held-out accuracy", "answer length, tokens", "warm start, s", "whole command, s"], rows)


def quickstart_curves(result: Result) -> list[str]:
    """One row per held-out evaluation: what each seed had."""
    curves = [run["curves"] for run in result["runs"]]
    seeds = ", ".join(str(run["seed"]) for run in result["runs"])
    rows = []
    for step, _ in curves[0]["heldout/accuracy"]:
        cells = [
            ", ".join(format(dict(each[name])[step], form) for each in curves)
            for name, form in (("heldout/accuracy", ".4f"), ("heldout/length_mean", ".1f"))
        ]
        rows.append([str(step), *cells])
    return table(["batches trained", f"held-out accuracy of seeds {seeds}", "answer length, tokens"], rows)


def overlap(result: Result) -> list[str]:
    """Placements and ratios; the result of one async placement alone, as it was first recorded, too."""
    header = ["placement", "groups/s", "tokens/s", "over split", "over colocated", "learner waits for", "worker idle"]
    header += ["staleness", "accuracy"]
    if "placements" in result:
        rows = [
            [
                name,
                f"{row['groups_per_s']:.1f}",
                number(row["trained_tokens_per_s"]),
                times(row.get("over_split")),
                times(row.get("over_colocated")),
                waits(row["learner"]),
                f"{row['worker']['idle']:.0%}",
                f"{row['staleness_mean']:.2f}",
                f"{row['accuracy']:.2f}",
            ]
            for name, row in result["placements"].items()
        ]
    else:
        split, colocated = (
            ranged(result[f"speedup_{rival}"], result[f"speedup_{rival}_range"]) for rival in ("split", "colocated")
        )
        rows = [[f"sync, {rival}", f"{result[f'sync_{rival}_groups_per_s']:.1f}"] for rival in ("split", "colocated")]
        rows.append(["async_2", f"{result['async_groups_per_s']:.1f}", "", split, colocated])
        header = header[:5]
        rows = [row + [""] * (len(header) - len(row)) for row in rows]
    return [*table(header, rows), "", *overlap_words(result)]


def waits(learner: Mapping[str, float]) -> str:
    """What the learner waited for, by cause, as shares of its time: those of half a per cent or more."""
    shares = {name.removeprefix("wait_"): share for name, share in learner.items() if name.startswith("wait_")}
    return ", ".join(f"{cause} {share:.0%}" for cause, share in shares.items() if share >= 0.005) or "nothing"


def overlap_words(result: Result) -> list[str]:
    """The ceiling, and what the gain is made of, in sentences."""
    words = [
        f"A split batch generates for {result['Tg_s']:.3f} s and trains for {result['Tt_s']:.3f} s: overlap alone "
        f"could gain {result['ceiling']:.2f}×; async_2 gained {result['speedup_split']:.2f}×."
    ]
    if "straggler" in result:
        tail = result["straggler"]
        words.append(
            f"The tail below full slots is {tail['tail_share']:.0%} of a synchronous batch's generation; it makes "
            f"{tail['share_of_gain']:.0%} of the gain over split (as shares of its logarithm), overlap the rest."
        )
        lengths = [f"{row['length_ratio']:.3f}" for row in result["placements"].values()]
        words.append(f"Trained over generated length: {min(lengths)} to {max(lengths)} over the placements.")
    return words


def time_to_accuracy(result: Result) -> list[str]:
    """Seconds to the target per placement."""
    rows = []
    for rival, row in result["seconds"].items():
        seconds = f"{row['median']:.1f} ({row['min']:.1f}–{row['max']:.1f})" if "median" in row else "never"
        reached = f"{row['reached']} of {len(result['runs'])}"
        rows.append(
            [rival, seconds, reached, times(result["speedup"].get(rival)), f"{result['final_accuracy'][rival]:.3f}"]
        )
    header = ["placement", f"seconds to {result['target']:.2f}", "seeds that got there", "async_2 is faster by"]
    return table([*header, "last accuracy"], rows)


def vs_trl(result: Result) -> list[str]:
    """Throughput on a frozen policy, then time to accuracy."""
    lines: list[str] = []
    if result["throughput"]:
        rows = [
            [
                side,
                f"{row['groups_per_s']:.1f}",
                times(result["speedup"].get(side)),
                number(row["trained_tokens_per_s"]),
                number(row["generated_tokens_per_s"]),
                number(row["peak_rss_mb"]),
            ]
            for side, row in result["throughput"].items()
        ]
        header = ["frozen policy", "groups/s", "over TRL", "trained tokens/s", "generated tokens/s", "peak memory, MiB"]
        lines += [*table(header, rows), ""]
    if result["seconds"]:
        rows = [
            [
                side,
                ", ".join(
                    _seconds(value, run["curves"][side]) for value, run in zip(seconds, result["runs"], strict=True)
                ),
                times(result["time_speedup"].get(side)),
            ]
            for side, seconds in result["seconds"].items()
        ]
        lines += table(["training", f"seconds to {result['target']:.2f}, seed by seed", "faster than TRL by"], rows)
    threads, microbatch = result["trl_best"]
    return [*lines, "", f"TRL ran with {threads} threads and {microbatch} completions per forward pass."]


def _seconds(value: float | None, points: Sequence[Sequence[float]]) -> str:
    """When a run got there, or how long it tried."""
    return f"not within {points[-1][0]:.0f}" if value is None else f"{value:.1f}"


def engine(result: Result) -> list[str]:
    """Tokens per second at each number of sequences."""
    rows = []
    for kind in ("ragged", "equal"):
        for sequences, row in result[kind].items():
            rates = number(row["engine_tokens_per_s"]["median"]), number(row["generate_tokens_per_s"]["median"])
            rows.append([f"{kind}, {sequences}", *rates, ranged(row["speedup"], row["speedup_range"])])
    return table(["lengths, sequences", "engine, tokens/s", "generate, tokens/s", "ratio"], rows)


def vllm_engine(result: Result) -> list[str]:
    """Shares of what plain vLLM reaches."""
    names = {"generate": "`AsyncLLM.generate`, one request per completion", "generate_n": "the same with n per prompt"}
    rows = [
        [text, ranged(result[f"share_of_{name}"], result[f"share_of_{name}_range"])] for name, text in names.items()
    ]
    return table(["against", "the worker's engine reaches"], rows)


def coordinator(result: Result) -> list[str]:
    """Rate and memory."""
    row = number(result["groups_per_s"]), number(result["groups"]), number(result["rss_growth_mb"])
    return table(["groups/s", "groups", "growth of resident memory, MiB"], [row])


def hot_paths(result: Result) -> list[str]:
    """Each path against its limit: the step's own matrix products alone, or a copy in memory."""
    rows, note = [], []
    for name, row in result["paths"].items():
        if "tokens_per_s" in row:
            rates = _middle(row["tokens_per_s"]), row["limit_tokens_per_s"]
            speed, limit = (f"{number(rate)} tokens/s" for rate in rates)
            of = f"its products alone, {number(row['limit_gflops'])} GFLOP/s"
        else:
            speed, limit = (f"{number(row[key])} GB/s" for key in ("gb_per_s", "limit_gb_per_s"))
            of = "a copy in memory"
        rows.append([name, speed, limit, f"{row['share_of_limit']:.0%}", of])
        if spread := row.get("speedup_over_module"):
            note = ["", f"The fused training step is {times(spread)} as fast as the module's, in turn."]
    return [*table(["path, one core", "speed", "limit", "share", "the limit is"], rows), *note]


def _middle(value: Any) -> Any:
    return value["median"] if isinstance(value, Mapping) else value


def weights(result: Result) -> list[str]:
    """Per shape: bytes of a delta, seconds of a push, the share of it that blocks the learner."""
    rows = []
    for name, shape in result["shapes"].items():
        delta, pushes = shape["deltas"]["noise"], shape["pushes"]
        seconds = [f"{pushes[way]['seconds']['median']:.3f}" for way in ("full", "delta", "shm")]
        memcpy = f"{shape['shm_over_memcpy']:.2f}×, {shape['shm_over_memcpy_if_already_bfloat16']:.2f}× from bfloat16"
        blocked = f"{pushes['shm']['blocked_share']:.2%}"
        rows.append(
            [f"{name} B", f"{delta['changed_share']:.2%}", f"{delta['bytes_share']:.2%}", *seconds, memcpy, blocked]
        )
    header = ["parameters", "changed", "delta, of full", "full, s", "delta, s", "shm, s"]
    return table([*header, "shm over one memcpy", "learner blocked, of a push"], rows)


def simulate(result: Result) -> list[str]:
    """Predicted against measured, configuration by configuration."""
    rows = [
        [
            f"{row['kind']}, {row['workers']} workers, η = {row['eta']}" + (" (calibrated on it)" * row["calibration"]),
            *(f"{row[key]:.2f}" for key in ("measured_groups_per_s", "predicted_groups_per_s", "ratio")),
        ]
        for row in result["configurations"]
    ]
    told = f"Within 10 %: {result['within_10_percent']} of the {result['predicted_only']} that were predicted only."
    return [*table(["configuration", "measured, groups/s", "predicted", "ratio"], rows), "", told]


def scale(result: Result) -> list[str]:
    """The best split per number of GPUs and bound, against synchronous DAPO with its larger generation batch."""
    rows, events, seconds = [], 0, 0.0
    for row in result["rows"]:
        base = next(r for r in result["rows"] if r["gpus"] == row["gpus"] and not r["eta"] and r["oversample"] > 1)
        synchronous = f"0, {row['oversample']:.0f}× the leases" if not row["eta"] else str(row["eta"])
        rows.append(
            [
                number(row["gpus"]),
                synchronous,
                f"{row['generating']} + {row['gpus'] - row['generating']}",
                number(row["groups_per_s"]),
                f"{row['groups_per_s'] / base['groups_per_s']:.2f}×",
                f"{row['learner']['train']:.0%}",
                f"{row['workers']['idle']:.0%}",
                f"{row['events'] / row['simulation_cpu_s'] / 1e3:.0f}",
            ]
        )
        events, seconds = events + row["events"], seconds + row["simulation_cpu_s"]
    assumed = result["assumed"]
    header = ["GPUs", "max_staleness", "workers + learner", "groups/s", "over synchronous"]
    return [
        *table([*header, "learner trains", "workers idle", "1,000 events/s simulated"], rows),
        "",
        f"Assumed: a decode step of n answers takes {1e3 * assumed['step_s']:g} + {1e3 * assumed['step_row_s']:g} n ms "
        f"on one GPU of {assumed['slots']:.0f} slots, a GPU trains {number(assumed['train_tokens_per_gpu_s'])} "
        f"tokens/s, a push takes {assumed['push_s']:g} s and a swap {assumed['swap_s']:g} s; log-normal lengths of "
        f"median {number(assumed['length_median'])} (σ {assumed['length_sigma']:g}), up to "
        f"{number(assumed['length_limit'])} tokens, {assumed['group_size']:.0f} to a group, "
        f"{assumed['passes_filter']:.0%} of groups pass the filter.",
        f"Up to six splits were tried for each row: {number(events)} events in {seconds:.0f} s of one core.",
    ]
