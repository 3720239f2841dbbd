"""The one progress protocol of all long computations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int, str], None]
"""Is told the work done so far, and a remark."""


Watch = Callable[[str, int], AbstractContextManager[Advance | None]]
"""(label, length) -> what watches that much work, None where nobody does."""


def unwatched(label: str, length: int) -> AbstractContextManager[Advance | None]:
    """The `Watch` of nobody."""
    return nullcontext()
