"""Measuring sticks: one file per question, each run by hand, none part of the tests."""
