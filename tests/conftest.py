"""`benchmarks` is not installed: it is found in the repository, behind what is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
