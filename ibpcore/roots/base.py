"""What all root finders share: lanes, brackets, and how they end.

A *lane* is one scalar equation f(x) = 0. All lanes advance together; finished ones are
frozen by one mask. The function is called as `function(x, lanes)`, where `x` is (n,), or
(K, n) for K points a lane, and `lanes` is an index tensor (n,) that says which lanes
these points belong to.

Only unfinished lanes are evaluated. How many they are is known at once on the CPU. On
CUDA the host would have to wait for it, so it goes by how many there were one iteration
ago: lanes only ever finish, so these are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.errors import UserError

LaneFunction = Callable[[Tensor, Tensor], Tensor]
Ends = tuple[Tensor, Tensor | None]
BUCKET = 16
"""On CUDA lanes are evaluated in multiples of this, so that few shapes occur."""


class RootStatus(IntEnum):
    """How a lane ended."""

    CONVERGED = 0
    ITERATION_LIMIT = 1
    NO_BRACKET = 2
    NOT_FINITE = 3


class Roots(NamedTuple):
    """One entry a lane, each (B,).

    Attributes:
        root: the best estimate; NaN without a bracket.
        lower: last evaluated point with the sign of f at the left end.
        upper: last evaluated point with the other sign, or with f = 0; the right end
            where none was met.
        status: a `RootStatus`.
        evaluations: function evaluations, those of the ends included.
    """

    root: Tensor
    lower: Tensor
    upper: Tensor
    status: Tensor
    evaluations: Tensor


class Bracket(NamedTuple):
    """Ends of the bracket, and whether f is negative at the lower one, each (B,)."""

    lower: Tensor
    upper: Tensor
    negative: Tensor


class OpenLanes:
    """Counts the open lanes without making the host wait on CUDA."""

    def __init__(self) -> None:
        self.previous: tuple[Tensor, torch.cuda.Event] | None = None

    def count(self, open_: Tensor) -> int:
        """An upper bound, exact on the CPU; 0 means that all lanes are finished."""
        if not open_.is_cuda:
            return int(open_.sum())
        earlier, stream = self.previous, torch.cuda.current_stream(open_.device)
        number = open_.sum().to("cpu", non_blocking=True)
        self.previous = (number, stream.record_event())
        if earlier is None:
            return len(open_)
        # The device still has the work queued since then, so this wait costs it nothing.
        earlier[1].synchronize()
        return min(-(-int(earlier[0]) // BUCKET) * BUCKET, len(open_))


def evaluate(function: LaneFunction, x: Tensor, open_: Tensor, count: int) -> Tensor:
    """f at `x`, (B,) or (K, B), for `count` lanes, the open ones first; NaN for the others."""
    lanes = (~open_).to(torch.int8).argsort(stable=True)[:count]
    values = function(x.index_select(-1, lanes), lanes)
    return torch.full_like(x, torch.nan).index_copy(-1, lanes, values.to(x.dtype))


def evaluate_all(function: LaneFunction, x: Tensor) -> Tensor:
    """f at `x`, (B,), for all lanes."""
    return function(x, torch.arange(len(x), device=x.device)).to(x.dtype)


def at_ends(
    function: LaneFunction, lower: Tensor, upper: Tensor, values: Ends | None
) -> tuple[Tensor, Tensor]:
    """f at both ends, evaluated where `values` leaves it open."""
    f_lower, f_upper = values or (evaluate_all(function, lower), None)
    if f_upper is None:
        f_upper = evaluate_all(function, upper)
    return f_lower.to(lower.dtype), f_upper.to(lower.dtype)


def start(
    lower: Tensor, upper: Tensor, f_lower: Tensor, f_upper: Tensor
) -> tuple[Bracket, Tensor, Tensor, Tensor]:
    """The first bracket and status, and the lanes with a root at the lower and the upper end.

    A status of ITERATION_LIMIT says that the lane is open. Of two roots the left counts.
    """
    status = torch.full_like(lower, RootStatus.ITERATION_LIMIT, dtype=torch.int64)
    same = (torch.signbit(f_lower) == torch.signbit(f_upper)) & (f_lower != 0) & (f_upper != 0)
    status.masked_fill_(same, RootStatus.NO_BRACKET)
    bad = f_lower.isnan() | f_upper.isnan()
    status.masked_fill_(bad, RootStatus.NOT_FINITE)
    at_lower, at_upper = (f_lower == 0) & ~bad, (f_upper == 0) & ~bad
    bracket = Bracket(lower, torch.where(f_lower == 0, lower, upper), torch.signbit(f_lower))
    return bracket, status, at_lower, at_upper


def narrowed(
    bracket: Bracket, status: Tensor, x: Tensor, value: Tensor, open_: Tensor
) -> tuple[Bracket, Tensor, Tensor]:
    """Bracket and status with `x` evaluated on `open_` lanes, and the lanes where it counts."""
    moved = open_ & ~value.isnan()
    status = torch.where(open_ & value.isnan(), int(RootStatus.NOT_FINITE), status)
    same_side = moved & (value != 0) & (torch.signbit(value) == bracket.negative)
    lower = torch.where(same_side, x, bracket.lower)
    upper = torch.where(moved & ~same_side, x, bracket.upper)
    return Bracket(lower, upper, bracket.negative), status, moved


@dataclass(frozen=True)
class Solver:
    """A root finder: a value with its options, called with the equations to solve.

    Attributes:
        xtol, rtol: absolute and relative tolerance of the root.
        max_iterations: evaluations after the two ends; 2 and 100 are the paper's.
    """

    xtol: float = 1e-6
    rtol: float = 1e-4
    max_iterations: int = 100

    def __call__(
        self,
        function: LaneFunction,
        lower: Tensor,
        upper: Tensor,
        *,
        values: Ends | None = None,
        guess: Tensor | None = None,
    ) -> Roots:
        """The roots of f, one a lane.

        Args:
            function: f(x, lanes), see `ibpcore.roots.base`; need not be monotone.
            lower, upper: (B,) ends with opposite signs of f.
            values: f at both ends, when known; the second may be None.
            guess: (B,) roots to start from, NaN for none; only `WarmStart` makes use of them.

        Returns:
            `Roots`. A lane with a NaN value ends as NOT_FINITE with its last good bracket.

        Raises:
            UserError: shapes or tolerances are wrong.
        """
        raise NotImplementedError


def check(solver: Solver, lower: Tensor, upper: Tensor) -> None:
    """Raises UserError for wrong shapes, types or tolerances."""
    if lower.dim() != 1 or lower.shape != upper.shape or not lower.is_floating_point():
        raise UserError(
            f"lower and upper must be floating point (B,), but are {lower.dtype}"
            f" {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    tiny = torch.finfo(lower.dtype).tiny
    if not solver.xtol >= tiny:  # below, no bracket around 0 could be halved often enough
        raise UserError(f"xtol must be at least {tiny:g} in {lower.dtype}, but is {solver.xtol:g}")
    smallest = 4 * torch.finfo(lower.dtype).eps
    if not solver.rtol >= smallest:
        raise UserError(
            f"rtol must be at least {smallest:g} in {lower.dtype}, but is {solver.rtol:g}"
        )
    if solver.max_iterations < 0:
        raise UserError(f"max_iterations must not be negative, but is {solver.max_iterations}")
