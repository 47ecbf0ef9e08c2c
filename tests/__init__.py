"""Tests, in folders that mirror the packages; whole runs are in ``whole_run``."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
