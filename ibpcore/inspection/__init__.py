"""Is the ground firm that the theory stands on? What it supposes of a network, in numbers."""

from ibpcore.inspection.report import (
    PARTS,
    Ground,
    Inspection,
    InspectionOptions,
    inspect_ground,
    inspect_model,
    plain,
)

__all__ = [
    "PARTS",
    "Ground",
    "Inspection",
    "InspectionOptions",
    "inspect_ground",
    "inspect_model",
    "plain",
]
