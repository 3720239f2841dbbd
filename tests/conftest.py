"""Where modules are found, how processors are shared, and fixtures of several folders.

`benchmarks` is not installed, and tests import problems of others: both are found here.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path += [str(TESTS.parent), *(str(folder) for folder in sorted(TESTS.iterdir()))]
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker and what it starts. Torch reads it when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some tests send it to what they start; a shell has it ignored in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers():
    """`-n auto` starts a worker for each processor, but at most 8: each takes a gigabyte."""
    from ibpcore.threads import available_processors

    return min(available_processors(), 8)


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
