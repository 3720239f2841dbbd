"""A training step dispatches as few operators as it did when the counts were committed."""

import json

import pytest
import torch
from helpers import TESTS

from benchmarks import operators
from benchmarks.operators import table

FILE = TESTS.parent / "benchmarks" / "results" / "operators.json"
RENEWAL = "python -m benchmarks.operators --json benchmarks/results/operators.json"


def test_operators_are_as_committed():
    """Within a tenth: fewer ones are to be committed too, or they could come back unnoticed."""
    committed = json.loads(FILE.read_text())
    expected = {row["contender"]: row["operators"] for row in committed["rows"]}
    found = {row["contender"]: row["operators"] for row in table()}
    assert found == pytest.approx(expected, rel=0.1), (
        f"a step dispatches other numbers of operators (torch {torch.__version__}) than when they"
        f" were counted (torch {committed['versions']['torch']}). If that is intended: {RENEWAL}"
    )


def test_the_command_that_renews_them():
    assert json.loads(FILE.read_text())["command"] == RENEWAL
    assert RENEWAL in operators.__doc__
