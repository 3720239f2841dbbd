"""Warm starts: estimates of the roots, corrected where they are doubtful, until none is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.roots import base
from ibpcore.roots.base import Equations, OpenLanes, Roots, RootStatus, Solver
from ibpcore.roots.brent import Brent

BEND = 0.6
"""At first f is taken to grow like x ** (1 + p ** 2 * (BEND + l)), where p is the position in
the bracket, and l the absolute level, but at most 1: margins are steeper near the upper end."""
CAUTION = 0.5
"""The error of the first correction, as a share of it."""
CURVE = 0.1
"""The error of a later one is at least this, times the product of the levels it rests on."""
FARTHEST = 6.0
"""The logarithm of the largest correction."""


@dataclass(frozen=True)
class WarmStart(Solver):
    """Evaluates doubtful estimates and corrects them by interpolation; `Brent` without a start.

    For training, where a sample's last visit gives an estimate that is nearly right.

    Each lane has an estimate and a doubt, the error that it may have. f is evaluated where the
    doubt exceeds xtol + rtol |x|, until the mean doubt is small. Functions grow nearly like a power
    of the distance from `lower`. So the logarithm of that distance is interpolated as a function
    of the *level*, log((f - f(lower)) / -f(lower)), which is 0 at the root. The difference of two
    interpolations is the new doubt. The second of `values` is not used.

    `root` is interpolated. `lower` and `upper` may be the given ends, not evaluated. The status
    is ITERATION_LIMIT where nothing was evaluated.
    """

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, start = equations
        if start is None:
            return Brent(self.xtol, self.rtol, self.max_iterations).solve(equations)
        f_lower, _ = values or (base.evaluate_all(function, lower), None)
        f_lower = f_lower.to(lower.dtype)
        zero, one, xtol = (torch.full_like(lower, x) for x in (0, 1, self.xtol))
        width = (upper - lower).abs()
        # Positions from 0 at `lower` to 1 at `upper`; infinite if f(upper) is not known.
        left, right, gap = zero, one / zero, one / zero
        at = (start.x - lower) / (upper - lower)
        at = torch.where((at > zero) & (at < one), at, one)
        # NaN, and so never open, where f(lower) is 0 or not finite.
        doubt = start.doubt * (f_lower / f_lower)
        evaluations = torch.ones_like(lower, dtype=torch.int64)
        points: list[_Point] = []
        open_lanes = OpenLanes()
        x = torch.lerp(lower, upper, at)
        open_ = self._doubtful(x, doubt, xtol, start.slack)

        for iteration in range(self.max_iterations):
            lanes = open_lanes.chosen(open_)
            if len(lanes) == 0:
                break
            share = base.evaluate(function, x, open_, lanes) / f_lower
            evaluations.masked_fill_(open_, iteration + 2)
            left = torch.where(share > zero, at, left)
            right = torch.where(share <= zero, at, right)
            points.append(_point(at, share, points))
            step, error = _correction(points)
            new = at * step.clamp_(-FARTHEST, FARTHEST).neg_().exp_()
            error = error * torch.maximum(at, new)
            good = (new > left) & (new <= right)
            if iteration % 3 == 2:
                # Three steps that left more than a quarter are followed by a bisection.
                good, gap = good & (right - left <= gap / 4), right - left
                error = torch.minimum(error, gap)
            new = torch.where(good, new, (left + right) / 2).clamp_(max=1)
            error = torch.where(good, error, right - left) * width
            error.masked_fill_(left >= one, 0).masked_fill_(share.isnan(), torch.nan)
            at, doubt = torch.where(open_, new, at), torch.where(open_, error, doubt)
            x = torch.lerp(lower, upper, at)
            open_ = self._doubtful(x, doubt, xtol, start.slack)

        at_lower, none = f_lower == zero, left >= one
        status = torch.full_like(evaluations, RootStatus.ITERATION_LIMIT)
        # Not `open_`: what the slack leaves may still be doubtful.
        doubtful = self._doubtful(x, doubt, xtol, 0)
        status.masked_fill_((evaluations > 1) & ~doubtful, RootStatus.CONVERGED)
        status.masked_fill_(doubt.isnan(), RootStatus.NOT_FINITE)
        status.masked_fill_(at_lower, RootStatus.CONVERGED)
        status.masked_fill_(none, RootStatus.NO_BRACKET)
        root = torch.where(at_lower, lower, x).masked_fill_(none, torch.nan)
        ends = torch.lerp(lower, upper, left), torch.lerp(lower, upper, right.clamp_(max=1))
        return Roots(root, ends[0], torch.where(at_lower, lower, ends[1]), status, evaluations)

    def _doubtful(self, x: Tensor, doubt: Tensor, xtol: Tensor, slack: float) -> Tensor:
        """The doubtful lanes, (B,); none if the slack covers the doubt of all together."""
        open_ = doubt > torch.add(xtol, x.abs(), alpha=self.rtol)
        if slack == 0:
            return open_
        return open_ & (doubt.masked_fill(~open_, 0).sum() > slack * len(doubt))


class _Point(NamedTuple):
    """What was evaluated in an iteration, each (B,), of use only in the lanes that were open.

    Attributes:
        log: the logarithm of the position.
        level: see `WarmStart`.
        slope: d log / d level, from the point before to this one.
    """

    log: Tensor
    level: Tensor
    slope: Tensor


def _point(at: Tensor, share: Tensor, earlier: list[_Point]) -> _Point:
    """The point `at` a position where f is `share` of f(lower), both (B,)."""
    log, level = at.log(), share.neg().log1p()
    if earlier:
        last = earlier[-1]
        return _Point(log, level, (log - last.log) / (level - last.level))
    power = torch.addcmul(torch.ones_like(at), at, at, value=BEND)
    power.addcmul_(at * at, level.abs().clamp_(max=1))
    return _Point(log, level, power.reciprocal_())


def _correction(points: list[_Point]) -> tuple[Tensor, Tensor]:
    """How far log of the last position is beyond the root's, and the error of that, each (B,)."""
    _, level, slope = points[-1]
    step = level * slope
    if len(points) == 1:
        return step, step.abs().mul_(CAUTION)
    turn, product = slope - points[-2].slope, level * points[-2].level
    if len(points) == 2:
        return step, torch.add((level * turn).abs(), product.abs(), alpha=CURVE)
    before = points[-3].level
    bend = product * turn / (level - before)
    return step - bend, torch.add(bend.abs(), (product * before).abs(), alpha=CURVE)
