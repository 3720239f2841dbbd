"""Linear bounds with every rounding error, propagated back from any layer to the box of inputs.

Numbers in parentheses are equations of docs/soundness.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.certification.soundness.arithmetic import WORKING, above, gamma, raised
from ibpcore.certification.soundness.rules import (
    EndpointRule,
    FactorsRule,
    ForkRule,
    RelaxedRule,
    RuleLines,
    SumRule,
)
from ibpcore.certification.soundness.visits import ROUND, Visit, rounded, rounding

FLUSHED = 2.0**-960
"""Exceeds the errors of underflow in a coefficient, a sum of up to 2^60 products."""
Slopes: TypeAlias = Mapping[int, Tensor]
"""Slopes of the lower lines of `NonlinearRule`s, by number, for R rows: (B, 1 or R, ...)."""
NO_SLOPES: Slopes = {}
"""Every rule takes its own."""


def of_samples(slopes: Slopes, samples: Any) -> Slopes:
    """The slopes of the `samples` alone."""
    return {number: slope[samples] for number, slope in slopes.items()}


class SoundBounds(NamedTuple):
    """f <= value + slack + row . (x - mid) for all x that a rule may receive: (12).

    Attributes:
        rows: (B, R, ...), for R functions f of each of B samples.
        value: (B, R), computed at the midpoints.
        slack: (B, R), not negative.
    """

    rows: Tensor
    value: Tensor
    slack: Tensor


def largest(bounds: SoundBounds, box: Interval) -> Tensor:
    """The maximum of `bounds` over `box`, (B, R): (18)."""
    return total(bounds.value, bounds.slack + dot(bounds.rows.abs(), box.rad[:, None]))


def total(value: Tensor, slack: Tensor) -> Tensor:
    """Upper bound on value + slack, for a computed difference `value` and a sum `slack`."""
    return above(value + raised(slack + ROUND * value.abs(), 4))


def back(passed: Sequence[Visit], bounds: SoundBounds, slopes: Slopes = NO_SLOPES) -> SoundBounds:
    """Propagates bounds from the output of the last rule to the input of the first."""
    for visit in reversed(passed):
        bounds = _through(visit, bounds, slopes)
        bounds = bounds._replace(slack=raised(bounds.slack + _flushed(visit.x), 4))
    return bounds


def _through(visit: Visit, bounds: SoundBounds, slopes: Slopes) -> SoundBounds:
    rule, x = visit.rule, visit.x
    if rule is None:
        return _recentred(bounds, x.mid - visit.y.mid)
    if isinstance(rule, RelaxedRule):
        return _along(_lines(visit, rule, slopes), bounds)
    rows, slack = bounds.rows, bounds.slack
    if visit.errors is not None:
        slack = slack + dot(rows.abs(), visit.errors[:, None])
    if isinstance(rule, ForkRule):
        return _forked(visit, rule, bounds._replace(slack=slack), slopes)
    if isinstance(rule, EndpointRule):
        return bounds._replace(rows=rows.new_zeros(*slack.shape, *x.shape[1:]), slack=slack)
    rows = rule.back(rows.flatten(0, 1), x).unflatten(0, slack.shape)
    return bounds._replace(rows=rows, slack=slack)


def _recentred(bounds: SoundBounds, shift: Tensor) -> SoundBounds:
    """Bounds relative to other midpoints, which exceed those of `bounds` by `shift`: (24)."""
    rows, terms = bounds.rows, shift[0].numel()
    value = bounds.value + _products(rows, shift[:, None])
    each = raised(gamma(terms + 4, WORKING.unit) * shift.abs(), 1, 1)
    lost = dot(rows.abs(), each[:, None])
    lost = lost + ROUND * value.abs() + 2 * terms * WORKING.tiny
    return SoundBounds(rows, value, raised(bounds.slack + lost, 6))


def _lines(visit: Visit, rule: RelaxedRule, slopes: Slopes) -> RuleLines:
    """The lines of a visit, with its slope among `slopes` if there is one."""
    slope = None if visit.number is None else slopes.get(visit.number)
    if slope is None:
        return visit.lines[0]
    # Neither infinity nor NaN may become a slope that proves something.
    slope = slope.to(visit.x.mid) + 0 * slope.to(visit.x.mid)
    return rounded(rule.lines(visit.x, visit.y, slope), visit.x)


def _along(lines: RuleLines, bounds: SoundBounds) -> SoundBounds:
    """Uses the upper line where a coefficient is positive, else the lower one."""
    rising = bounds.rows.clamp(min=0)
    falling = rising - bounds.rows
    slack = bounds.slack + dot(rising, lines.upper_gap) + dot(falling, lines.lower_gap)
    # One of both terms is 0, so that each number is rounded once.
    rows = rising.mul_(lines.upper_slope).addcmul_(falling, lines.lower_slope, value=-1)
    return bounds._replace(rows=rows, slack=slack)


def _forked(visit: Visit, rule: ForkRule, bounds: SoundBounds, slopes: Slopes) -> SoundBounds:
    """Propagates through all branches, the last one first, each with the rows for its part."""
    rows, value, slack = bounds
    if isinstance(rule, SumRule):
        shares = [rows, rows]
    elif isinstance(rule, FactorsRule):
        shares = []
        for lines, part in zip(visit.lines, visit.parts, strict=True):
            along = _along(lines, SoundBounds(rows, value, slack))
            slack, shares = raised(along.slack + _flushed(part), 6), [*shares, along.rows]
    else:
        sizes = [part.shape[rule.dim] for part in visit.parts]
        shares = list(rows.split(sizes, rule.dim + 1))
    joined = back(visit.branches[-1], SoundBounds(shares[-1], value, slack), slopes)
    for branch, share in zip(visit.branches[-2::-1], shares[-2::-1], strict=True):
        more = back(branch, SoundBounds(share, joined.value, joined.slack), slopes)
        rows = more.rows + joined.rows
        slack = more.slack + dot(rows.abs(), rounding(visit.x)[:, None])
        joined = SoundBounds(rows, more.value, raised(slack, 4))
    return joined


def _flushed(x: Interval) -> Tensor:
    """The slack, (B, 1), for coefficients of x - mid that underflow."""
    return FLUSHED * x.rad.flatten(1).sum(1, keepdim=True)


def dot(rows: Tensor, x: Tensor) -> Tensor:
    """Upper bounds, (B, R), on products of (B, R, ...) and (B, 1 or R, ...), neither negative."""
    return raised(_products(rows, x), x[0, 0].numel() + 4, x[0, 0].numel())


def _products(rows: Tensor, x: Tensor) -> Tensor:
    """Products, (B, R), of (B, R, ...) and (B, 1 or R, ...), by sums in any order."""
    rows, x = rows.flatten(2), x.flatten(2)
    if x.shape[1] == 1:
        return torch.bmm(rows, x.mT).squeeze(2)
    return (rows[:, :, None] @ x[..., None])[..., 0, 0]
