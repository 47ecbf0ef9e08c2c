"""Freed memory is used again instead of being handed back."""

import platform
import subprocess
import sys

import pytest

# Blocks of 1 MiB, as those of a training step a little larger each time, freed again: pages that the system provided.
FAULTS = """
import resource, sys, torch
from dapo_async.system.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones((1 << 18) + 1024 * step) for _ in range(24)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_used_again() -> None:
    """20 x 24 MiB and more are over 122,880 pages of 4 KiB."""
    faults = {}
    for choice in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, choice], capture_output=True, text=True, timeout=120, check=True
        )
        faults[choice] = int(done.stdout)
    assert faults["keep"] < 2000
    assert faults["default"] > 10 * faults["keep"]
