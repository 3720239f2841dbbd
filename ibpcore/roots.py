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
    if lower.dim() != 1 or lower.shape != upper.shape or not lower.is_floating_point():
        raise UserError(
            f"lower and upper must be floating point (B,), but have shapes"
            f" {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    if values is None:
        values = function(lower, slice(None)), function(upper, slice(None))
    f_lower, f_upper = values[0].to(lower.dtype), values[1].to(lower.dtype)
    status = torch.full_like(lower, RootStatus.ITERATION_LIMIT, dtype=torch.int64)
    same = (torch.signbit(f_lower) == torch.signbit(f_upper)) & (f_lower != 0) & (f_upper != 0)
    status.masked_fill_(same, RootStatus.NO_BRACKET)
    status.masked_fill_(f_lower.isnan() | f_upper.isnan(), RootStatus.NOT_FINITE)
    return f_lower, f_upper, status


def _check_tolerances(xtol: float, rtol: float, max_iterations: int, dtype: torch.dtype) -> None:
    if not xtol > 0:
        raise UserError(f"xtol must be above 0, but is {xtol:g}")
    smallest = 4 * torch.finfo(dtype).eps
    if not rtol >= smallest:
        raise UserError(f"rtol must be at least {smallest:g} in {dtype}, but is {rtol:g}")
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
    _check_tolerances(xtol, rtol, max_iterations, lower.dtype)
    f_pre, f_cur, status = _ends(function, lower, upper, values)
    sign = torch.signbit(f_pre)
    x_pre, x_cur = lower, upper
    x_blk, f_blk = torch.zeros_like(lower), torch.zeros_like(lower)
    s_pre, s_cur = torch.zeros_like(lower), torch.zeros_like(lower)
    evaluations = torch.full_like(status, 2)

    # A root at an end is found before the first step.
    at_lower, at_upper = f_pre == 0, (f_cur == 0) & (f_pre != 0)
    status = torch.where(at_lower | at_upper, int(RootStatus.CONVERGED), status)
    x_cur = torch.where(at_lower, lower, x_cur)
    left, right = lower, torch.where(at_lower, lower, upper)
    watch = _Watch()

    for _ in range(max_iterations):
        open_ = status == RootStatus.ITERATION_LIMIT
        # Re-bracket: the contrapoint is the last point of the other sign.
        crossed = open_ & (f_pre != 0) & (torch.signbit(f_pre) != torch.signbit(f_cur))
        x_blk, f_blk = torch.where(crossed, x_pre, x_blk), torch.where(crossed, f_pre, f_blk)
        s_pre = torch.where(crossed, x_cur - x_pre, s_pre)
        s_cur = torch.where(crossed, x_cur - x_pre, s_cur)
        # Keep the better of the two ends as the current one.
        swap = open_ & (f_blk.abs() < f_cur.abs())
        x_pre, x_cur, x_blk = (
            torch.where(swap, x_cur, x_pre),
            torch.where(swap, x_blk, x_cur),
            torch.where(swap, x_cur, x_blk),
        )
        f_pre, f_cur, f_blk = (
            torch.where(swap, f_cur, f_pre),
            torch.where(swap, f_blk, f_cur),
            torch.where(swap, f_cur, f_blk),
        )
        delta = (xtol + rtol * x_cur.abs()) / 2
        s_bis = (x_blk - x_cur) / 2
        converged = open_ & ((f_cur == 0) | (s_bis.abs() < delta))
        status = torch.where(converged, int(RootStatus.CONVERGED), status)
        open_ = status == RootStatus.ITERATION_LIMIT
        if watch.done(~open_):
            break

        step = _interpolate(x_pre, x_cur, x_blk, f_pre, f_cur, f_blk)
        limit = torch.minimum(s_pre.abs(), 3 * s_bis.abs() - delta)
        short = 2 * step.abs() < limit  # False for NaN: then bisect
        good = (s_pre.abs() > delta) & (f_cur.abs() < f_pre.abs()) & short
        s_pre, s_cur = torch.where(good, s_cur, s_bis), torch.where(good, step, s_bis)

        least = torch.where(s_bis > 0, delta, -delta)
        x_new = x_cur + torch.where(s_cur.abs() > delta, s_cur, least)
        x_new = torch.where(open_, x_new, x_cur)
        f_new = _evaluate(function, x_new, ~open_)
        evaluations = evaluations + open_
        failed = open_ & f_new.isnan()
        status = torch.where(failed, int(RootStatus.NOT_FINITE), status)
        moved = open_ & ~failed
        same_side = moved & (f_new != 0) & (torch.signbit(f_new) == sign)
        left = torch.where(same_side, x_new, left)
        right = torch.where(moved & ~same_side, x_new, right)
        x_pre, f_pre = torch.where(moved, x_cur, x_pre), torch.where(moved, f_cur, f_pre)
        x_cur, f_cur = torch.where(moved, x_new, x_cur), torch.where(moved, f_new, f_cur)

    root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, x_cur)
    return Roots(root, left, right, status, evaluations)


def _interpolate(
    x_pre: Tensor, x_cur: Tensor, x_blk: Tensor, f_pre: Tensor, f_cur: Tensor, f_blk: Tensor
) -> Tensor:
    """The secant step where there are two points, the inverse quadratic one else."""
    secant = -f_cur * (x_cur - x_pre) / (f_cur - f_pre)
    d_pre = (f_pre - f_cur) / (x_pre - x_cur)
    d_blk = (f_blk - f_cur) / (x_blk - x_cur)
    quadratic = -f_cur * (f_blk * d_blk - f_pre * d_pre) / (d_blk * d_pre * (f_blk - f_pre))
    return torch.where(x_pre == x_blk, secant, quadratic)


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
    _check_tolerances(xtol, rtol, max_iterations, lower.dtype)
    f_lower, _, status = _ends(function, lower, upper, values)
    sign = torch.signbit(f_lower)
    at_lower = f_lower == 0
    status = torch.where(at_lower, int(RootStatus.CONVERGED), status)
    left, right = lower, torch.where(at_lower, lower, upper)
    evaluations = torch.full_like(status, 2)
    watch = _Watch()

    for _ in range(max_iterations):
        middle = (left + right) / 2
        small = (right - left).abs() < xtol + rtol * middle.abs()
        open_ = (status == RootStatus.ITERATION_LIMIT) & ~small
        if watch.done(~open_):
            break
        value = _evaluate(function, middle, ~open_)
        evaluations = evaluations + open_
        failed = open_ & value.isnan()
        status = torch.where(failed, int(RootStatus.NOT_FINITE), status)
        moved = open_ & ~failed
        same_side = moved & (value != 0) & (torch.signbit(value) == sign)
        left = torch.where(same_side, middle, left)
        right = torch.where(moved & ~same_side, middle, right)

    middle = (left + right) / 2
    small = (right - left).abs() < xtol + rtol * middle.abs()
    converged = (status == RootStatus.ITERATION_LIMIT) & small
    status = torch.where(converged, int(RootStatus.CONVERGED), status)
    root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, middle)
    return Roots(root, left, right, status, evaluations)


SOLVERS: dict[str, Callable[..., Roots]] = {"brentq": brentq, "bisect": bisect}
