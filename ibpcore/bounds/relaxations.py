"""Linear relaxations: two lines that enclose each activation over an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.interval import Interval, between
from ibpcore.bounds.kernels import relu_lines


class Lines(NamedTuple):
    """Lines below and above y = f(x) for x in an interval, relative to the midpoints.

    With dx = x - mid, and dy = y minus the midpoint of the output interval,
    lower_slope * dx - lower_gap <= dy <= upper_slope * dx + upper_gap. No gap is negative.
    The chord of a monotone f has gap 0, because it passes through both midpoints.

    Attributes: each (B, ...) like `mid`; `upper_gap` is None if it is 0 everywhere.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    lower_gap: Tensor
    upper_gap: Tensor | None


Relaxation = Callable[[Interval], Lines]
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def relu(x: Interval) -> Lines:
    """Over x, (B, ...): the chord above, and the identity or 0 below, whichever leaves less area.

    That is the identity where u > -l (CROWN, Zhang et al. 2018), which means mid > 0.
    """
    return Lines(*relu_lines(x.mid, x.rad), None)


def relu_reversed(x: Interval) -> Lines:
    """As `relu`, with the other one of the identity and 0 below where neither is exact."""
    lines = relu(x)
    crossing = lines.lower_gap > 0
    slope = torch.where(crossing, 1 - lines.lower_slope, lines.lower_slope)
    gap = torch.where(crossing, (x.mid + x.rad) / 2 - slope * x.mid, 0)
    return lines._replace(lower_slope=slope, lower_gap=gap)


def leaky_relu(x: Interval, negative_slope: float, of_relu: Relaxation = relu) -> Lines:
    """Lines of a x + (1 - a) relu(x), a >= 0, over x, (B, ...); for a > 1 the chord is below."""
    a, lines = negative_slope, of_relu(x)
    # Exactly 1 where the neuron is active, even for large a.
    lower, upper = (slope + a * (1 - slope) for slope in lines[:2])
    gap = abs(1 - a) * lines.lower_gap
    if a > 1:
        return Lines(upper, lower, torch.zeros_like(gap), gap)
    return Lines(lower, upper, gap, None)


def prelu(x: Interval, slope: Tensor | float) -> Lines:
    """Lines of max(x, 0) + slope * min(x, 0) over x, (B, ...), with a slope of any sign.

    On one side the chord, which is above up to slope 1 and below otherwise; on the other the
    branch that leaves less area. Gaps are fitted, see `_fitted`.

    Args:
        slope: a number, or a tensor that broadcasts against x.
    """
    active = (x.mid > 0).to(x.mid)
    tangent = active + slope * (1 - active)
    crossing = (x.lower < 0) & (x.upper > 0)

    def function(x: Tensor) -> Tensor:
        return x.clamp(min=0) + slope * x.clamp(max=0)

    # Exact where the sign is fixed, even for intervals of hardly any width.
    chord = torch.where(crossing, _slope(function, x.lower, x.upper), tangent)
    convex = slope * torch.ones_like(active) <= 1
    lower, upper = torch.where(convex, tangent, chord), torch.where(convex, chord, tangent)
    kink = clipped(0.0, x)
    start, end, least = function(x.lower), function(x.upper), function(kink)
    y = between(torch.minimum(torch.minimum(start, end), least), torch.maximum(start, end))
    return _fitted(x, y, function, lower, upper, (kink,))


def clamp(x: Interval, low: Tensor | float, high: Tensor | float) -> Lines:
    """Lines of min(max(x, low), high) over x, (B, ...).

    The upper one is the chord up to `high`, or level where that leaves less area, which is where
    mid > high; the lower one mirrors it. Gaps are fitted, see `_fitted`.

    Args:
        low, high: numbers, or tensors that broadcast against x.
    """

    def function(x: Tensor) -> Tensor:
        return x.clamp(min=low).clamp(max=high)

    first, last = clipped(low, x), clipped(high, x)
    lower = torch.where(x.mid < low, 0, _slope(function, first, x.upper))
    upper = torch.where(x.mid > high, 0, _slope(function, x.lower, last))
    return _fitted(x, x.monotone(function), function, lower, upper, (first, last))


def hardsigmoid(x: Interval) -> Lines:
    """Lines of min(max(x + 3, 0), 6) / 6 over x, (B, ...)."""
    lower, upper, below, above = clamp(x, -3.0, 3.0)
    return Lines(lower / 6, upper / 6, below / 6, None if above is None else above / 6)


def clipped(point: Tensor | float, x: Interval) -> Tensor:
    """The number in x, (B, ...), that is closest to `point`, which broadcasts against x."""
    return torch.maximum(x.upper.clamp(max=point), x.lower)


def _slope(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Tensor:
    """The slope of the chord of `function` from `start` to `end`, see `_ratio`."""
    return _ratio(function(end) - function(start), end - start)


def _ratio(rise: Tensor, run: Tensor) -> Tensor:
    """rise / run, or about 0 where run is so small that the derivative would overflow."""
    return rise / torch.where(run > torch.finfo(run.dtype).tiny, run, 1)


def _fitted(
    x: Interval,
    y: Interval,
    function: Callable[[Tensor], Tensor],
    lower_slope: Tensor,
    upper_slope: Tensor,
    points: Sequence[Tensor],
) -> Lines:
    """The closest lines of given slopes.

    The distance of a line from the function is greatest at an end of x, or at one of `points`.

    Args:
        y: the output interval.
        points: in x; all kinks of a piecewise linear function.
    """
    rises = [(function(point) - y.mid, point - x.mid) for point in (x.lower, x.upper, *points)]
    below = torch.stack([lower_slope * dx - dy for dy, dx in rises]).amax(0)
    above = torch.stack([dy - upper_slope * dx for dy, dx in rises]).amax(0)
    # In exact numbers neither is negative, see `Lines`.
    return Lines(lower_slope, upper_slope, below.clamp(min=0), above.clamp(min=0))


def sigmoid(x: Interval) -> Lines:
    """Lines of the sigmoid over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, torch.sigmoid, lambda y: y * (1 - y))


def tanh(x: Interval) -> Lines:
    """Lines of tanh over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, torch.tanh, lambda y: 1 - y * y)


def softsign(x: Interval) -> Lines:
    """Lines of x / (1 + |x|) over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, F.softsign, lambda y: (1 - y.abs()).square())


def elu(x: Interval, alpha: float) -> Lines:
    """Lines of max(x, 0) + alpha (exp(min(x, 0)) - 1), alpha >= 0, over x, (B, ...).

    It is convex up to alpha = 1. Above, its slope drops at 0, from alpha to 1. See `_s_shaped`.
    """
    bend = math.inf if alpha <= 1 else 0.0

    def slope_at(y: Tensor) -> Tensor:
        return torch.where(y > 0, 1.0, y + alpha)

    return _s_shaped(x, lambda x: F.elu(x, alpha), slope_at, bend)


def celu(x: Interval, alpha: float) -> Lines:
    """Lines of the convex max(x, 0) + alpha (exp(min(x, 0) / alpha) - 1), alpha > 0."""

    def slope_at(y: Tensor) -> Tensor:
        return torch.where(y > 0, 1.0, y / alpha + 1)

    return _s_shaped(x, lambda x: F.celu(x, alpha), slope_at, math.inf)


def selu(x: Interval) -> Lines:
    """Lines of SELU over x, (B, ...), whose slope drops at 0; see `_s_shaped`."""

    def slope_at(y: Tensor) -> Tensor:
        return torch.where(y > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA)

    return _s_shaped(x, F.selu, slope_at)


def softplus(x: Interval, function: Callable[[Tensor], Tensor], beta: float) -> Lines:
    """Lines of the convex `function`, log(1 + exp(beta x)) / beta, beta > 0, over x, (B, ...)."""
    return _s_shaped(x, function, lambda y: -torch.expm1(-beta * y), math.inf)


def logsigmoid(x: Interval) -> Lines:
    """Lines of the concave log(sigmoid(x)) over x, (B, ...), see `_s_shaped`."""
    return _s_shaped(x, F.logsigmoid, lambda y: -torch.expm1(y), -math.inf)


def _s_shaped(
    x: Interval,
    function: Callable[[Tensor], Tensor],
    slope_at: Callable[[Tensor], Tensor],
    bend: float = 0.0,
) -> Lines:
    """Lines for an increasing function, convex below `bend` and concave above.

    On one side of it they are the chord and the tangent at the midpoint. Across it, each passes
    through one end and touches the function on the other side, or is the chord where that lies on
    its side of the function (Zhang et al. 2018). Where the function has no tangent through an end,
    a line of the smaller slope of both ends may be closer.

    Args:
        slope_at: the derivative of the function, as a function of its value.
        bend: infinite for a function that is convex or concave everywhere.
    """
    lower, middle, upper = function(x.lower), function(x.mid), function(x.upper)
    rad = (upper - lower) / 2
    concave, convex = x.lower >= bend, x.upper <= bend
    chord = _ratio(rad, x.rad)
    tangent = Line(slope_at(middle), (middle - lower - rad).abs())
    below, above = tangent, tangent
    if math.isfinite(bend):
        flat = torch.minimum(slope_at(lower), slope_at(upper))
        level = Line(flat, (rad - flat * x.rad).clamp(min=0))
        kink = clipped(bend, x)
        shape = _Shape(function, slope_at, kink, x.mid, lower + rad)
        ends = (x.lower, lower), (x.upper, upper)
        below, above = (
            _nearer(concave | convex, tangent, _touching(shape, chord, *pair), level)
            for pair in (ends[::-1], ends)
        )
    return Lines(
        torch.where(concave, chord, below.slope),
        torch.where(convex, chord, above.slope),
        torch.where(concave, 0, below.gap),
        torch.where(convex, 0, above.gap),
    )


class Line(NamedTuple):
    """The slope of a line and its gap, see `Lines`; each (B, ...)."""

    slope: Tensor
    gap: Tensor


def _nearer(curved: Tensor, tangent: Line, first: Line, second: Line) -> Line:
    """`tangent` where a function is `curved` to one side, else the line with the smaller gap."""
    better = first.gap < second.gap
    pairs = zip(tangent, first, second, strict=True)
    return Line(*(torch.where(curved, t, torch.where(better, a, b)) for t, a, b in pairs))


class _Shape(NamedTuple):
    """An increasing function over an interval, see `_s_shaped`.

    Attributes:
        kink: the number in the interval that is closest to the bend.
        mid, middle: the midpoints of the input and the output interval.
    """

    function: Callable[[Tensor], Tensor]
    slope_at: Callable[[Tensor], Tensor]
    kink: Tensor
    mid: Tensor
    middle: Tensor

    def slope(self, point: Tensor) -> Tensor:
        return self.slope_at(self.function(point))


BISECTIONS = 24
"""Halvings of the interval in which a tangent touches, down to the spacing of float32."""


def _touching(
    shape: _Shape, chord: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Line:
    """The line through `start` that touches the function between its kink and `end`.

    It is above the function if `start` is the lower end, else below. It is the chord where it
    would touch beyond `end`. The gap is fitted, so that it holds for slopes that are only nearly
    right.

    Args:
        start, end: one end of the interval and the other, each with its value.
    """
    touches = chord >= shape.slope(end[0])
    point = _touched(shape, start, end[0])
    slope = torch.where(touches, shape.slope(point), chord)
    sign = torch.where(start[0] < end[0], 1.0, -1.0)
    points = (start, end, *((at, shape.function(at)) for at in (point, shape.kink)))
    gaps = [sign * (value - shape.middle - slope * (at - shape.mid)) for at, value in points]
    return Line(slope, torch.stack(gaps).amax(0).clamp(min=0))


def _touched(shape: _Shape, start: tuple[Tensor, Tensor], end: Tensor) -> Tensor:
    """The point between kink and `end`, (B, ...), whose tangent passes through `start`.

    It is bisected, and has the gradient of a step of Newton's method.
    """

    def miss(point: Tensor, at: Tensor, value: Tensor) -> Tensor:
        return (shape.function(point) - value) - shape.slope(point) * (point - at)

    with torch.no_grad():
        near, far = shape.kink, end
        for _ in range(BISECTIONS):
            point = (near + far) / 2
            # Positive beyond the point for a tangent above, negative for one below.
            before = miss(point, *start) * (end - start[0]) < 0
            near, far = torch.where(before, point, near), torch.where(before, far, point)
        step = torch.finfo(near.dtype).eps ** (1 / 3) * (1 + near.abs())
        bending = (shape.slope(near + step) - shape.slope(near - step)) / (2 * step)
        falling = -bending * (near - start[0])
        usable = falling.abs() > torch.finfo(near.dtype).eps
    change = torch.where(usable, miss(near, *start) / torch.where(usable, falling, 1), 0)
    return near - (change - change.detach())


def product(x: Interval, y: Interval) -> tuple[Lines, Lines]:
    """Planes below and above x * y over both intervals, (B, ...), as the lines of each factor.

    All gaps stand with the first. With dz the product minus the midpoint of x * y,
    lower_slope_x * dx + lower_slope_y * dy - lower_gap <= dz, and likewise above.

    By McCormick (1976), dx dy >= t (rad_y dx + rad_x dy) - rad_x rad_y for t = 1 and t = -1,
    hence for all t in between, and likewise above. Here t is such that the planes span the
    least over the box.
    """
    a, b, both = x.rad * y.mid, x.mid * y.rad, x.rad * y.rad
    below, above = -_clamped_share(a + b, 2 * both), _clamped_share(a - b, 2 * both)
    shift = (x * y).mid - x.mid * y.mid
    first = Lines(y.mid + below * y.rad, y.mid + above * -y.rad, both + shift, both - shift)
    second = Lines(x.mid + below * x.rad, x.mid + above * x.rad, *[torch.zeros_like(both)] * 2)
    return first, second


def _clamped_share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole clamped to [-1, 1], (...), with finite gradients however small `whole` is."""
    inside = (part.abs() < whole) & (whole > torch.finfo(whole.dtype).tiny ** 0.5)
    share = torch.where(inside, part, 0) / torch.where(inside, whole, 1)
    return torch.where(inside, share, part.sign())


def self_gated(
    x: Interval,
    y: Interval,
    function: Callable[[Tensor], Tensor],
    slope_at: Callable[[Tensor], Tensor],
    minimum: float,
    concavity: float,
) -> Lines:
    """Lines of SiLU, GELU or Mish: x times a gate that opens with x.

    Let f'' >= -c. Then f(x) + c (x - mid)^2 / 2 is convex, so that it lies below its chord and
    above its tangent at mid. With |x - mid| <= rad, f lies below its own chord raised by
    c rad^2 / 2, and above its own tangent lowered by as much. In wide intervals lines of relu are
    closer, because relu + minimum <= f <= relu: for x > 0, x - f(x) is at least 0 and at most
    -minimum. Lines of slope 0 hold the output interval. Of the three upper lines the one that is
    lowest at mid is taken, and of the lower ones the highest, which leaves the least area.

    Args:
        y: the output interval.
        slope_at: the derivative of `function`.
        minimum: a lower bound on `function`.
        concavity: c, an upper bound on -f''.
    """
    curve = concavity / 2 * x.rad.square()
    start, end = function(x.lower), function(x.upper)
    relu_lower, relu_upper, _ = relu_lines(x.mid, x.rad)
    top = (F.relu(x.lower) + F.relu(x.upper)) / 2
    level = torch.zeros_like(x.mid)
    chord = _ratio(end - start, 2 * x.rad)
    uppers = [(chord, (start + end) / 2 + curve), (relu_upper, top), (level, y.upper)]
    lowers = [
        (slope_at(x.mid), function(x.mid) - curve),
        (relu_lower, relu_lower * x.mid + minimum),
        (level, y.lower),
    ]
    return _closest(y, lowers, uppers)


def hardswish(x: Interval, y: Interval) -> Lines:
    """Lines of x min(max(x + 3, 0), 6) / 6 over x, (B, ...), with `y` the output interval.

    It is a parabola between -3 and 3, and linear beyond. For each of several slopes a line is
    fitted: its distance is extreme at an end of x, at -3 or 3, or where the parabola has its
    slope. The lowest one at mid is taken above, and the highest one below.
    """
    relu_lower, relu_upper, _ = relu_lines(x.mid, x.rad)
    middle = (2 * x.mid + 3) / 6
    tangent = torch.where(x.mid < -3, 0, torch.where(x.mid > 3, 1, middle))
    chord = _slope(F.hardswish, x.lower, x.upper)

    def heights(slope: Tensor) -> Tensor:
        turn = clipped((3 * slope - 1.5).clamp(-3, 3), x)
        points = torch.stack([x.lower, x.upper, clipped(-3.0, x), clipped(3.0, x), turn])
        return F.hardswish(points) - slope * (points - x.mid)

    uppers = [(slope, heights(slope).amax(0)) for slope in (chord, relu_upper)]
    lowers = [(slope, heights(slope).amin(0)) for slope in (tangent, relu_lower)]
    return _closest(y, lowers, uppers)


Candidates = Sequence[tuple[Tensor, Tensor]]
"""Slopes of lines, and their heights at the midpoint."""


def _closest(y: Interval, lowers: Candidates, uppers: Candidates) -> Lines:
    """The lines that leave the least area; `y` is the output interval."""
    lower, upper = lowers[0], uppers[0]
    for slope, height in lowers[1:]:
        better = height > lower[1]
        lower = torch.where(better, slope, lower[0]), torch.where(better, height, lower[1])
    for slope, height in uppers[1:]:
        better = height < upper[1]
        upper = torch.where(better, slope, upper[0]), torch.where(better, height, upper[1])
    below, above = (y.mid - lower[1]).clamp(min=0), (upper[1] - y.mid).clamp(min=0)
    return Lines(lower[0], upper[0], below, above)
