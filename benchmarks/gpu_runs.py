"""Asynchronous against synchronous training where learner and workers share one GPU, and how busy that is.

    python -m benchmarks.gpu_runs --out gpu_runs.json [--rounds 2] [--batches 100] [--device cuda]

The quickstart's policy after some batches, then frozen, so that every batch takes as many groups; η = 0 and 2 in turn.
How busy the GPU is, nvidia-smi says. ``--device cpu`` tries it out where there is no GPU.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a file

from benchmarks.gpu import spread
from benchmarks.origin import origin, write_result
from benchmarks.overlap import FROZEN, reading
from benchmarks.runs import QUIET, frozen_policy, steps, train

WORKERS = 4  # one would leave the GPU idle between its kernels
POLICY_BATCHES = 5  # that make the policy
WARM_UP = 8  # batches of a run that are not counted


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Mean share of time in which a kernel ran, and most memory in use (MiB), of GPU 0 as nvidia-smi tells them."""
    told: dict[str, float] = {}
    if shutil.which("nvidia-smi") is None:
        yield told
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    busy: list[float] = []
    memory: list[float] = []
    with subprocess.Popen([*query, "--loop-ms=200"], stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                values = line.split(",")
                busy.append(float(values[0]))
                memory.append(float(values[1]))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield told
        finally:
            process.terminate()
            reader.join()
    told |= {"gpu_busy": statistics.mean(busy) / 100, "gpu_used_mib": max(memory)} if busy else {}


def runs(config: str, batches: int, rounds: int, overrides: list[str], device: str) -> dict[str, Any]:
    """η = 0 and 2 in turn, all on one device. The policy stays the same, so that every batch takes as many groups."""
    placements = {"synchronous": ["schedule.max_staleness=0"], "asynchronous": ["schedule.max_staleness=2"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in placements}
    places = [f"model.device={device}", f"workers.device={device}", "workers.gpus=shared", f"workers.count={WORKERS}"]
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        policy = frozen_policy(config, POLICY_BATCHES, [*overrides, *places], Path(folder))
        fixed = [*QUIET, *FROZEN, *overrides, *policy.settings, *places, f"run.batches={batches + WARM_UP}"]
        for number in range(rounds):
            for name, own in placements.items():
                with watched() as gpu:
                    path = train(config, [*fixed, *own], Path(folder), name)
                measured = [step for step in steps(path) if step["step"] > WARM_UP]
                found[name].append(reading(measured, WORKERS) | gpu)
                print(f"round {number + 1}: {name} {found[name][-1]['groups_per_s']:.1f} groups/s {gpu}", flush=True)
    pairs = zip(found["asynchronous"], found["synchronous"], strict=True)
    ratios = [one["groups_per_s"] / other["groups_per_s"] for one, other in pairs]
    return {"speedup": spread(ratios), "batches": batches, "workers": WORKERS, "rounds": found}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--rounds", type=int, default=2, help="of both")
    parser.add_argument("--batches", type=int, default=100, help="measured per run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting in all runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and PyTorch finds none here; --device cpu tries it out")
    result = runs(arguments.config, arguments.batches, arguments.rounds, arguments.set, arguments.device)
    print("asynchronous over synchronous: {median:.2f}x ({min:.2f} - {max:.2f})".format(**result["speedup"]))
    if arguments.out:
        write_result(arguments.out, result | {"origin": origin(seeds=[0], repeats=arguments.rounds)})


if __name__ == "__main__":
    main()
