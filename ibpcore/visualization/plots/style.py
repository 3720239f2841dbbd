"""Style of the figures: one name, colour and marker for each method; and writing the files."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """Title, colour and matplotlib marker of a method, the same in every table and figure."""

    title: str
    color: str
    marker: str


# The colours of Okabe and Ito, which are distinguishable to the colour-blind, a grey, and three of
# Paul Tol's.
STYLES = {
    "standard": Style("Standard", "#000000", "*"),
    "ibp": Style("IBP", "#7F7F7F", "<"),
    "crown-ibp": Style("CROWN-IBP", "#009E73", "^"),
    "fastibp": Style("FastIBP", "#0072B2", "s"),
    "random-ibp": Style("Random-IBP", "#117733", "h"),
    "sabr": Style("SABR", "#E69F00", "D"),
    "mtl-ibp": Style("MTL-IBP", "#CC79A7", "v"),
    "cc-ibp": Style("CC-IBP", "#56B4E9", "P"),
    "exp-ibp": Style("Exp-IBP", "#F0E442", "X"),
    "taps": Style("TAPS", "#882255", "p"),
    "staps": Style("STAPS", "#999933", "d"),
    "acert": Style("ACERT", "#D55E00", "o"),
}
"""In the order of tables and legends."""

NEEDED = "figures need matplotlib: pip install 'ibpcore[plot]'"
INCHES_PER_LINE = 0.21
LINES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "bottom", "right", "top")


def style_of(method: str) -> Style:
    """The style of a method; grey, under its own name, if it has no entry in `STYLES`."""
    return STYLES.get(method, Style(method, "#7F7F7F", "h"))


class Look(NamedTuple):
    """Look of a line or a group of points in a figure.

    Attributes:
        label: name in the legend.
        method: determines colour and marker.
        variant: from 0, distinguishes series of one method by line style and filling.
    """

    label: str
    method: str
    variant: int = 0

    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        style = style_of(self.method)
        # Stars and crosses look smaller than squares of the same size.
        size = 11.0 if style.marker in "*PX" else 7.0
        return {
            "color": style.color,
            "marker": style.marker,
            "markersize": size,
            "linestyle": LINES[self.variant % len(LINES)],
            "fillstyle": FILLS[self.variant % len(FILLS)],
            "markeredgecolor": "#333333" if self.method == "exp-ibp" else style.color,
        }


def figures_possible() -> bool:
    """Whether matplotlib is installed and can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:  # incompatible versions, or an unknown backend, raise various errors
        return False
    return True


def blank_figure(size: tuple[float, float]) -> Figure:
    """A figure of `size` in inches, without axes; UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(NEEDED) from None
    return Figure(figsize=size, layout="constrained")


def new_figure(size: tuple[float, float] = (6.4, 4.8)) -> tuple[Figure, Axes]:
    """A `blank_figure`, and its axes with a grid."""
    figure = blank_figure(size)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def shown_axes(given: Any) -> Axes:
    """`given`, if it is axes; for None new ones with a grid, which a notebook shows.

    Raises:
        UserError: it is something else, or matplotlib is not installed.
    """
    try:
        from matplotlib.axes import Axes
    except ImportError:
        raise UserError(NEEDED) from None
    if given is not None:
        if not isinstance(given, Axes):
            raise UserError(f"axes must be those of matplotlib, or None, not {given!r}")
        return given
    from matplotlib import pyplot  # chooses a backend, which given axes do not need

    axes = pyplot.subplots(figsize=(6, 4), layout="constrained")[1]
    axes.grid(alpha=0.3)
    return axes


def verbatim(title: str) -> str:
    """Escapes dollar signs, between which matplotlib would set mathematics."""
    return title.replace("$", r"\$")


def legend_below(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 3 if longest < 18 else 2 if longest < 34 else 1
    labels = [textwrap.fill(label, 70) for label in labels]
    lines = sum(1 + label.count("\n") for label in labels) / columns
    # The axes keep their height, however long the legend.
    figure.set_figheight(figure.get_figheight() + INCHES_PER_LINE * max(0, lines - 3))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the suffix, `.png` or `.svg`."""
    import matplotlib

    buffer = io.BytesIO()
    kind = path.suffix[1:]
    # Without the date and random identifiers, the same numbers give the same file.
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "ibpcore"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue())


def write_both(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG; the suffix of `path` is replaced."""
    for suffix in (".png", ".svg"):
        write_figure(figure, path.with_suffix(suffix))
