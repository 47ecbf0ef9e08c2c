"""Whole training runs as a user starts them, for the benchmarks that compare them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def train(config: str, settings: Sequence[str], folder: Path, name: str) -> Path:
    """One ``dapo-async train``. Returns its run folder; ends this program if it fails."""
    command = [sys.executable, "-m", "dapo_async.cli", "train", config]
    for setting in [f"run.folder={folder}", f"run.name={name}", *settings]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        told = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{told}")
    return max(folder.glob(f"{name}*"), key=lambda path: path.stat().st_mtime)
