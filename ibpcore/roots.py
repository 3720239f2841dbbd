"""Batched bracketing root finders. They know no network: only a function of lanes.

A *lane* is one scalar equation f(x) = 0. All lanes advance together; finished ones are
frozen by one mask. The function is called as `function(x, lanes)`, where `x` is (n,)
and `lanes` says which lanes these points belong to: an index tensor (n,), or
`slice(None)` for all of them.

On the CPU only unfinished lanes are evaluated. On CUDA choosing them would make the
host wait for the device, so all lanes are evaluated, the finished ones at their frozen
point, and the host looks only at how things stood one iteration ago.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.errors import UserError

Lanes = Tensor | slice
LaneFunction = Callable[[Tensor, Lanes], Tensor]


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
        upper: last evaluated point with the other sign, or with f = 0.
        status: a `RootStatus`.
        evaluations: function evaluations, the two ends included.
    """

    root: Tensor
    lower: Tensor
    upper: Tensor
    status: Tensor
    evaluations: Tensor


class _Watch:
    """Tells when every lane is finished without making the host wait on CUDA."""

    def __init__(self) -> None:
        self.previous: tuple[Tensor, torch.cuda.Event] | None = None

    def done(self, finished: Tensor) -> bool:
        if not finished.is_cuda:
            return bool(finished.all())
        earlier, stream = self.previous, torch.cuda.current_stream(finished.device)
        flag = finished.all().to("cpu", non_blocking=True)
        self.previous = (flag, stream.record_event())
        if earlier is None:
            return False
        # The device still has the work queued since then, so this wait costs it nothing.
        earlier[1].synchronize()
        return bool(earlier[0])


def _evaluate(function: LaneFunction, x: Tensor, finished: Tensor) -> Tensor:
    """(B,) values at `x`; on finished lanes they are of no use."""
    if x.is_cuda:
        return function(x, slice(None))
    lanes = (~finished).nonzero().squeeze(1)
    return torch.zeros_like(x).index_copy(0, lanes, function(x[lanes], lanes).to(x.dtype))


def _ends(
    function: LaneFunction, lower: Tensor, upper: Tensor, values: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """f at both ends, and the status: ITERATION_LIMIT (still open) or why not."""
    if values is None:
        values = function(lower, slice(None)), function(upper, slice(None))
    f_lower, f_upper = values[0].to(lower.dtype), values[1].to(lower.dtype)
    status = torch.full_like(lower, RootStatus.ITERATION_LIMIT, dtype=torch.int64)
    same = (torch.signbit(f_lower) == torch.signbit(f_upper)) & (f_lower != 0) & (f_upper != 0)
    status.masked_fill_(same, RootStatus.NO_BRACKET)
    status.masked_fill_(f_lower.isnan() | f_upper.isnan(), RootStatus.NOT_FINITE)
    return f_lower, f_upper, status


def _check(lower: Tensor, upper: Tensor, xtol: float, rtol: float, max_iterations: int) -> None:
    if lower.dim() != 1 or lower.shape != upper.shape or not lower.is_floating_point():
        raise UserError(
            f"lower and upper must be floating point (B,), but are {lower.dtype}"
            f" {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    if not xtol > 0:
        raise UserError(f"xtol must be above 0, but is {xtol:g}")
    smallest = 4 * torch.finfo(lower.dtype).eps
    if not rtol >= smallest:
        raise UserError(f"rtol must be at least {smallest:g} in {lower.dtype}, but is {rtol:g}")
    if max_iterations < 0:
        raise UserError(f"max_iterations must not be negative, but is {max_iterations}")


def brentq(
    function: LaneFunction,
    lower: Tensor,
    upper: Tensor,
    *,
    values: tuple[Tensor, Tensor] | None = None,
    xtol: float = 1e-6,
    rtol: float = 1e-4,
    max_iterations: int = 100,
) -> Roots:
    """Brent's method (Brent 1973), in each lane the steps of `scipy.optimize.brentq`.

    A lane is converged when half its bracket is below (xtol + rtol |x|) / 2, or f = 0.

    Args:
        function: f(x, lanes), see above; need not be monotone.
        lower, upper: (B,) ends with opposite signs of f.
        values: f at both ends, when known.
        xtol, rtol: absolute and relative tolerance of the root.
        max_iterations: evaluations after the two ends; 2 and 100 are the paper's.

    Returns:
        `Roots`. A lane with a NaN value ends as NOT_FINITE with its last good bracket.

    Raises:
        UserError: shapes or tolerances are wrong.
    """
    _check(lower, upper, xtol, rtol, max_iterations)
    f_lower, f_upper, status = _ends(function, lower, upper, values)
    zero = torch.zeros_like(lower)
    # A root at an end is found before the first step; of two, the left one.
    at_lower, at_upper = f_lower == 0, f_upper == 0
    at = _Brent(
        x_pre=lower,
        x_cur=torch.where(at_lower, lower, upper),
        x_blk=zero,
        f_pre=f_lower,
        f_cur=f_upper,
        f_blk=zero,
        s_pre=zero,
        s_cur=zero,
    )
    found = (at_lower | at_upper) & (status != RootStatus.NOT_FINITE)
    status = torch.where(found, int(RootStatus.CONVERGED), status)
    bracket = _Bracket(lower, torch.where(at_lower, lower, upper), torch.signbit(f_lower))
    evaluations = torch.full_like(status, 2)
    watch = _Watch()

    for _ in range(max_iterations):
        open_ = status == RootStatus.ITERATION_LIMIT
        at = _ordered(at, open_)
        delta = (xtol + rtol * at.x_cur.abs()) / 2
        s_bis = (at.x_blk - at.x_cur) / 2
        converged = open_ & ((at.f_cur == 0) | (s_bis.abs() < delta))
        status = torch.where(converged, int(RootStatus.CONVERGED), status)
        open_ = open_ & ~converged
        if watch.done(~open_):
            break
        s_pre, s_cur = _steps(at, s_bis, delta)
        least = torch.where(s_bis > 0, delta, -delta)
        x = torch.where(open_, at.x_cur + torch.where(s_cur.abs() > delta, s_cur, least), at.x_cur)
        value = _evaluate(function, x, ~open_)
        evaluations = evaluations + open_
        bracket, status, moved = _narrowed(bracket, status, x, value, open_)
        after = _Brent(at.x_cur, x, at.x_blk, at.f_cur, value, at.f_blk, s_pre, s_cur)
        at = _chosen(moved, after, at)

    root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, at.x_cur)
    return Roots(root, bracket.lower, bracket.upper, status, evaluations)


class _Brent(NamedTuple):
    """Where a lane of `brentq` stands, each (B,), in SciPy's names.

    Points, their values and the last two steps; `pre` the point before, `cur` the current
    one, `blk` the contrapoint, with the other sign.
    """

    x_pre: Tensor
    x_cur: Tensor
    x_blk: Tensor
    f_pre: Tensor
    f_cur: Tensor
    f_blk: Tensor
    s_pre: Tensor
    s_cur: Tensor


def _chosen(mask: Tensor, new: _Brent, old: _Brent) -> _Brent:
    return _Brent(*(torch.where(mask, a, b) for a, b in zip(new, old, strict=True)))


def _ordered(at: _Brent, open_: Tensor) -> _Brent:
    """A contrapoint of the other sign, and the better of the two ends as the current."""
    crossed = open_ & (at.f_pre != 0) & (torch.signbit(at.f_pre) != torch.signbit(at.f_cur))
    width = at.x_cur - at.x_pre
    at = _chosen(crossed, at._replace(x_blk=at.x_pre, f_blk=at.f_pre, s_pre=width, s_cur=width), at)
    swapped = at._replace(
        x_pre=at.x_cur,
        x_cur=at.x_blk,
        x_blk=at.x_cur,
        f_pre=at.f_cur,
        f_cur=at.f_blk,
        f_blk=at.f_cur,
    )
    return _chosen(open_ & (at.f_blk.abs() < at.f_cur.abs()), swapped, at)


def _steps(at: _Brent, s_bis: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The step before and the step to take: interpolation if it is short, else bisection."""
    secant = -at.f_cur * (at.x_cur - at.x_pre) / (at.f_cur - at.f_pre)
    d_pre = (at.f_pre - at.f_cur) / (at.x_pre - at.x_cur)
    d_blk = (at.f_blk - at.f_cur) / (at.x_blk - at.x_cur)
    quadratic = -at.f_cur * (at.f_blk * d_blk - at.f_pre * d_pre)
    quadratic = quadratic / (d_blk * d_pre * (at.f_blk - at.f_pre))
    step = torch.where(at.x_pre == at.x_blk, secant, quadratic)
    # False for NaN, as where a value is infinite: then bisect.
    short = 2 * step.abs() < torch.minimum(at.s_pre.abs(), 3 * s_bis.abs() - delta)
    good = (at.s_pre.abs() > delta) & (at.f_cur.abs() < at.f_pre.abs()) & short
    return torch.where(good, at.s_cur, s_bis), torch.where(good, step, s_bis)


class _Bracket(NamedTuple):
    """Ends of the bracket, and whether f is negative at the lower one, each (B,)."""

    lower: Tensor
    upper: Tensor
    negative: Tensor


def _narrowed(
    bracket: _Bracket, status: Tensor, x: Tensor, value: Tensor, open_: Tensor
) -> tuple[_Bracket, Tensor, Tensor]:
    """Bracket and status with `x` evaluated on `open_` lanes, and the lanes where it counts."""
    moved = open_ & ~value.isnan()
    status = torch.where(open_ & value.isnan(), int(RootStatus.NOT_FINITE), status)
    same_side = moved & (value != 0) & (torch.signbit(value) == bracket.negative)
    lower = torch.where(same_side, x, bracket.lower)
    upper = torch.where(moved & ~same_side, x, bracket.upper)
    return _Bracket(lower, upper, bracket.negative), status, moved


def bisect(
    function: LaneFunction,
    lower: Tensor,
    upper: Tensor,
    *,
    values: tuple[Tensor, Tensor] | None = None,
    xtol: float = 1e-6,
    rtol: float = 1e-4,
    max_iterations: int = 100,
) -> Roots:
    """Plain bisection with the interface and the stopping rule of `brentq`.

    A point with f = 0 counts as the right end, so for a non-decreasing function the
    bracket closes around the leftmost root. `root` is the middle of the bracket.
    """
    _check(lower, upper, xtol, rtol, max_iterations)
    f_lower, _, status = _ends(function, lower, upper, values)
    at_lower = f_lower == 0
    found = at_lower & (status != RootStatus.NOT_FINITE)
    status = torch.where(found, int(RootStatus.CONVERGED), status)
    bracket = _Bracket(lower, torch.where(at_lower, lower, upper), torch.signbit(f_lower))
    evaluations = torch.full_like(status, 2)
    watch = _Watch()

    for iteration in range(max_iterations + 1):
        middle = (bracket.lower + bracket.upper) / 2
        small = (bracket.upper - bracket.lower).abs() < xtol + rtol * middle.abs()
        open_ = status == RootStatus.ITERATION_LIMIT
        status = torch.where(open_ & small, int(RootStatus.CONVERGED), status)
        open_ = open_ & ~small
        if iteration == max_iterations or watch.done(~open_):
            break
        value = _evaluate(function, middle, ~open_)
        evaluations = evaluations + open_
        bracket, status, _ = _narrowed(bracket, status, middle, value, open_)

    root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, middle)
    return Roots(root, bracket.lower, bracket.upper, status, evaluations)


SOLVERS: dict[str, Callable[..., Roots]] = {"brentq": brentq, "bisect": bisect}
