"""Measurements: `python -m benchmarks.NAME` prints a table, `--json FILE` writes it as JSON."""
