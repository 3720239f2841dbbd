"""Measurements: `python -m benchmarks.NAME` prints a table, `--json FILE` keeps it."""
