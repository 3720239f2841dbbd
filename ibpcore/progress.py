"""How long computations report their progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int, Sequence[str]], None]
"""Called with the amount of work done so far, and facts about it: a few words each, such as
"loss 0.123", the most important first. A narrow terminal shows the first of them only.

Speed is measured from the first call, which counts what a resumed computation had done before.
"""

Watch = Callable[[str, int], AbstractContextManager[Advance | None]]
"""Opened with a label and the total amount of work; gives None if nobody watches.

Then nothing is computed for a report, and the host never waits for CUDA because of one.
"""


def unwatched(label: str, length: int) -> AbstractContextManager[Advance | None]:
    """The `Watch` that reports nothing."""
    return nullcontext()
