"""Asynchronous, off-policy, streaming trainer for DAPO (arXiv:2503.14476)."""

__version__ = "0.1.0"
