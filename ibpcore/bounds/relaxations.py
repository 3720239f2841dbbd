"""Linear relaxations: two lines that enclose each activation over an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relu_lines


class Lines(NamedTuple):
    """Lines below and above y = f(x) for x in an interval, relative to the midpoints.

    With dx = x - mid, and dy = y minus the midpoint of the output interval,
    lower_slope * dx - lower_gap <= dy <= upper_slope * dx + upper_gap. No gap is negative.
    The chord of f has gap 0, because it passes through both midpoints.

    Attributes: each (B, ...) like `mid`; `upper_gap` is None if it is 0 everywhere.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    lower_gap: Tensor
    upper_gap: Tensor | None


Relaxation = Callable[[Interval], Lines]


def relu(x: Interval) -> Lines:
    """Over x, (B, ...): the chord above, and the identity or 0 below, whichever leaves less area.

    That is the identity where u > -l (CROWN, Zhang et al. 2018), which means mid > 0.
    """
    return Lines(*relu_lines(x.mid, x.rad), None)


def leaky_relu(x: Interval, negative_slope: float) -> Lines:
    """Lines of a x + (1 - a) relu(x), a >= 0, over x, (B, ...); for a > 1 the chord is below."""
    a, lines = negative_slope, relu(x)
    # Exactly 1 where the neuron is active, even for large a.
    lower, upper = (slope + a * (1 - slope) for slope in lines[:2])
    gap = abs(1 - a) * lines.lower_gap
    if a > 1:
        return Lines(upper, lower, torch.zeros_like(gap), gap)
    return Lines(lower, upper, gap, None)


def sigmoid(x: Interval) -> Lines:
    """Lines of the sigmoid over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, torch.sigmoid, lambda y: y * (1 - y))


def tanh(x: Interval) -> Lines:
    """Lines of tanh over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, torch.tanh, lambda y: 1 - y * y)


def _s_shaped(
    x: Interval, function: Callable[[Tensor], Tensor], slope_at: Callable[[Tensor], Tensor]
) -> Lines:
    """Lines for an increasing function, convex below 0 and concave above.

    On one side of 0 they are the chord and the tangent at the midpoint. Across 0 they pass
    through the two ends with the smaller of the slopes there, since the function is nowhere
    flatter in between (Singh et al. 2019).

    Args:
        slope_at: the derivative of the function, as a function of its value.
    """
    lower, middle, upper = function(x.lower), function(x.mid), function(x.upper)
    rad = (upper - lower) / 2
    concave, convex = x.lower >= 0, x.upper <= 0
    curved = concave | convex
    chord = rad / torch.where(x.rad > 0, x.rad, 1)
    flat = torch.minimum(slope_at(lower), slope_at(upper))
    slope = torch.where(curved, slope_at(middle), flat)
    gap = torch.where(curved, (middle - lower - rad).abs(), rad - flat * x.rad)
    return Lines(
        torch.where(concave, chord, slope),
        torch.where(convex, chord, slope),
        torch.where(concave, 0, gap),
        torch.where(convex, 0, gap),
    )


def product(x: Interval, y: Interval) -> tuple[Lines, Lines]:
    """Planes below and above x * y over both intervals, (B, ...), as the lines of each factor.

    All gaps stand with the first. With dz the product minus the midpoint of x * y,
    lower_slope_x * dx + lower_slope_y * dy - lower_gap <= dz, and likewise above.

    By McCormick (1976), dx dy >= t (rad_y dx + rad_x dy) - rad_x rad_y for t = 1 and t = -1,
    hence for all t in between, and likewise above. Here t is such that the planes span the
    least over the box.
    """
    a, b, both = x.rad * y.mid, x.mid * y.rad, x.rad * y.rad
    with torch.no_grad():  # every t holds, and the least span has gradient 0 with respect to it
        span = torch.where(both > 0, 2 * both, 1)
        below, above = ((-s / span).clamp(-1, 1) for s in (a + b, b - a))
    shift = (x * y).mid - x.mid * y.mid
    first = Lines(y.mid + below * y.rad, y.mid + above * -y.rad, both + shift, both - shift)
    second = Lines(x.mid + below * x.rad, x.mid + above * x.rad, *[torch.zeros_like(both)] * 2)
    return first, second
