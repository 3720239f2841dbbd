"""One line of the report: what was tried, how often, and how often it failed."""

from typing import NamedTuple


class Row(NamedTuple):
    what: str
    cases: int
    failures: int
    note: str
