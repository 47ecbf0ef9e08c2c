"""The wheel: every package of ours and nothing else, and it trains where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow

PACKAGES = ("dapo_async", "workers", "benchmarks")
# What a checkout may hold that no clone does; a build folder's old modules would go into the wheel.
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
COMMAND = Path("bin", "dapo-async")
SHORT = {
    "run.batches": 2,
    "demo.train_prompts": 300,
    "demo.heldout_prompts": 32,
    "demo.warm_start_iterations": 20,  # else all answers are wrong, and no batch is ever full
    "demo.min_terms": 2,
    "demo.max_terms": 3,
}


def python(*arguments: str | Path, folder: Path, path: Path | None = None) -> str:
    """What this Python prints, in ``folder``, with ``path`` before all that is installed. It must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-P", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(command: str, *arguments: str | Path, folder: Path) -> None:
    """Run one command of pip in ``folder``, without a network."""
    python("-m", "pip", command, "--quiet", "--no-index", "--no-deps", *arguments, folder=folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="needs the setuptools that pyproject.toml builds with")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source", folder=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with what the wheel installs, and none of what it depends on. It goes before an editable install."""
    folder = wheel.parent / "installed"
    pip("install", "--target", folder, wheel, folder=wheel.parent)
    names = ", ".join(PACKAGES)
    code = f"import {names}; print(*(package.__file__ for package in ({names})))"
    found = python("-c", code, folder=wheel.parent, path=folder).split()
    assert found == [str(folder / package / "__init__.py") for package in PACKAGES]
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with the quickstart's settings, outside of the checkout."""
    shutil.copy(ROOT / "configs" / "quickstart.toml", tmp_path)
    return tmp_path


def test_it_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name}
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert held == {path.relative_to(ROOT).as_posix() for path in modules}


def test_it_checks_the_quickstart_where_there_is_no_checkout(installed: Path, elsewhere: Path) -> None:
    told = python(installed / COMMAND, "check", "quickstart.toml", folder=elsewhere, path=installed)
    assert '"batches": 45' in told


@pytest.mark.long
@pytest.mark.timeout(600)
def test_it_trains_two_batches_where_there_is_no_checkout(installed: Path, elsewhere: Path) -> None:
    settings = [f"--set={name}={value}" for name, value in (SHORT | {"demo.cache": elsewhere / "cache"}).items()]
    python(installed / COMMAND, "train", "quickstart.toml", *settings, folder=elsewhere, path=installed)
    lines = (elsewhere / "runs" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == 2
