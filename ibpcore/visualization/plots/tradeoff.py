"""Figure of the accuracy against the ACR (Fig. 1), with lines of equal ART."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ibpcore.certification.metrics import Point, pareto_front
from ibpcore.visualization.plots.point_labels import label_points
from ibpcore.visualization.plots.style import Look, legend_below, new_figure, verbatim, write_both

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_HEIGHT, LABEL_WIDTH = 0.05, 0.12
"""Least distance of two labels of lines, as shares of the axes."""


class Tradeoff(NamedTuple):
    """The trade-off of a method.

    Attributes:
        look: of its line and points.
        points: fractions.
        labels: of the points.
        chosen: the point to mark, if any.
    """

    look: Look
    points: Sequence[Point]
    labels: Sequence[str]
    chosen: Point | None


def write_tradeoff(path: Path, series: Sequence[Tradeoff], chosen_on: str, title: str) -> None:
    """Draws every point and a line along the Pareto front of each method, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        series: the methods.
        chosen_on: names the images that the points were chosen on.
        title: of the figure.
    """
    figure, axes = new_figure()
    for look, points, *_ in series:
        line = {**look.line(), "clip_on": False}
        axes.plot(*_in_percent(points), **{**line, "linestyle": ""}, alpha=0.45, zorder=3)
        axes.plot(*_in_percent(pareto_front(points)), **line, label=look.label, zorder=4)
    rings = [one.chosen for one in series if one.chosen is not None]
    if rings:
        ring: dict[str, Any] = {"mfc": "none", "mec": "#333333", "ms": 15, "clip_on": False}
        axes.plot(*_in_percent(rings), "o", **ring, zorder=5, label=f"† chosen on {chosen_on}")
    axes.margins(0.08)
    axes.set(xlabel="average certified radius, ACR (%)", ylabel="accuracy (%)")
    axes.set_title(verbatim(title), pad=18)
    _draw_equal_art(axes)
    legend_below(figure, axes)
    _label_points(axes, series)
    write_both(figure, path)


def _label_points(axes: Axes, series: Sequence[Tradeoff]) -> None:
    """Labels the chosen points first, then those on a front, then the others."""
    ranked = [
        (point != one.chosen, point not in pareto_front(one.points), point, label)
        for one in series
        for point, label in zip(one.points, one.labels, strict=True)
    ]
    ranked.sort(key=lambda entry: entry[:2])
    places = zip(*_in_percent([point for *_, point, _ in ranked]), strict=True)
    label_points(axes, list(places), [label for *_, label in ranked])


def _in_percent(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """ACRs and accuracies."""
    return [100 * acr for acr, _ in points], [100 * accuracy for _, accuracy in points]


def _draw_equal_art(axes: Axes) -> None:
    """Draws lines of equal ART, with labels outside the axes, where no point can be."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    left, bottom = max(left, 0.0), max(bottom, 0.0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    last = {"right": -1.0, "top": -1.0}
    for art in MaxNLocator(8).tick_values((left * bottom) ** 0.5, (right * top) ** 0.5):
        # From the left or the top of the axes to their right or bottom.
        start, end = max(left, art**2 / top), min(right, art**2 / max(bottom, 1e-9))
        if art <= 0 or start >= end:
            continue
        x = np.geomspace(start, end, 200)
        axes.plot(x, art**2 / x, color="#BBBBBB", linewidth=0.9, zorder=1)
        look: dict[str, Any] = {"color": "#666666", "fontsize": 9, "transform": axes.transAxes}
        height, width = (art**2 / right - bottom) / (top - bottom), (start - left) / (right - left)
        if height > last["right"] + LABEL_HEIGHT and height >= 0:
            axes.text(1.01, height, f"ART {art:g}", ha="left", va="center", **look)
            last["right"] = height
        elif start > left and width > last["top"] + LABEL_WIDTH:
            axes.text(width, 1.01, f"ART {art:g}", ha="center", va="bottom", **look)
            last["top"] = width
