"""Plain bisection: slow but robust."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ibpcore.roots import base
from ibpcore.roots.base import Equations, OpenLanes, Roots, RootStatus, Solver


@dataclass(frozen=True)
class Bisection(Solver):
    """Plain bisection with the stopping rule of `Brent`.

    A point with f = 0 becomes the right end, so for a non-decreasing function the
    bracket converges to the leftmost root. `root` is the midpoint of the bracket.
    """

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, _ = equations
        f_lower, f_upper = base.at_ends(function, lower, upper, values)
        bracket, status, at_lower, _ = base.start(lower, upper, f_lower, f_upper)
        status = torch.where(at_lower, int(RootStatus.CONVERGED), status)
        evaluations = torch.full_like(status, 2)
        open_lanes = OpenLanes()

        for iteration in range(self.max_iterations + 1):
            middle = (bracket.lower + bracket.upper) / 2
            small = (bracket.upper - bracket.lower).abs() < self.xtol + self.rtol * middle.abs()
            open_ = status == RootStatus.ITERATION_LIMIT
            status = torch.where(open_ & small, int(RootStatus.CONVERGED), status)
            open_ = open_ & ~small
            if iteration == self.max_iterations:
                break
            lanes = open_lanes.chosen(open_)
            if len(lanes) == 0:
                break
            value = base.evaluate(function, middle, open_, lanes)
            evaluations = evaluations + open_
            bracket, status, _ = base.narrowed(bracket, status, middle, value, open_)

        root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, middle)
        return Roots(root, bracket.lower, bracket.upper, status, evaluations)
