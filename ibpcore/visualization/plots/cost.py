"""ART against the cost of training (Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibpcore.visualization.plots.style import Look, legend_below, new_figure, plain, write_both


def write_cost(
    path: Path, points: Sequence[tuple[Look, float, float]], unit: str, title: str
) -> None:
    """A point for each setting, as PNG and SVG.

    Args:
        path: without suffix.
        points: look, cost and ART (a fraction) of each.
        unit: what the cost is.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    for look, cost, art in points:
        axes.plot(cost, 100 * art, **{**look.line(), "linestyle": ""}, label=look.label)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set(title=plain(title), xlabel=f"training time ({unit})", ylabel="ART (%)")
    legend_below(figure, axes)
    write_both(figure, path)
