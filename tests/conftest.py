"""`benchmarks` is not installed, and tests import problems of others: both are found here."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path += [str(TESTS.parent), *(str(folder) for folder in sorted(TESTS.iterdir()))]
