"""The evaluated points nearest to a root, and estimates of the root from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Near(NamedTuple):
    """The two nearest points on each side of the root, ascending, and their values, each (4, B).

    If only one is known on a side, it is repeated.
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
        """The nearest points after adding `points` with `values`, both (K, B)."""
        x, order = torch.cat([self.x, points]).sort(dim=0, stable=True)
        f = torch.cat([self.f, values]).gather(0, order)
        first = (f >= 0).to(torch.int8).argmax(0)  # exists: the old right end
        rows = torch.stack([first - 2, first - 1, first, first + 1]).clamp(0, len(x) - 1)
        return Near(x.gather(0, rows), f.gather(0, rows))


def select(mask: Tensor, new: Near, old: Near) -> Near:
    """`new` where `mask` (B,), `old` elsewhere."""
    return Near(torch.where(mask, new.x, old.x), torch.where(mask, new.f, old.f))


class Guess(NamedTuple):
    """Estimates of the root.

    Attributes:
        best: (B,) the best estimate.
        all: (5, B) roots of the lines and parabolas through neighbouring points, NaN where
            one is outside the bracket or lacks points.
        doubt: (B,) distance between the roots of the two parabolas, NaN unless both exist.
    """

    best: Tensor
    all: Tensor
    doubt: Tensor


def guessed(near: Near) -> Guess:
    """Interpolates the root between the four points of each lane."""
    x, f = near
    lines = _line(x[:3], f[:3], x[1:], f[1:])
    curves = _quadratic(x[:2], f[:2], x[1:3], f[1:3], x[2:], f[2:])
    found = _between(torch.cat([lines, curves]), near)
    left, chord, right, first, second = found
    chord = torch.where(chord.isnan(), (near.left + near.right) / 2, chord)
    # The roots of the chord and of the nearer line bracket that of a convex function.
    nearer = torch.fmin(left, right)
    linear = torch.where(nearer.isnan(), chord, (chord + nearer) / 2)
    best = torch.nanmean(found[3:], 0)
    best = torch.where(best.isnan(), linear, best)
    return Guess(best, found, (first - second).abs())


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
