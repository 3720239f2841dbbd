"""Checks whether scalar functions are continuous, by their steps on a grid and in halved cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.errors import UserError

HALVINGS = {torch.float32: 10, torch.float64: 20}
"""How often the cell of the largest step is bisected, limited by rounding: the step of a smooth
function shrinks to 1/1024, or to a millionth."""
JUMP = 32
"""A step that remains this many times larger than that is called a jump."""

Functions = Callable[[Tensor], Tensor]
"""Positions (K, B) to values (K, B): B functions, each at its own positions."""


class Continuity(NamedTuple):
    """The steps of B functions between the points of a grid, each (B,).

    All but `place` are fractions of the function's range over the grid, 0 if that is 0.

    Attributes:
        decrease: the largest decrease from one point to the next.
        step: the largest |difference| of two neighbours.
        coarse_step: the same on every second point. On a fine grid, a Lipschitz function's
            step is about half of it, but a jump is as large on both.
        place: the left end of the cell with the largest step.
        remainder: what remains of that step after `HALVINGS` bisections of its cell, each
            towards the half with the larger step.
    """

    decrease: Tensor
    step: Tensor
    coarse_step: Tensor
    place: Tensor
    remainder: Tensor

    def jumps(self, rounding: Tensor | float) -> Tensor:
        """(B,) whether `remainder` exceeds `rounding`, (B,), and by far that of a smooth step."""
        smooth = self.step / 2 ** HALVINGS[self.step.dtype]
        return (self.remainder > JUMP * smooth) & (self.remainder > rounding)


def check_points(points: int, name: str) -> None:
    """Raises UserError unless every second point of such a grid is a grid of the same range."""
    if points < 5 or points % 2 == 0:
        raise UserError(f"{name} must be an odd number of at least 5 points, but is {points}")


def value_range(values: Tensor) -> Tensor:
    """(B,) largest minus smallest of (K, B) values."""
    return values.amax(0) - values.amin(0)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, both (...), and 0 where the whole is 0."""
    return torch.where(whole == 0, 0, part / whole)


def measure_continuity(functions: Functions, grid: Tensor, values: Tensor) -> Continuity:
    """Measures the `Continuity` of B functions with finite values.

    Args:
        functions: called at `HALVINGS` further positions, (1, B) each.
        grid: (K,) ascending, K odd.
        values: (K, B) on the grid, float32 or float64.
    """
    whole = value_range(values)
    step, cell = values.diff(dim=0).abs().max(0)
    parts = (
        (values[:-1] - values[1:]).amax(0).clamp(min=0),
        step,
        values[::2].diff(dim=0).abs().amax(0),
        _remainder(functions, grid, values, cell),
    )
    decrease, step, coarse_step, remainder = (share(part, whole) for part in parts)
    return Continuity(decrease, step, coarse_step, grid[cell], remainder)


def _remainder(functions: Functions, grid: Tensor, values: Tensor, cell: Tensor) -> Tensor:
    """(B,) |steps| of cells (B,) after bisecting each towards the larger step."""
    ends = torch.stack([grid[cell], grid[cell + 1]])
    at = values.gather(0, torch.stack([cell, cell + 1]))
    for _ in range(HALVINGS[values.dtype]):
        middle = ends.mean(0, keepdim=True)
        value = functions(middle)
        left = (value - at[:1]).abs() > (at[1:] - value).abs()
        ends = torch.where(left, torch.cat([ends[:1], middle]), torch.cat([middle, ends[1:]]))
        at = torch.where(left, torch.cat([at[:1], value]), torch.cat([value, at[1:]]))
    return at.diff(dim=0).abs()[0]
