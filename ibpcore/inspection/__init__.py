"""Is the ground firm that the theory stands on? What it supposes of a network, in numbers."""

from ibpcore.inspection.lines import DIRECTIONS
from ibpcore.inspection.report import (
    PARTS,
    Ground,
    Inspection,
    InspectionOptions,
    inspect_ground,
    inspect_model,
)

__all__ = [
    "DIRECTIONS",
    "PARTS",
    "Ground",
    "Inspection",
    "InspectionOptions",
    "inspect_ground",
    "inspect_model",
]
