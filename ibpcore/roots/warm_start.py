"""Warm starts: estimates of the roots, corrected where they are doubtful, until none is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.roots import base
from ibpcore.roots.base import (
    ONE,
    ZERO,
    Equations,
    LaneFunction,
    OpenLanes,
    Roots,
    RootStatus,
    Solver,
    constant,
)
from ibpcore.roots.brent import Brent

BEND = 0.6
"""At first f is taken to grow like x ** (1 + p ** 2 * (BEND + l)), where p is the position in
the bracket, and l the absolute level, but at most 1: margins are steeper near the upper end."""
FLATTEST, STEEPEST = 0.1, 1.5
"""Limits to the slope of log position against level. Functions with kinks bend so much between two
close points that the chord through both says nothing about the root."""
TWO = constant(2.0)
CAUTION = constant(0.7)
"""The error of the first correction, as a share of it."""
CURVE = 0.1
"""The error of a later one is at least this, times the product of the levels it rests on."""


@dataclass(frozen=True)
class WarmStart(Solver):
    """Evaluates doubtful estimates and corrects them, see `approach`; `Brent` without a start.

    The relative tolerance is one of the distance from `lower`. The second of `values` is not used.
    Training calls `approach` itself: there a sample's last visit gives an estimate.

    `root` is interpolated. `lower` and `upper` may be the given ends, not evaluated. The status
    is ITERATION_LIMIT where nothing was evaluated.
    """

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, start = equations
        if start is None:
            return Brent(self.xtol, self.rtol, self.max_iterations).solve(equations)
        f_lower, _ = values or (base.evaluate_all(function, lower), None)
        f_lower = f_lower.to(lower.dtype)
        way = upper - lower

        def value(at: Tensor, lanes: Tensor) -> Tensor:
            return function(torch.lerp(lower[lanes], upper[lanes], at), lanes)

        at = (start.x - lower) / way
        at = torch.where((at > 0) & (at < 1), at, 1.0)
        width = way.abs()
        # NaN, and so never open, where f(lower) is 0 or not finite.
        doubt = start.doubt / width * (f_lower / f_lower)
        tolerance = Tolerance(self.xtol / width, self.rtol)
        found = approach(value, f_lower, at, doubt, tolerance, self.max_iterations)

        evaluations = 1 + sum(found.opened, torch.zeros_like(lower, dtype=torch.int64))
        at_lower, none = f_lower == 0, found.left >= 1
        status = torch.full_like(evaluations, RootStatus.ITERATION_LIMIT)
        # Not those opened last: the last correction may have left no doubt.
        doubtful = tolerance.exceeded(found.at, found.doubt)
        status.masked_fill_((evaluations > 1) & ~doubtful, RootStatus.CONVERGED)
        status.masked_fill_(found.doubt.isnan(), RootStatus.NOT_FINITE)
        status.masked_fill_(at_lower, RootStatus.CONVERGED)
        status.masked_fill_(none, RootStatus.NO_BRACKET)
        places = found.at, found.left, found.right.clamp(max=1)
        x, left, right = (torch.lerp(lower, upper, place) for place in places)
        root = torch.where(at_lower, lower, x).masked_fill_(none, torch.nan)
        return Roots(root, left, torch.where(at_lower, lower, right), status, evaluations)


class Tolerance(NamedTuple):
    """When a position is doubtful.

    Attributes:
        absolute: (B,) or a scalar tensor.
        relative: to the position.
        slack: a sum of the doubts of all doubtful lanes that is not worth a call of the function,
            a scalar tensor.
    """

    absolute: Tensor
    relative: float
    slack: Tensor = ZERO

    def exceeded(self, at: Tensor, doubt: Tensor) -> Tensor:
        """(B,) whether the doubt about each position is too large."""
        return doubt > torch.add(self.absolute, at, alpha=self.relative)


class Approach(NamedTuple):
    """Positions, each (B,), from 0 at the lower end of a bracket to 1 at the upper one.

    Attributes:
        at, doubt: the estimates, and the errors that they may have.
        left, right: the closest positions evaluated with the sign of f(lower), and without it; 0
            and 2 if there are none.
        opened: (B,) for each call of the function, the lanes evaluated.
    """

    at: Tensor
    doubt: Tensor
    left: Tensor
    right: Tensor
    opened: list[Tensor]


def approach(
    function: LaneFunction,
    at_lower: Tensor,
    at: Tensor,
    doubt: Tensor,
    tolerance: Tolerance,
    max_iterations: int,
    most: int | None = None,
) -> Approach:
    """Roots near estimates: evaluates what is doubtful and corrects it, until nothing is.

    Functions grow nearly like a power of the distance from the lower end. So the logarithm of the
    position is interpolated as a function of the *level*, log(1 - f / f(lower)), which is 0 at the
    root. The difference of two interpolations is the new doubt.

    Args:
        function: f, of positions.
        at_lower: (B,) f at position 0.
        at: (B,) the estimates, in (0, 1].
        doubt: (B,) the error that each may have; NaN for a lane that is never evaluated.
        tolerance: nothing is evaluated any more where it is not exceeded, or its slack covers the
            doubts of all doubtful lanes together.
        most: how many lanes are doubtful at most, if known.
    """
    nothing = torch.zeros_like(at)
    left, right = nothing, nothing + TWO
    gap: Tensor | None = None
    opened: list[Tensor] = []
    points: list[_Point] = []
    open_lanes = OpenLanes(most)
    for iteration in range(max_iterations):
        open_ = tolerance.exceeded(at, doubt)
        if tolerance.slack is not ZERO:
            open_ = open_ & (torch.where(open_, doubt, nothing).sum() > tolerance.slack)
        lanes = open_lanes.chosen(open_)
        if len(lanes) == 0:
            break
        share = base.evaluate(function, at, open_, lanes) / at_lower
        opened.append(open_)
        left = torch.where(share > ZERO, at, left)
        right = torch.where(share <= ZERO, at, right)
        points.append(_point(at, share, points))
        step, error = _correction(points)
        new = at / step.exp_()
        error = error * torch.maximum(at, new)
        good = (new > left) & (new <= right)
        width = right - left
        if iteration % 3 == 2:
            # Three steps that left more than a quarter are followed by a bisection.
            if gap is not None:
                good = good & (width <= gap / 4)
            gap, error = width, torch.minimum(error, width)
        new = torch.where(good, new, torch.lerp(left, right, 0.5)).clamp_max_(1)
        error = torch.where(good, error, width)
        error.masked_fill_(left >= ONE, 0).masked_fill_(share.isnan(), torch.nan)
        at, doubt = torch.where(open_, new, at), torch.where(open_, error, doubt)
    return Approach(at, doubt, left, right, opened)


class _Point(NamedTuple):
    """What was evaluated in an iteration, each (B,), of use only in the lanes that were open.

    Attributes:
        log: the logarithm of the position.
        level: see `approach`.
        slope: d log / d level, from the point before to this one.
    """

    log: Tensor
    level: Tensor
    slope: Tensor


def _point(at: Tensor, share: Tensor, earlier: list[_Point]) -> _Point:
    """The point `at` a position where f is `share` of f(lower), both (B,)."""
    log, level = at.log(), share.neg().log1p_()
    if earlier:
        last = earlier[-1]
        return _Point(log, level, (log - last.log) / (level - last.level))
    square = at * at
    bend = level.abs().clamp_max_(1).mul_(square).add_(square, alpha=BEND)
    return _Point(log, level, bend.log1p_().neg_().exp_())  # 1 / (1 + bend)


def _correction(points: list[_Point]) -> tuple[Tensor, Tensor]:
    """How far log of the last position is beyond the root's, and the error of that, each (B,)."""
    _, level, slope = points[-1]
    if len(points) == 1:
        step = level * slope
        return step, step.abs().mul_(CAUTION)
    last = points[-2]
    turn, product = slope - last.slope, level * last.level
    if len(points) > 2:
        before = points[-3].level
        slope = torch.addcmul(slope, last.level, turn / (level - before), value=-1)
        turn, product = slope - points[-1].slope, product * before
    within = slope.clamp(FLATTEST, STEEPEST)
    turn = turn.abs().add_((slope - within).abs_()).mul_(level).abs_()
    return level * within, torch.add(turn, product.abs_(), alpha=CURVE)
