"""A hub that nobody answers at: one sentence without retries, and the local cache still serves."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.test_cli import MINIMAL, folder  # noqa: F401


@pytest.fixture(params=["refuses", "never answers", "has no name"])
def dead_hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that does not work."""
    if request.param == "has no name":
        yield "http://hub.invalid"
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def check(endpoint: str, home: Path, config: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """``dapo-async check`` where the hub is at ``endpoint`` and its cache in ``home``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "dapo_async.cli", "check", str(config)]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60.0)


@pytest.mark.parametrize("what", ["model.path", "data.train"])
def test_nobody_is_there(dead_hub: str, what: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    if what == "data.train":
        pytest.importorskip("datasets")
    done = check(dead_hub, tmp_path, folder / "run.toml", f"{what}=owner/name")
    warning, told = [line for line in done.stderr.splitlines() if "hub" in line or "owner/name" in line]
    assert f"the hub {dead_hub} does not answer (" in warning
    assert told.startswith("dapo-async: ")
    assert "owner/name" in told
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_what_is_cached_is_used_where_nobody_is_there(dead_hub: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    commit = "0" * 40
    place = tmp_path / "hub" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    (place / "snapshots" / commit).symlink_to(folder / "model")
    done = check(dead_hub, tmp_path, folder / "run.toml", "model.path=owner/name")
    assert done.returncode == 0, done.stderr
    assert f"the hub {dead_hub} does not answer (" in done.stderr
    assert '"path": "owner/name"' in done.stdout


class Slow(http.server.BaseHTTPRequestHandler):
    """Knows nothing, but answers."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Not to the terminal."""


def test_a_hub_that_answers_is_asked(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Whatever it answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_address[1]}"
            done = check(endpoint, tmp_path, folder / "run.toml", "model.path=owner/name")
        finally:
            server.shutdown()
            thread.join(timeout=10.0)
    assert done.returncode == 2
    assert "does not answer" not in done.stderr
    assert 'model.path = "owner/name" is neither a folder nor a hub id reachable from here' in done.stderr
