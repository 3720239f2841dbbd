"""What a search demands of a run beside its configuration: more measures, and an early end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

History = Sequence[dict[str, Any]]
"""The rows of `metrics.jsonl`, one for each epoch so far."""


def never(history: History) -> bool:
    """The rule that ends no run early."""
    return False


class Demands(NamedTuple):
    """What is measured of held-out images beside ACR, and what ends a run early.

    Attributes:
        radii: at which the certified accuracy is measured, such as "8/255".
        hopeless: whether a run with this history is to end. It depends on the history alone, so
            that a resumed run ends where an undisturbed one does.
    """

    radii: Sequence[str] = ()
    hopeless: Callable[[History], bool] = never


NO_DEMANDS = Demands()
