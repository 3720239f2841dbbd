"""The certified-accuracy curve as SVG that takes its colours from the page."""

from __future__ import annotations

import html
import math

from torch import Tensor

from ibpcore.certification.formatting import unit_of
from ibpcore.certification.metrics import accuracy_curve

SVG_WIDTH, SVG_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 44, 14, 12, 42
"""Size of the drawing, and the margins around its axes."""


def curve_svg(radii: Tensor, epsilon_max: float, accuracy: float | None, kind: str) -> str:
    """Draws the certified accuracy in percent against the radius, in the unit of its limit.

    Args:
        radii: (N,) of all images, in pixel units.
        epsilon_max: the limit of the radii, in pixel units.
        accuracy: a fraction, drawn as a dot; None to omit it.
        kind: what the curve shows, for its axis.
    """
    ends, heights = accuracy_curve(radii, epsilon_max)
    unit, bottom = unit_of(epsilon_max), SVG_HEIGHT - BOTTOM

    def across(radius: float) -> float:
        return LEFT + (SVG_WIDTH - LEFT - RIGHT) * radius / epsilon_max

    def down(percent: float) -> float:
        return bottom - (bottom - TOP) * percent / 100

    parts = []
    for percent in range(0, 101, 20):
        y = down(percent)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{SVG_WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for tick in ticks(unit.scale * epsilon_max):
        x = across(tick / unit.scale)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    path, place = f"M{across(0):.1f} {down(heights[0]):.1f}", f"{across(0):.1f}"
    for end, height in zip(ends[1:], heights[1:], strict=True):
        last, place = place, f"{across(end):.1f}"
        if place != last:  # many of thousands of ends coincide in the drawing
            path += f"V{down(height):.1f}H{place}"
    parts.append(f'<path class="line" d="{path}"/>')
    if accuracy is not None:
        parts.append(f'<circle class="dot" cx="{LEFT}" cy="{down(100 * accuracy):.1f}" r="4"/>')
    middle = (LEFT + SVG_WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{SVG_HEIGHT - 8}" text-anchor="middle">radius ({unit.name})</text>'
        f'<text transform="rotate(-90)" x="{-(TOP + bottom) / 2}" y="11" text-anchor="middle">'
        f"{html.escape(kind)} (%)</text>"
    )
    return (
        f'<svg class="curve" viewBox="0 0 {SVG_WIDTH} {SVG_HEIGHT}" role="img" aria-label='
        f'"{html.escape(kind)} against the radius; figures below">{"".join(parts)}</svg>'
    )


def ticks(limit: float) -> list[float]:
    """Round numbers from 0 to `limit`, about five to ten of them."""
    power = 10.0 ** math.floor(math.log10(limit / 5))
    step = power * max(m for m in (1, 2, 5) if m * power <= limit / 5)
    return [round(i * step, 12) for i in range(int(limit / step * (1 + 1e-9)) + 1)]
