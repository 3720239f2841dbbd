"""Figure of a search: the two objectives of all trials, and the front of the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibpcore.visualization.plots.style import Look, legend_below, new_figure, verbatim, write_both

Pair = tuple[float, float]
"""The first and the second objective of a trial, fractions."""


class Dots(NamedTuple):
    """The trials of a method.

    Attributes:
        look: of its points.
        others: trials that are not on the front.
        front: trials that are.
    """

    look: Look
    others: Sequence[Pair]
    front: Sequence[Pair]


def write_front(path: Path, groups: Sequence[Dots], labels: tuple[str, str], title: str) -> None:
    """Draws the first objective against the second, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        groups: the trials of each method.
        labels: of the objectives.
        title: of the figure.
    """
    figure, axes = new_figure()
    front = sorted((b, a) for group in groups for a, b in group.front)
    line: dict[str, Any] = {"color": "#666666", "linewidth": 1.2, "zorder": 2, "label": "front"}
    axes.plot([100 * x for x, _ in front], [100 * y for _, y in front], **line)
    for look, others, best in groups:
        dots = {**look.line(), "linestyle": "", "clip_on": False}
        pale = {**dots, "alpha": 0.3, "zorder": 3}
        axes.plot([100 * b for _, b in others], [100 * a for a, _ in others], **pale)
        strong = {**dots, "zorder": 4, "label": look.label}
        axes.plot([100 * b for _, b in best], [100 * a for a, _ in best], **strong)
    axes.margins(0.08)
    axes.set(xlabel=f"{labels[1]} on held-out images (%)", ylabel=f"{labels[0]} (%)")
    axes.set_title(verbatim(title))
    legend_below(figure, axes)
    write_both(figure, path)
