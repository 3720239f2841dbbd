"""No cold start: a guess for each lane, corrected until the corrections are small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ibpcore.roots.base import (
    Ends,
    LaneFunction,
    OpenLanes,
    Roots,
    RootStatus,
    Solver,
    check,
    evaluate,
    evaluate_all,
)
from ibpcore.roots.brent import Brent
from ibpcore.roots.interpolation import Near, guessed, select

BEYOND = 1.3
"""A guess this much farther than the upper end is taken as saying that there is no root."""
CAUTION = 3.0
"""An interpolated root is taken to be this much less certain than two parabolas differ."""
POWER = 1.3
"""The functions in mind grow about like x ** this: the first correction has one point only."""


@dataclass(frozen=True)
class WarmStart(Solver):
    """Evaluates at a guess, corrects it by interpolation, and so on; `Brent` without a guess.

    A lane is converged when its last correction is below xtol + rtol |x|, or the next one
    would be, to judge by how far two interpolations differ; whether its bracket has closed
    or not. The upper end is evaluated only where a guess (NaN for that end) or a correction
    leads there, and where the guess lies far beyond it nothing is. Of `values` the second
    is not used.

    `root` is interpolated, and `upper` may be the end that was given, at which nothing was
    evaluated. The status is ITERATION_LIMIT where nothing was.
    """

    def __call__(
        self,
        function: LaneFunction,
        lower: Tensor,
        upper: Tensor,
        *,
        values: Ends | None = None,
        guess: Tensor | None = None,
    ) -> Roots:
        if guess is None:
            return Brent(self.xtol, self.rtol, self.max_iterations)(
                function, lower, upper, values=values
            )
        check(self, lower, upper)
        f_lower = evaluate_all(function, lower) if values is None else values[0].to(lower.dtype)
        f_upper = torch.full_like(f_lower, torch.inf)
        # Points in rising order along the way from `lower` to `upper`, f negative at first.
        way = torch.where(upper < lower, -1.0, 1.0).to(lower)
        sign = torch.where(torch.signbit(f_lower), 1.0, -1.0).to(lower)
        first, last = lower * way, upper * way
        near = Near(
            torch.stack([first, first, last, last]),
            torch.stack([f_lower * sign, f_lower * sign, f_upper, f_upper]),
        )
        x = torch.where((guess - upper) * way < 0, guess * way, last)
        x = torch.where(x > first, x, last)
        status = torch.full_like(lower, RootStatus.ITERATION_LIMIT, dtype=torch.int64)
        status.masked_fill_(f_lower.isnan(), RootStatus.NOT_FINITE)
        status.masked_fill_(f_lower == 0, RootStatus.CONVERGED)
        root = torch.where(f_lower == 0, first, x)
        far = (guess - lower) * way >= BEYOND * (upper - lower) * way
        evaluations = torch.ones_like(status)
        stuck, known = torch.zeros_like(status), torch.zeros_like(far)
        lanes = OpenLanes()

        for iteration in range(self.max_iterations):
            open_ = (status == RootStatus.ITERATION_LIMIT) & ~far
            count = lanes.count(open_)
            if count == 0:
                break
            found = evaluate(function, (x * way)[None], open_, count) * sign
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
            # A steep right side draws the chord to the left point, however far the root is.
            small = ((better - x).abs() < tolerance) & ((_own_side(near, x) - x).abs() < tolerance)
            small = small | (CAUTION * guesses.doubt < tolerance)
            status = torch.where(open_ & small, int(RootStatus.CONVERGED), status)
            root = torch.where(open_, better, root)
            # After two corrections that did not halve the bracket comes one that does.
            wide = known & (near.right - near.left > width / 2) & (iteration > 0)
            stuck = torch.where(wide, stuck + 1, 0) % 2
            x = torch.where(wide & (stuck == 0), (near.left + near.right) / 2, better)

        root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, root * way)
        left, right = near.left * way, near.right * way
        left = torch.where(status == RootStatus.NO_BRACKET, upper, left)
        return Roots(
            root,
            torch.where(f_lower == 0, lower, left),
            torch.where(f_lower == 0, lower, right),
            status,
            evaluations,
        )


def _by_power(near: Near, first: Tensor, f_first: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """Root of the power function through f at the lower end and at `x`, in the bracket."""
    root = first + (x - first) * (-f_first / (f - f_first)) ** (1 / POWER)
    # One that does not rise towards 0 says nothing.
    root = torch.where(root.isnan(), near.right, root)
    return torch.minimum(torch.maximum(root, near.left), near.right)


def _own_side(near: Near, x: Tensor) -> Tensor:
    """The root in the bracket by the two points on the side of `x`; `x` if there is only one."""
    (x0, x1, x2, x3), (f0, f1, f2, f3) = near.x, near.f
    left = x1 - f1 * (x1 - x0) / (f1 - f0)
    right = x2 - f2 * (x3 - x2) / (f3 - f2)
    line = torch.where(x == x1, left, right)
    line = torch.minimum(torch.maximum(line, x1), x2)
    return torch.where(line.isnan(), x, line)


def _ahead(near: Near) -> Tensor:
    """Where the line through the two left points is 0, or the right end before that."""
    (x0, x1, x2, _), (f0, f1, _, _) = near.x, near.f
    ahead = x1 - f1 * (x1 - x0) / (f1 - f0)
    return torch.where(ahead > x1, torch.minimum(ahead, x2), x2)
