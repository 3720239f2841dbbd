"""Tests of the promises in docs/reliability.md, in large numbers; counts of the failures."""
