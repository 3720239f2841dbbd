"""`BoundOptions`: which bound to use, and the settings that all bounds share."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ibpcore.errors import UserError

Clip = tuple[float, float] | None
"""Valid pixel range to intersect every ball with; None for the paper's unclipped ball."""


@dataclass(frozen=True)
class BoundOptions:
    """How the bounds of a certificate are computed; public functions take these as keywords.

    Attributes:
        bound: a name in `ibpcore.bounds.registry.BOUNDS`.
        elide: merge a linear last layer with the differences W_i - W_y, which is tighter than
            eq. 3 and still sound. IBP gives eq. 3 for networks with another last layer.
        clip: valid pixel range.
        budget: bytes for the intermediate results of a pass, met by splitting the batch into
            chunks; None for the default of the device, see `ibpcore.bounds.chunking`.
        slope_steps: largest number of steps of a search for slopes (`alpha-crown`).
        inner_slopes: search for the slopes of the rows from inner layers, too, which is tighter
            and several times slower.

    Raises:
        UserError: a setting other than `bound` has the wrong type or value.
    """

    bound: str = "ibp"
    elide: bool = True
    clip: Clip = (0.0, 1.0)
    budget: int | None = None
    slope_steps: int = 20
    inner_slopes: bool = False

    def __post_init__(self) -> None:
        check_clip(self.clip)
        for name in ("elide", "inner_slopes"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, but is {getattr(self, name)!r}")
        whole = isinstance(self.budget, Integral) and self.budget >= 1
        if self.budget is not None and not whole:
            raise UserError(f"budget must be bytes, at least 1, or None, but is {self.budget!r}")
        if not (isinstance(self.slope_steps, Integral) and self.slope_steps >= 0):
            raise UserError(f"slope_steps must be at least 0, but is {self.slope_steps!r}")


def check_clip(clip: Any) -> None:
    """Raises UserError unless `clip` is a `Clip`: None, or two numbers in ascending order."""
    if clip is None:
        return
    pair = isinstance(clip, tuple | list) and len(clip) == 2
    if not (pair and all(isinstance(end, Real) for end in clip) and clip[0] < clip[1]):
        raise UserError(f"clip must be None or (low, high) with low < high, but is {clip!r}")
