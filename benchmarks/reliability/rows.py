"""A row of the reliability report."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """How many cases of a kind there were, and how many of them failed."""

    what: str
    cases: int
    failures: int
    note: str
