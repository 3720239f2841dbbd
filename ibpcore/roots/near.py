"""The points nearest to a root, and what they say of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Near(NamedTuple):
    """Two points on either side of the root, in order, and their values, each (4, B).

    Where only one is known on a side, it is there twice.
    """

    x: Tensor
    f: Tensor

    @property
    def left(self) -> Tensor:
        return self.x[1]

    @property
    def right(self) -> Tensor:
        return self.x[2]

    def joined(self, points: Tensor, values: Tensor) -> Near:
        """The nearest ones, with (K, B) more to choose from."""
        x, order = torch.cat([self.x, points]).sort(dim=0, stable=True)
        f = torch.cat([self.f, values]).gather(0, order)
        first = (f >= 0).to(torch.int8).argmax(0)  # there is one: the old right end
        rows = torch.stack([first - 2, first - 1, first, first + 1]).clamp(0, len(x) - 1)
        return Near(x.gather(0, rows), f.gather(0, rows))


def chosen(mask: Tensor, new: Near, old: Near) -> Near:
    return Near(torch.where(mask, new.x, old.x), torch.where(mask, new.f, old.f))


class Guess(NamedTuple):
    """What the points say of the root, each (B,).

    Attributes:
        best: the likeliest root.
        least, greatest: of all guesses.
        doubt: how far the two parabolas are apart, through three of the points each; NaN
            where there is only one, or none.
    """

    best: Tensor
    least: Tensor
    greatest: Tensor
    doubt: Tensor


def guessed(near: Near) -> Guess:
    (x0, x1, x2, x3), (f0, f1, f2, f3) = near.x, near.f
    middle = (x1 + x2) / 2
    chord = _between(_line(x1, f1, x2, f2), near)
    chord = torch.where(chord.isnan(), middle, chord)
    lines = torch.stack([_line(x0, f0, x1, f1), _line(x2, f2, x3, f3)])
    curves = torch.stack([_quadratic(x0, f0, x1, f1, x2, f2), _quadratic(x1, f1, x2, f2, x3, f3)])
    lines, curves = _between(lines, near), _between(curves, near)
    best = torch.nanmean(curves, 0)
    # A chord and the nearer line bracket the root of a convex function.
    nearer = torch.fmin(lines[0], lines[1])
    linear = torch.where(nearer.isnan(), chord, (chord + nearer) / 2)
    best = torch.where(best.isnan(), linear, best)
    guesses = torch.cat([chord[None], lines, curves])
    least = torch.where(guesses.isnan(), torch.inf, guesses).amin(0)
    greatest = torch.where(guesses.isnan(), -torch.inf, guesses).amax(0)
    return Guess(best, least, greatest, (curves[0] - curves[1]).abs())


def _between(x: Tensor, near: Near) -> Tensor:
    """`x` where it lies inside the bracket, NaN elsewhere."""
    return torch.where((x > near.left) & (x < near.right), x, torch.nan)


def _line(x0: Tensor, f0: Tensor, x1: Tensor, f1: Tensor) -> Tensor:
    """Root of the line through two points."""
    return x0 - f0 * (x1 - x0) / (f1 - f0)


def _quadratic(x0: Tensor, f0: Tensor, x1: Tensor, f1: Tensor, x2: Tensor, f2: Tensor) -> Tensor:
    """x at f = 0 of the parabola x(f) through three points: inverse quadratic interpolation."""
    return (
        x0 * (f1 / (f0 - f1)) * (f2 / (f0 - f2))
        + x1 * (f0 / (f1 - f0)) * (f2 / (f1 - f2))
        + x2 * (f0 / (f2 - f0)) * (f1 / (f2 - f1))
    )
