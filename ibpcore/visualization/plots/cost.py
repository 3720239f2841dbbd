"""Figure of the ART against the cost of training (Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibpcore.visualization.plots.style import Look, legend_below, new_figure, verbatim, write_both


def write_cost(
    path: Path, points: Sequence[tuple[Look, float, float]], title: str, note: str = ""
) -> None:
    """Draws a point for each setting, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        points: look, seconds of training and ART (a fraction) of each setting.
        title: of the figure.
        note: a line of the legend.
    """
    figure, axes = new_figure()
    for look, seconds, art in points:
        axes.plot(seconds, 100 * art, **{**look.line(), "linestyle": ""}, label=look.label)
    if note:
        axes.plot([], [], " ", label=note)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set(title=verbatim(title), xlabel="training time (s)", ylabel="ART (%)")
    legend_below(figure, axes)
    write_both(figure, path)
