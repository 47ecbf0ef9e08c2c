"""What the rounds of ``overlap`` say together: medians, ratios per round, the ceiling, and what the gain is made of.

Pure functions of the readings of runs.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def per_round(runs: Runs, placement: str, rival: str) -> dict[str, float]:
    """How many times faster ``placement`` trains groups than ``rival``, of runs of the same round."""
    pairs = zip(runs[placement], runs[rival], strict=True)
    return spread([one["groups_per_s"] / other["groups_per_s"] for one, other in pairs])


def middle(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of all step_metrics of one placement, entry by entry."""
    found: dict[str, Any] = {}
    for name, value in rounds[0].items():
        values = [one[name] for one in rounds]
        found[name] = middle(values) if isinstance(value, Mapping) else statistics.median(values)
    return found


def straggler(
    tg_s: float, tt_s: float, decode_s: float, sync_rate: float, steady_rate: float, speedup: float
) -> dict[str, float]:
    """What of a speed-up over split comes from the tail that a synchronous batch ends with, and not from overlap.

    ``decode_s``: seconds per split batch that the worker decodes and reads prompts; ``sync_rate``: its tokens per
    second meanwhile. ``steady_rate``: tokens per second of the same engine and policy with all slots filled. At the
    steady rate the same tokens would take less: ``tail_s`` = decode_s · (1 - sync / steady) is what running below full
    slots costs, ``tail_share`` its share of Tg. Synchronous training without it would be faster by
    ``gain`` = (Tg + Tt) / (Tg - tail + Tt). Gains multiply, so ``share_of_gain`` = log(gain) / log(speedup), at most
    1; overlap has the rest. 0 where there is no gain to share.
    """
    tail_s = min(tg_s, decode_s * max(0.0, 1.0 - sync_rate / steady_rate))
    gain = (tg_s + tt_s) / (tg_s + tt_s - tail_s)
    share = math.log(gain) / math.log(speedup) if speedup > 1.0 else 0.0
    return {
        "sync_worker_tokens_per_s": sync_rate,
        "steady_worker_tokens_per_s": steady_rate,
        "tail_s": tail_s,
        "tail_share": tail_s / tg_s if tg_s else 0.0,
        "gain": gain,
        "share_of_gain": min(1.0, share),
    }


def summarise(runs: Runs, steady_rate: float) -> dict[str, Any]:
    """Medians per placement, speed-ups per round over split and over the better colocated rival, and the ceiling.

    ``steady_rate``: see ``straggler``.
    """
    medians = {placement: middle(rounds) for placement, rounds in runs.items()}
    rivals = [placement for placement in ("colocated", "colocated_1") if placement in runs]
    colocated = max(rivals, key=lambda placement: medians[placement]["groups_per_s"])
    placements: dict[str, dict[str, Any]] = {}
    for placement, row in medians.items():
        waits = sum(share for name, share in row["learner"].items() if name.startswith("wait_"))
        placements[placement] = {**row, "learner_waits": waits}
        if placement not in ("split", *rivals):
            placements[placement]["over_split"] = per_round(runs, placement, "split")
            placements[placement]["over_colocated"] = per_round(runs, placement, colocated)
    split, best = placements["split"], placements["async_2"]
    tg, tt = split["wait_s"], split["train_s"]
    speedup = best["over_split"]["median"]
    ceiling = (tg + tt) / max(tg, tt)
    decode_s = (split["worker"]["decode"] + split["worker"]["prefill"]) * (tg + tt)
    rates = split["worker_tokens_per_s"], steady_rate
    return {
        "Tg_s": tg,
        "Tt_s": tt,
        "ceiling": ceiling,
        "ceiling_share": speedup / ceiling,
        "colocated_learner_threads": 2 if colocated == "colocated" else 1,
        "sync_split_groups_per_s": split["groups_per_s"],
        "sync_colocated_groups_per_s": placements[colocated]["groups_per_s"],
        "async_groups_per_s": best["groups_per_s"],
        "async_staleness_max": max(one["staleness"] for one in runs["async_2"]),
        "speedup_split": speedup,
        "speedup_split_range": [best["over_split"]["min"], best["over_split"]["max"]],
        "speedup_colocated": best["over_colocated"]["median"],
        "speedup_colocated_range": [best["over_colocated"]["min"], best["over_colocated"]["max"]],
        "straggler": straggler(tg, tt, decode_s, *rates, speedup),
        "placements": placements,
        "runs": runs,
    }
