"""No cold start: a guess for each lane, corrected by as few evaluations as are granted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.roots.base import (
    Ends,
    LaneFunction,
    Roots,
    RootStatus,
    Watch,
    check,
    evaluate,
    evaluate_all,
)
from ibpcore.roots.brent import search

BEYOND = 1.2
"""Where a guess fell short, the other end is sought this much farther than its secant's root."""


def tracked(
    function: LaneFunction,
    lower: Tensor,
    upper: Tensor,
    *,
    values: Ends | None = None,
    guess: Tensor | None = None,
    xtol: float = 1e-6,
    rtol: float = 1e-4,
    max_iterations: int = 100,
) -> Roots:
    """Brackets the root around a guess, then goes on like `brentq`.

    The first evaluation is at the guess, the best root known after it that of the secant
    from the lower end. A guess that fell short takes one or two evaluations more to find
    the other end. `upper` itself is evaluated only where it is needed, from the second
    iteration on: with `max_iterations` 1 a lane with a guess at or beyond it is taken at
    its word, with 0 every lane is.

    Args:
        guess: (B,), NaN for `upper`; without any this is `brentq`.
        values: f at both ends, when known; the second NaN or None where it is not.
        function, lower, upper, xtol, rtol, max_iterations: see `brentq`.

    Returns:
        `Roots`. Where the iterations did not suffice, `root` is interpolated, and `upper`
        may be the end that was given, at which nothing was evaluated.
    """
    if guess is None:
        return search(function, lower, upper, values, xtol, rtol, max_iterations)[0]
    check(lower, upper, xtol, rtol, max_iterations)
    f_lower = evaluate_all(function, lower) if values is None else values[0].to(lower.dtype)
    way = torch.sign(upper - lower)
    root = torch.where(((guess - upper) * way < 0) & ((guess - lower) * way > 0), guess, upper)
    f_upper = torch.full_like(f_lower, torch.nan)
    if values is not None and values[1] is not None:
        f_upper = values[1].to(lower.dtype)
    found = _Found(lower, f_lower, upper, f_upper)
    evaluations = torch.ones_like(lower, dtype=torch.int64)

    for attempt in range(0 if max_iterations == 0 else 1 if max_iterations == 1 else 3):
        open_ = ~found.f_left.isnan() & (f_lower != 0)
        if attempt == 0:
            x, open_ = root, open_ & (root != upper)
            open_ = open_ & (f_upper.isnan() | _opposite(f_lower, f_upper))
        else:
            open_ = open_ & found.f_right.isnan() & (found.left != upper)
        if attempt == 1:
            x = lower + BEYOND * (root - lower)
            x = torch.where((x - upper) * way < 0, x, upper)
        elif attempt == 2:
            x = upper
        # A watch of its own each time: here lanes may open after others were finished.
        count = Watch().count(open_)
        if count == 0:
            continue
        found = found.joined(x, evaluate(function, x, open_, count), open_)
        evaluations = evaluations + open_
        root = torch.where(open_, found.secant(lower, f_lower, upper), root)

    bracketed = ~found.f_right.isnan() & ~found.f_left.isnan()
    ends = found.f_left, torch.where(bracketed, found.f_right, found.f_left)
    roots, following = search(
        function, found.left, found.right, ends, xtol, rtol, max(max_iterations - 1, 0)
    )
    status = torch.full_like(roots.status, RootStatus.ITERATION_LIMIT)
    status.masked_fill_(found.left == upper, RootStatus.NO_BRACKET)
    status = torch.where(bracketed | (f_lower == 0), roots.status, status)
    status.masked_fill_(found.f_left.isnan(), RootStatus.NOT_FINITE)
    going_on = bracketed & (status == RootStatus.ITERATION_LIMIT)
    # Brent's next point may overstep a bracket that is as good as closed.
    low, high = torch.minimum(roots.lower, roots.upper), torch.maximum(roots.lower, roots.upper)
    root = torch.where(going_on, torch.minimum(torch.maximum(following, low), high), root)
    settled = (status == RootStatus.CONVERGED) | (status == RootStatus.NO_BRACKET)
    return Roots(
        torch.where(settled, roots.root, root),
        torch.where(bracketed, roots.lower, found.left),
        torch.where(bracketed | (f_lower == 0), roots.upper, upper),
        status,
        evaluations + roots.evaluations - 2,
    )


def _opposite(f: Tensor, g: Tensor) -> Tensor:
    """Where `g` has not the sign of `f`."""
    return (torch.signbit(f) != torch.signbit(g)) | (g == 0)


class _Found(NamedTuple):
    """What was evaluated nearest to the root, each (B,); a value is NaN where nothing was.

    A NaN among the values of f makes `f_left` NaN.
    """

    left: Tensor
    f_left: Tensor
    right: Tensor
    f_right: Tensor

    def joined(self, x: Tensor, f: Tensor, open_: Tensor) -> _Found:
        bad = open_ & f.isnan()
        other = open_ & ~bad & _opposite(self.f_left, f)
        same = open_ & ~bad & ~other
        return _Found(
            torch.where(same, x, self.left),
            torch.where(same, f, torch.where(bad, torch.nan, self.f_left)),
            torch.where(other, x, self.right),
            torch.where(other, f, self.f_right),
        )

    def secant(self, lower: Tensor, f_lower: Tensor, upper: Tensor) -> Tensor:
        """Root by the chord, or beyond the left end by the line from the lower end."""
        closed = ~self.f_right.isnan()
        x, f = torch.where(closed, self.right, lower), torch.where(closed, self.f_right, f_lower)
        root = self.left - self.f_left * (x - self.left) / (f - self.f_left)
        way = torch.sign(upper - lower)
        # A line that leads away from 0 says nothing, nor does one from an infinite value.
        good = ((root - self.left) * way >= 0) & ((root - upper) * way < 0)
        return torch.where(good, root, torch.where(closed, self.left, upper))
