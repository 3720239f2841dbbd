"""Is a function of one number continuous? Its steps on a grid, and under a magnifying glass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.errors import UserError

HALVINGS = {torch.float32: 10, torch.float64: 20}
"""How often the cell of the largest step is halved, as far as rounding lets one see: the step
of a smooth function shrinks to 1/1024, or to a millionth."""
JUMP = 32
"""A step that shrinks so many times less is called a jump."""

Functions = Callable[[Tensor], Tensor]
"""Positions (K, B) to values (K, B): B functions, each at places of its own."""


class Continuity(NamedTuple):
    """How B functions go from point to point of a grid, each (B,).

    All but `place` are shares of the function's range over the grid, 0 where that is 0.

    Attributes:
        decrease: the largest drop from a point to the next.
        step: the largest |difference| of two neighbours.
        coarse_step: the same on every second point. A Lipschitz function's step is about
            half of it where the grid is fine enough, a jump is as large on both.
        place: the left end of the cell with the largest step.
        remainder: what is left of that step when its cell is halved, `HALVINGS` times,
            each time towards the larger step.
    """

    decrease: Tensor
    step: Tensor
    coarse_step: Tensor
    place: Tensor
    remainder: Tensor

    def jumps(self, rounding: Tensor | float) -> Tensor:
        """(B,) where a step does not shrink with its cell, rounding errors aside."""
        smooth = self.step / 2 ** HALVINGS[self.step.dtype]
        return (self.remainder > JUMP * smooth) & (self.remainder > rounding)


def check_points(points: int, name: str) -> None:
    """Raises UserError unless every second one of so many points makes a grid too."""
    if points < 5 or points % 2 == 0:
        raise UserError(f"{name} must be an odd number of at least 5 points, but is {points}")


def value_range(values: Tensor) -> Tensor:
    """(B,) largest less smallest of (K, B) values."""
    return values.amax(0) - values.amin(0)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0."""
    return torch.where(whole == 0, 0, part / whole)


def measure_continuity(functions: Functions, grid: Tensor, values: Tensor) -> Continuity:
    """What `Continuity` says, of functions that have finite values.

    Args:
        functions: called at each of `HALVINGS` further places, (1, B).
        grid: (K,) ascending, K odd.
        values: (K, B) at the grid, float32 or float64.
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
    """(B,) |steps| of cells (B,), each halved towards the larger step."""
    ends = torch.stack([grid[cell], grid[cell + 1]])
    at = values.gather(0, torch.stack([cell, cell + 1]))
    for _ in range(HALVINGS[values.dtype]):
        middle = ends.mean(0, keepdim=True)
        value = functions(middle)
        left = (value - at[:1]).abs() > (at[1:] - value).abs()
        ends = torch.where(left, torch.cat([ends[:1], middle]), torch.cat([middle, ends[1:]]))
        at = torch.where(left, torch.cat([at[:1], value]), torch.cat([value, at[1:]]))
    return at.diff(dim=0).abs()[0]
