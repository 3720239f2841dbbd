"""Plain bisection: slow, and hard to get wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.roots.base import (
    Ends,
    LaneFunction,
    Roots,
    RootStatus,
    Watch,
    at_ends,
    check,
    evaluate,
    narrowed,
    start,
)


def bisect(
    function: LaneFunction,
    lower: Tensor,
    upper: Tensor,
    *,
    values: Ends | None = None,
    xtol: float = 1e-6,
    rtol: float = 1e-4,
    max_iterations: int = 100,
) -> Roots:
    """Plain bisection with the interface and the stopping rule of `brentq`.

    A point with f = 0 counts as the right end, so for a non-decreasing function the
    bracket closes around the leftmost root. `root` is the middle of the bracket.
    """
    check(lower, upper, xtol, rtol, max_iterations)
    f_lower, f_upper = at_ends(function, lower, upper, values)
    bracket, status, at_lower, _ = start(lower, upper, f_lower, f_upper)
    status = torch.where(at_lower, int(RootStatus.CONVERGED), status)
    evaluations = torch.full_like(status, 2)
    watch = Watch()

    for iteration in range(max_iterations + 1):
        middle = (bracket.lower + bracket.upper) / 2
        small = (bracket.upper - bracket.lower).abs() < xtol + rtol * middle.abs()
        open_ = status == RootStatus.ITERATION_LIMIT
        status = torch.where(open_ & small, int(RootStatus.CONVERGED), status)
        open_ = open_ & ~small
        count = 0 if iteration == max_iterations else watch.count(open_)
        if count == 0:
            break
        value = evaluate(function, middle, open_, count)
        evaluations = evaluations + open_
        bracket, status, _ = narrowed(bracket, status, middle, value, open_)

    root = torch.where(status == RootStatus.NO_BRACKET, torch.nan, middle)
    return Roots(root, bracket.lower, bracket.upper, status, evaluations)
