"""Brent's method, the reference solver: each lane takes the same steps as SciPy's `brentq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.roots import base
from ibpcore.roots.base import Equations, OpenLanes, Roots, RootStatus, Solver


@dataclass(frozen=True)
class Brent(Solver):
    """Brent's method (Brent 1973) with the steps of `scipy.optimize.brentq` in each lane.

    The default for certificates, since it needs few evaluations per lane.
    A lane has converged when half its bracket is below (xtol + rtol |x|) / 2, or f = 0.
    """

    def solve(self, equations: Equations) -> Roots:
        function, lower, upper, values, _ = equations
        f_lower, f_upper = base.at_ends(function, lower, upper, values)
        bracket, status, at_lower, at_upper = base.start(lower, upper, f_lower, f_upper)
        # A root at an end needs no step; if both ends are roots, the left one counts.
        status = torch.where(at_lower | at_upper, int(RootStatus.CONVERGED), status)
        zero = torch.zeros_like(lower)
        at = _State(lower, bracket.upper, zero, f_lower, f_upper, zero, zero, zero)
        evaluations = torch.full_like(status, 2)
        open_lanes = OpenLanes()

        for _ in range(self.max_iterations):
            at = _ordered(at, status == RootStatus.ITERATION_LIMIT)
            x, s_pre, s_cur, converged = _next(at, self.xtol, self.rtol)
            open_ = status == RootStatus.ITERATION_LIMIT
            status = torch.where(open_ & converged, int(RootStatus.CONVERGED), status)
            open_ = open_ & ~converged
            lanes = open_lanes.chosen(open_)
            if len(lanes) == 0:
                break
            x = torch.where(open_, x, at.x_cur)
            value = base.evaluate(function, x, open_, lanes)
            evaluations = evaluations + open_
            bracket, status, moved = base.narrowed(bracket, status, x, value, open_)
            after = _State(at.x_cur, x, at.x_blk, at.f_cur, value, at.f_blk, s_pre, s_cur)
            at = _chosen(moved, after, at)

        root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, at.x_cur)
        return Roots(root, bracket.lower, bracket.upper, status, evaluations)


class _State(NamedTuple):
    """The state of all lanes, each (B,), with SciPy's names.

    Points `x`, values `f` and the last two steps `s`; `pre` is the previous point, `cur`
    the current one, `blk` the contrapoint, where f has the other sign.
    """

    x_pre: Tensor
    x_cur: Tensor
    x_blk: Tensor
    f_pre: Tensor
    f_cur: Tensor
    f_blk: Tensor
    s_pre: Tensor
    s_cur: Tensor


def _chosen(mask: Tensor, new: _State, old: _State) -> _State:
    return _State(*(torch.where(mask, a, b) for a, b in zip(new, old, strict=True)))


def _ordered(at: _State, open_: Tensor) -> _State:
    """Sets a contrapoint of the other sign, and makes the better of the two ends current."""
    crossed = open_ & (at.f_pre != 0) & (torch.signbit(at.f_pre) != torch.signbit(at.f_cur))
    width = at.x_cur - at.x_pre
    at = _chosen(crossed, at._replace(x_blk=at.x_pre, f_blk=at.f_pre, s_pre=width, s_cur=width), at)
    x, f = (at.x_cur, at.x_blk, at.x_cur), (at.f_cur, at.f_blk, at.f_cur)
    swapped = _State(*x, *f, at.s_pre, at.s_cur)
    return _chosen(open_ & (at.f_blk.abs() < at.f_cur.abs()), swapped, at)


def _next(at: _State, xtol: float, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next point to evaluate, the last two steps including it, and the converged lanes."""
    delta = (xtol + rtol * at.x_cur.abs()) / 2
    s_bis = (at.x_blk - at.x_cur) / 2
    s_pre, s_cur = _steps(at, s_bis, delta)
    least = torch.where(s_bis > 0, delta, -delta)
    x = at.x_cur + torch.where(s_cur.abs() > delta, s_cur, least)
    return x, s_pre, s_cur, (at.f_cur == 0) | (s_bis.abs() < delta)


def _steps(at: _State, s_bis: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The previous step and the next one: interpolation if it is short, else bisection."""
    secant = -at.f_cur * (at.x_cur - at.x_pre) / (at.f_cur - at.f_pre)
    d_pre = (at.f_pre - at.f_cur) / (at.x_pre - at.x_cur)
    d_blk = (at.f_blk - at.f_cur) / (at.x_blk - at.x_cur)
    quadratic = -at.f_cur * (at.f_blk * d_blk - at.f_pre * d_pre)
    quadratic = quadratic / (d_blk * d_pre * (at.f_blk - at.f_pre))
    step = torch.where(at.x_pre == at.x_blk, secant, quadratic)
    # False for NaN, which infinite values cause: then bisect.
    short = 2 * step.abs() < torch.minimum(at.s_pre.abs(), 3 * s_bis.abs() - delta)
    good = (at.s_pre.abs() > delta) & (at.f_cur.abs() < at.f_pre.abs()) & short
    return torch.where(good, at.s_cur, s_bis), torch.where(good, step, s_bis)
