"""Several candidates per lane and pass, for devices where a larger batch costs little more."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ibpcore.roots import base
from ibpcore.roots.base import Equations, OpenLanes, Roots, RootStatus, Solver
from ibpcore.roots.interpolation import Near, guessed, select

POWERS = (0.7, 4.0)
"""Initially the functions are assumed to grow like x ** p, with p between these."""


@dataclass(frozen=True)
class Multipoint(Solver):
    """Narrows each bracket with several points per pass, around interpolated roots.

    The stopping rule is that of `Brent`, but `function` is called with points (K, n). Each
    lane keeps the two nearest points on each side of the root, which is estimated by
    inverse quadratic interpolation. The lines through the two left points, the two right
    points and the two in between have roots on both sides of a convex function's root.
    They indicate the error of the estimate, and so how far to spread the points. A pass
    that does not halve the bracket is followed by one with equally spaced points.

    A point with f = 0 becomes the right end, so the bracket converges to the leftmost
    root. `root` is the estimate.

    Attributes:
        candidates: K, points per lane and pass.
    """

    candidates: int = 8

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, _ = equations
        f_lower, f_upper = base.at_ends(function, lower, upper, values)
        bracket, status, at_lower, _ = base.start(lower, upper, f_lower, f_upper)
        status = torch.where(at_lower, int(RootStatus.CONVERGED), status)
        # Points are ordered from `lower` to `upper`, and f is negative at the first.
        direction = torch.where(upper < lower, -1.0, 1.0).to(lower)
        sign = torch.where(bracket.negative, 1.0, -1.0).to(lower)
        near = Near(
            torch.stack([lower, lower, bracket.upper, bracket.upper]) * direction,
            torch.stack([f_lower, f_lower, f_upper, f_upper]) * sign,
        )
        evaluations = torch.full_like(status, 2)
        slow = torch.zeros_like(at_lower)
        open_lanes = OpenLanes()

        for iteration in range(self.max_iterations + 1):
            width = near.right - near.left
            tolerance = self.xtol + self.rtol * ((near.left + near.right) / 2).abs()
            open_ = status == RootStatus.ITERATION_LIMIT
            status = torch.where(open_ & (width < tolerance), int(RootStatus.CONVERGED), status)
            open_ = open_ & ~(width < tolerance)
            if iteration == self.max_iterations:
                break
            lanes = open_lanes.chosen(open_)
            if len(lanes) == 0:
                break
            if iteration == 0:
                points = _first_points(near, self.candidates)
            else:
                points = _points(near, tolerance, self.candidates)
            even = torch.arange(1, self.candidates + 1, device=lower.device, dtype=lower.dtype)
            equal = near.left + width * even[:, None] / (self.candidates + 1)
            points = _inside(torch.where(slow, equal, points), near)
            found = base.evaluate(function, points * direction, open_, lanes) * sign
            evaluations = evaluations + self.candidates * open_
            bad = open_ & found.isnan().any(0)
            status = torch.where(bad, int(RootStatus.NOT_FINITE), status)
            near = select(open_ & ~bad, near.joined(points, found), near)
            slow = ~slow & (near.right - near.left > width / 2)

        root = guessed(near).best * direction
        root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, root)
        root = torch.where(at_lower, lower, root)
        return Roots(root, near.left * direction, near.right * direction, status, evaluations)


def _first_points(near: Near, candidates: int) -> Tensor:
    """(K, B) roots of power functions with several exponents through the two ends."""
    width = near.right - near.left
    share = (guessed(near).best - near.left) / width
    low, high = (math.log(power) for power in POWERS)
    steps = torch.arange(1, candidates + 1, device=share.device, dtype=share.dtype)
    powers = (low + (high - low) * steps / (candidates + 1)).exp()
    return near.left + width * share ** (1 / powers[:, None])


def _points(near: Near, tolerance: Tensor, candidates: int) -> Tensor:
    """(K, B) points on both sides of the guess.

    The nearest pair closes the bracket to within the tolerance if the guess is accurate
    enough. The others have geometric distances, up to twice the spread of the guesses.
    """
    guess = guessed(near)
    others = torch.where(guess.all.isnan(), guess.best, guess.all)
    least, greatest = others.amin(0), others.amax(0)
    pairs, floor = candidates // 2, 0.45 * tolerance
    least_reach = torch.maximum((near.right - near.left) * (0.05 if pairs > 1 else 0), floor)
    steps = torch.arange(pairs, device=floor.device, dtype=floor.dtype)[:, None]
    exponents = steps / (pairs - 1) if pairs > 1 else steps + 1

    def distances(spread: Tensor) -> Tensor:
        reach = torch.maximum(spread * (2 if pairs > 1 else 1), least_reach)
        return floor * (reach / floor) ** exponents

    parts = [
        guess.best - distances(guess.best - least),
        guess.best + distances(greatest - guess.best),
    ]
    if candidates % 2:
        parts.append(guess.best[None])
    return torch.cat(parts)


def _inside(points: Tensor, near: Near) -> Tensor:
    """`points` moved to a small distance from the ends of the bracket."""
    rim = 0.02 * (near.right - near.left)
    return torch.minimum(torch.maximum(points, near.left + rim), near.right - rim)
