"""Certified accuracy against epsilon (Fig. 3); the area under a curve is the ACR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ibpcore.certification.certificates import Certificates
from ibpcore.visualization.plots.style import (
    Look,
    legend_below,
    new_figure,
    plain,
    write_both,
    write_figure,
)

XLABEL = "epsilon (pixels in [0, 1])"


def write_curve(path: Path, certificates: Certificates, epsilon_max: float, title: str) -> None:
    """The curve of one model, as PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    accuracy = 100 * float((certificates.prediction == certificates.label).double().mean())
    figure, axes = new_figure((6, 4))
    axes.plot(0, accuracy, "o", clip_on=False, label=f"accuracy {accuracy:.1f} %")
    ends, heights = steps(certificates.radius, epsilon_max)
    axes.step(ends, heights, where="pre", label="certified accuracy")
    axes.set(title=plain(title), xlabel=XLABEL, ylabel="share of images (%)")
    axes.set(xlim=(0, epsilon_max), ylim=(0, 100))
    axes.legend(loc="lower left")
    write_figure(figure, path)


def write_curves(
    path: Path,
    lines: Sequence[tuple[Look, float, Tensor]],
    epsilon_max: float,
    title: str,
) -> None:
    """The curves of several models, as PNG and SVG.

    Args:
        path: without suffix.
        lines: look, accuracy and (N,) certified radii of each.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    for look, accuracy, radii in lines:
        ends, heights = steps(radii, epsilon_max)
        drawn = {**look.line(), "marker": ""}
        axes.step(ends, heights, where="pre", zorder=2, **drawn)
        shown = np.linspace(0, epsilon_max, 6)[1:]
        # The first step that reaches at least so far.
        at = [heights[min(int(np.searchsorted(ends, x)), len(ends) - 1)] for x in shown]
        marked = {**look.line(), "linestyle": ""}
        axes.plot(shown, at, clip_on=False, zorder=3, **marked)
        axes.plot(0, 100 * accuracy, clip_on=False, zorder=3, **marked)
        axes.plot([], [], label=look.label, **look.line())
    axes.set(title=plain(title), xlabel=XLABEL, ylabel="certified accuracy (%); accuracy at 0")
    axes.set(xlim=(0, epsilon_max), ylim=(0, None))
    legend_below(figure, axes)
    write_both(figure, path)


def steps(radii: Tensor, epsilon_max: float) -> tuple[list[float], list[float]]:
    """Ends of the steps of a curve, from 0, and the percent of (N,) `radii` up to each."""
    # A radius stored in float32 may be the float just above epsilon_max.
    ordered = np.sort(radii.double().clamp(max=epsilon_max).numpy())
    ordered = ordered[ordered > 0]
    # From each radius to the next: the share of all samples that reach at least that far.
    share = 100 * np.arange(len(ordered), 0, -1) / len(radii)
    ends, heights = [0.0, *ordered], [100 * len(ordered) / len(radii), *share]
    if ends[-1] < epsilon_max:
        ends, heights = [*ends, epsilon_max], [*heights, 0.0]
    return ends, heights
