"""Figure of an inspection: margins, slopes, ReLUs, radii, tightness and losses in six panels."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.formatting import as_text, unit_of
from ibpcore.visualization.plots.style import blank_figure, verbatim, write_both
from ibpcore.wording import counted

# The colours of Okabe and Ito, which are distinguishable to the colour-blind.
BLACK, ORANGE, SKY = "#000000", "#E69F00", "#56B4E9"
GREEN, BLUE, VERMILLION = "#009E73", "#0072B2", "#D55E00"
PURPLE, DASHES = "#CC79A7", (0, (5, 1, 1, 1, 1, 1))
BOUND_STYLES = {
    name: {"color": color, "linestyle": line}
    for name, color, line in zip(
        BOUNDS, cycle((BLUE, VERMILLION, GREEN, PURPLE)), cycle(("-", "--", "-.", DASHES))
    )
}
RELU_COLORS = {"active": GREEN, "inactive": SKY, "unstable": ORANGE}
CURVES = 12
"""Number of samples whose margin is drawn."""


def write_inspection(path: Path, report: dict[str, Any], title: str) -> None:
    """Draws a report made by `ibpcore.inspection.report`, as PNG and SVG.

    Args:
        path: of the files, without suffix.
        report: of a model.
        title: names method and data set.
    """
    figure = blank_figure((13, 8))
    axes = figure.subplots(2, 3).flat
    panels = (_draw_margins, _draw_slopes, _draw_relus, _draw_radii, _draw_tightness, _draw_lines)
    for panel, place in zip(panels, axes, strict=True):
        panel(place, report)
    images = f"{counted(report['margins']['samples'], 'test image')}"
    figure.suptitle(f"{verbatim(title)}, {images}, ε_max {as_text(report['epsilon_max'])}")
    write_both(figure, path)


def _draw_margins(axes: Any, report: dict[str, Any]) -> None:
    """R(epsilon) of some samples, evenly spaced in the order of their margin at mid-range."""
    unit = unit_of(report["epsilon_max"])
    epsilons = np.array(report["samples"]["epsilons"])
    margins = np.array(report["samples"]["margins"]).reshape(-1, len(epsilons))
    order, count = margins[:, len(epsilons) // 2].argsort(), min(CURVES, len(margins))
    axes.set(
        title=f"certified margin R of {counted(count, 'image')}", xlabel=f"radius ({unit.name})"
    )
    axes.set_ylabel("R (difference of logits); certified below 0")
    for row in order[np.linspace(0, len(order) - 1, count).round().astype(int)]:
        axes.plot(unit.scale * epsilons, margins[row], color=BLUE, linewidth=1, alpha=0.7)
    axes.axhline(0, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, unit.scale * epsilons[-1])
    # The steep ends of a few curves would flatten all others.
    if len(margins) > 0:
        low, high = margins.min(), np.quantile(margins[:, -1], 0.5)
        axes.set_ylim(1.1 * min(low, 0), max(high, -low, 1e-6))


def _draw_slopes(axes: Any, report: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xlabel="rise of R / rise of the radius in [0, 1]", ylabel="images")
    slopes = np.array([s for s in report["samples"]["slope"] if s is not None and s > 0])
    flat = report["slopes"]["zero"]
    beside = f", of {flat} others it is 0" if flat else ""
    axes.set_title(f"slope of R at the radius of {counted(len(slopes), 'image')}{beside}")
    if len(slopes) == 0:
        _write_instead(axes, "no radius between 0 and ε_max")
        return
    low, high = slopes.min() / 1.1, slopes.max() * 1.1
    axes.hist(slopes, bins=np.geomspace(low, high, 25), color=BLUE, edgecolor="white")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_relus(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title="stable and unstable ReLUs")
    axes.set_xlabel("ReLU layer (left: at the radius, right: at ε_max)")
    axes.set_ylabel("share of the ReLUs (%)")
    found = report["relus"]
    layers = len(found["at_epsilon_max"])
    if layers == 0:
        _write_instead(axes, "no ReLUs")
        return
    for offset, key in ((-0.21, "at_radius"), (0.21, "at_epsilon_max")):
        bottom = np.zeros(len(found[key]))
        for name, color in RELU_COLORS.items():
            share = np.array([100 * layer[name] for layer in found[key]])
            places = np.arange(1, len(share) + 1) + offset
            label = name if key == "at_epsilon_max" else None
            axes.bar(places, share, 0.38, bottom, color=color, label=label)
            bottom += share
    axes.set(xticks=range(1, layers + 1), ylim=(0, 100))
    _legend_below(axes)


def _draw_radii(axes: Any, report: dict[str, Any]) -> None:
    """Radii by each bound, sorted; attackable radii end where no attack succeeded."""
    unit = unit_of(report["epsilon_max"])
    axes.set(title="radii, each sorted", xlabel="images (%)", ylabel=f"radius ({unit.name})")
    samples = report["samples"]
    for name, radii in samples["radius"].items():
        scaled = [unit.scale * r for r in radii]
        _plot_sorted(axes, scaled, **BOUND_STYLES[name], label=BOUNDS[name].title)
    attackable = [np.nan if r is None else unit.scale * r for r in samples["attackable_radius"]]
    _plot_sorted(axes, attackable, color=BLACK, linestyle=":", label="attackable")
    axes.set(xlim=(0, 100), ylim=(0, 1.05 * unit.scale * report["epsilon_max"]))
    axes.grid(alpha=0.3)
    _legend_below(axes)


def _plot_sorted(axes: Any, radii: list[float], **style: Any) -> None:
    values = np.sort(radii)
    axes.plot(100 * (np.arange(len(values)) + 0.5) / len(values), values, linewidth=2, **style)


def _draw_tightness(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title="rise of R by attack / by bound", ylabel="local tightness (%)")
    places = {"radius": "at IBP's radius", "epsilon_max": "at ε_max"}
    local = report["tightness"]["local_tightness"]
    names = list(local["radius"])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        found = [local[place][name] for place in places]
        heights = [0 if value is None else 100 * value for value in found]
        left = width * (number - (len(names) - 1) / 2)
        look = {"color": BOUND_STYLES[name]["color"], "label": BOUNDS[name].title}
        bars = axes.bar(np.arange(2) + left, heights, 0.95 * width, **look)
        axes.bar_label(bars, ["-" if value is None else f"{100 * value:.0f}" for value in found])
    axes.set_xticks([0, 1], list(places.values()))
    axes.set_ylim(0, 105)
    _legend_below(axes)


def _draw_lines(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title=f"loss along a line in weight space ({report['direction']})")
    axes.set(xlabel="distance (% of the norm of the weights)", ylabel="mean robust loss")
    for name, line in report["lines"].items():
        places = 100 * report["line_length"] * np.array(line["positions"])
        losses = np.array([np.nan if loss is None else loss for loss in line["losses"]])
        label = f"{BOUNDS[name].title}: {'loss jumps' if line['jumps'] else 'loss does not jump'}"
        axes.plot(places, losses, marker=".", label=label, **BOUND_STYLES[name])
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    """Adds a legend below the axes, where it covers nothing."""
    _, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 14 else 2
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
    axes.legend(**place, ncols=columns, fontsize="small", frameon=False)


def _write_instead(axes: Any, text: str) -> None:
    """For a panel without data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
