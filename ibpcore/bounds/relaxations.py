"""Linear relaxations: for each activation two lines that hold it between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relu_lines


class Lines(NamedTuple):
    """Lines below and above y = f(x) for x in an interval, seen from the middles.

    With dx = x - mid and dy = y - mid of the interval that f makes of it,
    lower_slope * dx - lower_gap <= dy <= upper_slope * dx + upper_gap. No gap is negative.
    The chord of f has none: at its middle it is where the interval's middle is.

    Attributes: each of the shape of `mid`; `upper_gap` is None where it is 0.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    lower_gap: Tensor
    upper_gap: Tensor | None


Relaxation = Callable[[Interval], Lines]


def relu(x: Interval) -> Lines:
    """The chord above; below the identity or 0, whichever leaves the smaller area (CROWN).

    That is the identity where u > -l (Zhang et al. 2018), which says mid > 0.
    """
    return Lines(*relu_lines(x.mid, x.rad), None)


def leaky_relu(x: Interval, negative_slope: float) -> Lines:
    """a x + (1 - a) relu(x), for a slope a >= 0; above 1 it is concave, the chord below."""
    a, lines = negative_slope, relu(x)
    # 1 where the neuron is active, however large a is.
    lower, upper = (slope + a * (1 - slope) for slope in lines[:2])
    gap = abs(1 - a) * lines.lower_gap
    if a > 1:
        return Lines(upper, lower, torch.zeros_like(gap), gap)
    return Lines(lower, upper, gap, None)


def sigmoid(x: Interval) -> Lines:
    """See `_s_shaped`."""
    return _s_shaped(x, torch.sigmoid, lambda y: y * (1 - y))


def tanh(x: Interval) -> Lines:
    """See `_s_shaped`."""
    return _s_shaped(x, torch.tanh, lambda y: 1 - y * y)


def _s_shaped(
    x: Interval, function: Callable[[Tensor], Tensor], slope_at: Callable[[Tensor], Tensor]
) -> Lines:
    """Lines for a rising function, convex below 0 and concave above.

    On one side of 0 the chord and the tangent at the middle. Across 0 the lines through
    either end with the smaller of the two slopes there, since nowhere in between is the
    function less steep (Singh et al. 2019).

    Args:
        slope_at: the slope of the function from its value.
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
