"""``dapo-async work`` in its first moments: Ctrl-C is no traceback, and nothing survives a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT_S = 60.0
WORK = [sys.executable, "-m", "dapo_async.cli", "work", "--connect", "tcp://127.0.0.1:9"]


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.5, 1.5])
def test_ctrl_c_while_a_worker_loads_is_no_traceback(after_s: float) -> None:
    """At any time after the command has been understood, PyTorch's loading included."""
    with subprocess.Popen(WORK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while b"workers.start" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, f"no worker within {LIMIT_S} s"
                time.sleep(0.001)
            time.sleep(after_s)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert out == ""
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    # Ended by the signal while it loads; in order once it knocks.
    assert process.returncode == -signal.SIGINT or (process.returncode == 0 and "ends: SIGINT" in err), err
