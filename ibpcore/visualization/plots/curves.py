"""Figures of the certified accuracy against epsilon (Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ibpcore.certification.certificates import Certificates
from ibpcore.certification.formatting import unit_of
from ibpcore.certification.metrics import accuracy_curve
from ibpcore.visualization.plots.style import (
    Look,
    legend_below,
    new_figure,
    verbatim,
    write_both,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

YLABEL = "certified accuracy (%)"


def write_curve(path: Path, certificates: Certificates, epsilon_max: float, title: str) -> None:
    """Draws the curve of one model, as PNG, up to `epsilon_max`, in pixel units."""
    figure, axes = new_figure((6, 4))
    draw_curve(axes, certificates, epsilon_max)
    axes.set_title(verbatim(title))
    write_figure(figure, path)


def draw_curve(axes: Axes, certificates: Certificates, epsilon_max: float) -> None:
    """Draws the curve of one model up to `epsilon_max`, in pixel units."""
    unit = unit_of(epsilon_max)
    accuracy = 100 * float((certificates.prediction == certificates.label).double().mean())
    dot: dict[str, Any] = {"color": "C0", "clip_on": False, "zorder": 3}
    axes.plot(0, accuracy, "o", **dot, label=f"accuracy {accuracy:.1f} %")
    ends, accuracies = accuracy_curve(certificates.radius, epsilon_max)
    line: dict[str, Any] = {"color": "C0", "label": "certified accuracy"}
    axes.step(unit.scale * np.array(ends), accuracies, where="pre", **line)
    axes.set(xlabel=f"radius ({unit.name})", ylabel=YLABEL)
    axes.set(xlim=(0, unit.scale * epsilon_max), ylim=(0, 100))
    axes.legend(loc="best")


def write_curves(
    path: Path,
    lines: Sequence[tuple[Look, float, Tensor]],
    epsilon_max: float,
    title: str,
    note: str = "",
) -> None:
    """Draws the curves of several models, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        lines: look, accuracy (a fraction) and (N,) certified radii of each model.
        epsilon_max: the limit of the radii, in pixel units.
        title: of the figure.
        note: a line of the legend.
    """
    figure, axes = new_figure()
    unit = unit_of(epsilon_max)
    for look, accuracy, radii in lines:
        ends, accuracies = accuracy_curve(radii, epsilon_max)
        line = {**look.line(), "marker": ""}
        axes.step(unit.scale * np.array(ends), accuracies, where="pre", zorder=2, **line)
        shown = np.linspace(0, epsilon_max, 5)[1:]  # where tables have certified accuracies
        # The first step that reaches at least so far.
        at = [accuracies[min(int(np.searchsorted(ends, x)), len(ends) - 1)] for x in shown]
        marked = {**look.line(), "linestyle": ""}
        axes.plot(unit.scale * shown, at, clip_on=False, zorder=3, **marked)
        axes.plot(0, 100 * accuracy, clip_on=False, zorder=3, **marked)
        axes.plot([], [], label=look.label, **look.line())
    axes.plot([], [], " ", label="accuracy at radius 0")
    if note:
        axes.plot([], [], " ", label=note)
    axes.set(title=verbatim(title), xlabel=f"radius ({unit.name})", ylabel=YLABEL)
    axes.set(xlim=(0, unit.scale * epsilon_max), ylim=(0, None))
    legend_below(figure, axes)
    write_both(figure, path)
