"""Labels beside the points of a figure, where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDES: tuple[dict[str, Any], ...] = (
    {"xytext": (6.5, 6.5), "ha": "left", "va": "bottom"},
    {"xytext": (-6.5, -6.5), "ha": "right", "va": "top"},
    {"xytext": (8, 0), "ha": "left", "va": "center"},
    {"xytext": (-8, 0), "ha": "right", "va": "center"},
)
"""Places of a label beside its point, in the order in which they are tried."""
MARKER = 6.0
"""Distance in points that labels keep from the middle of any marker."""


def label_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Writes each text beside its point, or leaves it out where it would overlap something.

    Earlier points have precedence. Call it when the axes have their final limits and place.

    Args:
        axes: in which markers are at `points` and nowhere else.
        points: (N,) in data coordinates.
        texts: (N,) of one line each.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # which lays the axes out
    reach = MARKER * figure.dpi / 72
    places = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in places]
    for point, text in zip(points, texts, strict=True):
        for side in SIDES:
            label = axes.annotate(text, point, textcoords="offset points", fontsize=8, **side)
            label.set_in_layout(False)
            box = label.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            inside &= axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and box.count_overlaps(taken) == 0:
                taken.append(box)
                break
            label.remove()
