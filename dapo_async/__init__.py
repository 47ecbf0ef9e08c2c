"""Asynchronous, off-policy, streaming trainer for DAPO (arXiv:2503.14476)."""

import os

__version__ = "0.1.0"

# Threads of an OpenMP pool spin while they wait, and a spinning thread on a core that another process wants makes
# both crawl: two threads beside one busy process took over a hundred times as long as with this (docs/log.md).
# Read once, when torch loads its OpenMP, so it must be set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
