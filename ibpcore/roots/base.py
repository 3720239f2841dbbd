"""Common parts of all root finders: lanes, brackets and results.

A *lane* is one scalar equation f(x) = 0. All lanes advance together; a mask freezes the
finished ones. The function is called as `function(x, lanes)`, where `x` is (n,), or
(K, n) for K points per lane, and `lanes` is an index tensor (n,) of the lanes that these
points belong to.

Only unfinished lanes are evaluated. On the CPU their number is known at once. On CUDA the
host would have to wait for it, so the number of one iteration earlier is used instead. It
is never too small, since finished lanes do not become unfinished again.
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
"""On CUDA, lanes are evaluated in multiples of this, so that few shapes occur."""


def constant(number: float) -> Tensor:
    """A scalar for sums, products and comparisons with lanes of any device and type.

    A Python number would be converted to a tensor each time. `torch.where` must not have it: it
    copies scalars of the CPU to a CUDA device, and waits.
    """
    return torch.tensor(number, dtype=torch.float32, device="cpu")


ZERO, ONE = constant(0.0), constant(1.0)


class RootStatus(IntEnum):
    """How the search in a lane ended."""

    CONVERGED = 0
    ITERATION_LIMIT = 1
    NO_BRACKET = 2
    NOT_FINITE = 3


class Roots(NamedTuple):
    """The result of a solver, one entry per lane, each (B,).

    Attributes:
        root: the best estimate; NaN without a bracket.
        lower: last evaluated point with the sign of f at the left end.
        upper: last evaluated point with the other sign, or with f = 0; the right end
            if there was none.
        status: a `RootStatus`.
        evaluations: function evaluations, including those of the ends.
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
    """Finds the open lanes without letting a CUDA device run idle.

    Args:
        most: how many there are at most; None for all.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.previous: tuple[Tensor, torch.cuda.Event] | None = None

    def chosen(self, open_: Tensor) -> Tensor:
        """Indices (n,) of the True entries of `open_`, (B,), and on CUDA of some others."""
        if open_.device.type == "cpu":
            return open_.nonzero().squeeze(1)
        return first_open(open_, self.count(open_))

    def count(self, open_: Tensor) -> int:
        """Upper bound on the True entries of `open_`, (B,), on CUDA; 0 if all are done."""
        earlier, stream = self.previous, torch.cuda.current_stream(open_.device)
        number = open_.sum().to("cpu", non_blocking=True)
        self.previous = (number, stream.record_event())
        if earlier is None:
            most = len(open_) if self.most is None else self.most
        else:
            # The device still has queued work of this iteration, so it stays busy meanwhile.
            earlier[1].synchronize()
            most = int(earlier[0])
        return min(-(-most // BUCKET) * BUCKET, len(open_))


def first_open(open_: Tensor, count: int) -> Tensor:
    """Indices (count,) of the True entries of `open_`, (B,), in order, and then of others."""
    return open_.byte().argsort(descending=True, stable=True)[:count]


def evaluate(function: LaneFunction, x: Tensor, open_: Tensor, lanes: Tensor) -> Tensor:
    """f at `x`, (B,) or (K, B), on the `open_` ones of the `lanes`, (n,); NaN on the others."""
    values = function(x.index_select(-1, lanes), lanes).to(x.dtype)
    found = torch.full_like(x, torch.nan).index_copy_(-1, lanes, values)
    return found.masked_fill_(~open_, torch.nan)


def evaluate_all(function: LaneFunction, x: Tensor) -> Tensor:
    """f at `x`, (B,), on all lanes."""
    return function(x, torch.arange(len(x), device=x.device)).to(x.dtype)


def at_ends(
    function: LaneFunction, lower: Tensor, upper: Tensor, values: Ends | None
) -> tuple[Tensor, Tensor]:
    """f at both ends, each (B,); evaluates only what `values` lacks."""
    f_lower, f_upper = values or (evaluate_all(function, lower), None)
    if f_upper is None:
        f_upper = evaluate_all(function, upper)
    return f_lower.to(lower.dtype), f_upper.to(lower.dtype)


def start(
    lower: Tensor, upper: Tensor, f_lower: Tensor, f_upper: Tensor
) -> tuple[Bracket, Tensor, Tensor, Tensor]:
    """The first bracket and status, and masks of roots at the lower and the upper end, all (B,).

    Status ITERATION_LIMIT marks open lanes. If both ends are roots, the lower one counts.
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
    """Bracket and status after `value` at `x` on `open_` lanes, and the valid ones; all (B,)."""
    moved = open_ & ~value.isnan()
    status = torch.where(open_ & value.isnan(), int(RootStatus.NOT_FINITE), status)
    same_side = moved & (value != 0) & (torch.signbit(value) == bracket.negative)
    lower = torch.where(same_side, x, bracket.lower)
    upper = torch.where(moved & ~same_side, x, bracket.upper)
    return Bracket(lower, upper, bracket.negative), status, moved


class Estimate(NamedTuple):
    """Roots known approximately.

    Attributes:
        x: (B,) the estimates, NaN where there is none.
        doubt: (B,) the error that each may have; what is not doubtful is not evaluated.
    """

    x: Tensor
    doubt: Tensor


class Equations(NamedTuple):
    """What a solver is called with, see `Solver.__call__`."""

    function: LaneFunction
    lower: Tensor
    upper: Tensor
    values: Ends | None
    start: Estimate | None


@dataclass(frozen=True)
class Solver:
    """A root finder: it holds its options and is called with the equations to solve.

    Attributes:
        xtol, rtol: absolute and relative tolerance of the root.
        max_iterations: iterations after evaluating both ends; the paper uses 2 and 100.
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
        start: Estimate | None = None,
    ) -> Roots:
        """Finds one root of f per lane.

        Args:
            function: f(x, lanes), see `ibpcore.roots.base`; need not be monotone.
            lower, upper: (B,) ends with opposite signs of f.
            values: f at both ends, if known; the second may be None.
            start: estimates of the roots; only `WarmStart` uses them.

        Returns:
            `Roots`. A lane with a NaN value ends as NOT_FINITE with its last valid bracket.

        Raises:
            UserError: shapes or tolerances are wrong.
        """
        _check(self, lower, upper)
        return self.solve(Equations(function, lower, upper, values, start))

    def solve(self, equations: Equations) -> Roots:
        """The solver itself; arguments are checked."""
        raise NotImplementedError


def _check(solver: Solver, lower: Tensor, upper: Tensor) -> None:
    """Raises UserError unless `lower` and `upper` are float (B,) and the tolerances valid."""
    if lower.dim() != 1 or lower.shape != upper.shape or not lower.is_floating_point():
        raise UserError(
            f"lower and upper must be floating point (B,), but are {lower.dtype}"
            f" {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    tiny = torch.finfo(lower.dtype).tiny
    if not solver.xtol >= tiny:  # below that, no bracket around 0 becomes small enough
        raise UserError(f"xtol must be at least {tiny:g} in {lower.dtype}, but is {solver.xtol:g}")
    smallest = 4 * torch.finfo(lower.dtype).eps
    if not solver.rtol >= smallest:
        raise UserError(
            f"rtol must be at least {smallest:g} in {lower.dtype}, but is {solver.rtol:g}"
        )
    if solver.max_iterations < 0:
        raise UserError(f"max_iterations must not be negative, but is {solver.max_iterations}")
