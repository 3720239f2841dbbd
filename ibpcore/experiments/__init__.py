"""Whole experiments: a run and its folder, sweeps of runs, and their comparison.

Start with `run`, which trains and certifies; `sweeps` carries out a grid of runs, `searches`
looks for good settings, and `reports` compares runs in tables and figures.
"""
