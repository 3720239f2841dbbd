"""Warm starts: a guess in each lane, corrected until the corrections are small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ibpcore.roots import base
from ibpcore.roots.base import Equations, OpenLanes, Roots, RootStatus, Solver
from ibpcore.roots.brent import Brent
from ibpcore.roots.interpolation import Near, guessed, select

BEYOND = 1.3
"""A guess this many bracket widths from the lower end is taken to mean that there is no root."""
CAUTION = 3.0
"""An interpolated root's error is assumed to be this multiple of two parabolas' difference."""
POWER = 1.3
"""Functions are assumed to grow like x ** POWER in the first correction, with only one point."""


@dataclass(frozen=True)
class WarmStart(Solver):
    """Evaluates a guess and corrects it by interpolation, repeatedly; `Brent` without a guess.

    For training, where a sample's last visit gives a guess that is nearly right.

    A lane has converged when its last correction is below xtol + rtol |x|, or when the
    difference of two interpolations indicates that the next one will be. Its bracket need
    not have closed. The upper end is evaluated only if a guess (NaN for that end) or a
    correction leads there. If the guess is far beyond it, nothing is evaluated. The second
    of `values` is not used.

    `root` is interpolated. `upper` may be the given end, not evaluated. The status is
    ITERATION_LIMIT where nothing was evaluated.
    """

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, guess = equations
        if guess is None:
            return Brent(self.xtol, self.rtol, self.max_iterations).solve(equations)
        f_lower, _ = values or (base.evaluate_all(function, lower), None)
        f_lower = f_lower.to(lower.dtype)
        f_upper = torch.full_like(f_lower, torch.inf)
        # Points are ordered from `lower` to `upper`, and f is negative at the first.
        direction = torch.where(upper < lower, -1.0, 1.0).to(lower)
        sign = torch.where(torch.signbit(f_lower), 1.0, -1.0).to(lower)
        first, last = lower * direction, upper * direction
        near = Near(
            torch.stack([first, first, last, last]),
            torch.stack([f_lower * sign, f_lower * sign, f_upper, f_upper]),
        )
        x = torch.where((guess - upper) * direction < 0, guess * direction, last)
        x = torch.where(x > first, x, last)
        status = torch.full_like(lower, RootStatus.ITERATION_LIMIT, dtype=torch.int64)
        status.masked_fill_(f_lower.isnan(), RootStatus.NOT_FINITE)
        status.masked_fill_(f_lower == 0, RootStatus.CONVERGED)
        root = torch.where(f_lower == 0, first, x)
        far = (guess - lower) * direction >= BEYOND * (upper - lower) * direction
        evaluations = torch.ones_like(status)
        stuck, known = torch.zeros_like(status), torch.zeros_like(far)
        lanes = OpenLanes()

        for iteration in range(self.max_iterations):
            open_ = (status == RootStatus.ITERATION_LIMIT) & ~far
            count = lanes.count(open_)
            if count == 0:
                break
            found = base.evaluate(function, (x * direction)[None], open_, count) * sign
            evaluations = evaluations + open_
            bad = open_ & found[0].isnan()
            status = torch.where(bad, int(RootStatus.NOT_FINITE), status)
            open_ = open_ & ~bad
            width = near.right - near.left
            near = select(open_, near.joined(x[None], found), near)
            known = known | (open_ & (found[0] >= 0))
            full = open_ & (x == last) & (found[0] < 0)
            status = torch.where(full, int(RootStatus.NO_BRACKET), status)
            open_ = open_ & ~full
            guesses = guessed(near)
            if iteration == 0:
                better = _by_power(near, first, f_lower * sign, x, found[0])
            else:
                better = torch.where(known, guesses.best, _ahead(near))
            tolerance = self.xtol + self.rtol * better.abs()
            # If f is steep on the right, the chord's root is near the left point in any case.
            small = ((better - x).abs() < tolerance) & ((_own_side(near, x) - x).abs() < tolerance)
            small = small | (CAUTION * guesses.doubt < tolerance)
            status = torch.where(open_ & small, int(RootStatus.CONVERGED), status)
            root = torch.where(open_, better, root)
            # Two corrections that did not halve the bracket are followed by one that does.
            wide = known & (near.right - near.left > width / 2) & (iteration > 0)
            stuck = torch.where(wide, stuck + 1, 0) % 2
            x = torch.where(wide & (stuck == 0), (near.left + near.right) / 2, better)

        root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, root * direction)
        left, right = near.left * direction, near.right * direction
        left = torch.where(status == RootStatus.NO_BRACKET, upper, left)
        left, right = (torch.where(f_lower == 0, lower, end) for end in (left, right))
        return Roots(root, left, right, status, evaluations)


def _by_power(near: Near, first: Tensor, f_first: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """Root of the power function through f at the lower end and `x`, clamped to the bracket."""
    root = first + (x - first) * (-f_first / (f - f_first)) ** (1 / POWER)
    # NaN if f does not increase from the lower end to `x`.
    root = torch.where(root.isnan(), near.right, root)
    return torch.minimum(torch.maximum(root, near.left), near.right)


def _own_side(near: Near, x: Tensor) -> Tensor:
    """Root of the line through the two points on the side of `x`; `x` if there is only one."""
    (x0, x1, x2, x3), (f0, f1, f2, f3) = near.x, near.f
    left = x1 - f1 * (x1 - x0) / (f1 - f0)
    right = x2 - f2 * (x3 - x2) / (f3 - f2)
    line = torch.where(x == x1, left, right)
    line = torch.minimum(torch.maximum(line, x1), x2)
    return torch.where(line.isnan(), x, line)


def _ahead(near: Near) -> Tensor:
    """Root of the line through the two left points, but at most the right end."""
    (x0, x1, x2, _), (f0, f1, _, _) = near.x, near.f
    ahead = x1 - f1 * (x1 - x0) / (f1 - f0)
    return torch.where(ahead > x1, torch.minimum(ahead, x2), x2)
