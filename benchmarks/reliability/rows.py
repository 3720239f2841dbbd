"""What the parts of the reliability benchmark report."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    what: str
    cases: int
    failures: int
    note: str
