"""Figures; they need matplotlib, the extra `plot`."""

from ibpcore.plots.cost import write_cost
from ibpcore.plots.curves import write_curve, write_curves
from ibpcore.plots.inspection import write_inspection
from ibpcore.plots.style import STYLES, Look, figures_possible, style_of
from ibpcore.plots.tradeoff import write_tradeoff

__all__ = [
    "STYLES",
    "Look",
    "figures_possible",
    "style_of",
    "write_cost",
    "write_curve",
    "write_curves",
    "write_inspection",
    "write_tradeoff",
]
