"""`benchmarks` is not installed, and tests import problems of others: both are found here."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path += [str(TESTS.parent), *(str(folder) for folder in sorted(TESTS.iterdir()))]


@pytest.fixture(scope="module")
def no_figures():
    """They take seconds."""
    from ibpcore.experiments import test_set

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_set, "figures_possible", lambda: False)
        yield


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
