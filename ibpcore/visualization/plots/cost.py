"""Figure of the ART against the cost of training (Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibpcore.visualization.plots.style import Look, legend_below, new_figure, verbatim, write_both


def write_cost(
    path: Path, points: Sequence[tuple[Look, float, float]], unit: str, title: str
) -> None:
    """Draws a point for each setting, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        points: look, cost and ART (a fraction) of each setting.
        unit: of the cost, such as "s".
        title: of the figure.
    """
    figure, axes = new_figure()
    for look, cost, art in points:
        axes.plot(cost, 100 * art, **{**look.line(), "linestyle": ""}, label=look.label)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set(title=verbatim(title), xlabel=f"training time ({unit})", ylabel="ART (%)")
    legend_below(figure, axes)
    write_both(figure, path)
