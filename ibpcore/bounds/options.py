"""`BoundOptions`: which bound to use, and the settings that all bounds share."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    bound: str = "ibp"
    elide: bool = True
    clip: Clip = (0.0, 1.0)
    budget: int | None = None
