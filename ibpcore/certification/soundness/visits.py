"""The forward pass of a proof: every rule with its intervals, and what linear bounds need of it.

Numbers in parentheses are equations of docs/soundness.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.certification.soundness.arithmetic import WORKING, raised
from ibpcore.certification.soundness.rules import (
    EndpointRule,
    FactorsRule,
    ForkRule,
    NonlinearRule,
    ProductRule,
    RelaxedRule,
    Rule,
    RuleLines,
    ScaleRule,
    SumRule,
)

ROUND = 4 * WORKING.unit
"""Exceeds the relative error of two or three roundings of a number."""


class Visit(NamedTuple):
    """A rule with its input and its output, for B samples.

    Attributes:
        rule: None where the interval x was narrowed to y, which changes no number: (23).
        branches: of a `ForkRule`, the visits in each branch.
        number: of a `NonlinearRule`, counted in order of execution.
        errors: the slack for each unit of a coefficient of y, (B, ...), if there is any.
        lines: of a `RelaxedRule`, or of each factor of a `FactorsRule`; their gaps include the
            slack for the rounding of coefficients.
    """

    rule: Rule | None
    x: Interval
    y: Interval
    branches: tuple[tuple[Visit, ...], ...] = ()
    number: int | None = None
    errors: Tensor | None = None
    lines: tuple[RuleLines, ...] = ()

    @property
    def parts(self) -> list[Interval]:
        """The outputs of its branches."""
        return [branch[-1].y if branch else self.x for branch in self.branches]


Narrow: TypeAlias = Callable[
    [Sequence[Visit], Interval, Tensor, int | None], tuple[Interval, Tensor]
]
"""Narrows an interval x, (B, ...), where a mask (B, ...) is set.

It returns the interval, and the middle of what linear bounds alone make of x, by which one of two
lower lines is chosen: then a closer bound of another kind never makes a line worse.
Its other arguments are all visits on the way from the box to x, and the number of the rule that
reads x; None for a factor of a product.
"""


def run(
    rules: Sequence[Rule],
    x: Interval,
    *,
    narrow: Narrow | None = None,
    path: Sequence[Visit] = (),
    number: int = 0,
) -> tuple[Visit, ...]:
    """Runs `x` through all rules, with all that linear bounds need.

    Args:
        narrow: of the intervals that a `NonlinearRule` or a `FactorsRule` reads; None keeps them.
        path: visits on the way from the box to x.
        number: that of the first `NonlinearRule`.
    """
    passed: tuple[Visit, ...] = ()
    for rule in rules:
        mid = None
        if isinstance(rule, NonlinearRule) and narrow is not None:
            inner, mid = narrow((*path, *passed), x, rule.bends(x), number)
            passed += _met(x, inner)
            x = inner
        if isinstance(rule, ForkRule):
            visit = _forked(rule, x, narrow, (*path, *passed), number)
        else:
            own = number if isinstance(rule, NonlinearRule) else None
            visit = Visit(rule, x, rule(x), number=own)
        passed += (_with_costs(visit, mid),)
        number += count(rule)
        x = visit.y
    return passed


def output(rules: Sequence[Rule], x: Interval) -> Interval:
    """The last interval of `run`, by intervals alone: nothing else is kept or computed."""
    for rule in rules:
        if isinstance(rule, ForkRule):
            x = rule.of(*(output(branch, x) for branch in rule.branches))
        else:
            x = rule(x)
    return x


def _forked(
    rule: ForkRule, x: Interval, narrow: Narrow | None, path: tuple[Visit, ...], number: int
) -> Visit:
    branches: list[tuple[Visit, ...]] = []
    for branch in rule.branches:
        visits = run(branch, x, narrow=narrow, path=path, number=number)
        if isinstance(rule, FactorsRule) and narrow is not None:
            part = visits[-1].y if visits else x
            visits += _met(part, narrow(path + visits, part, part.rad > 0, None)[0])
        branches.append(visits)
        number += sum(map(count, branch))
    visit = Visit(rule, x, x, tuple(branches))
    return visit._replace(y=rule.of(*visit.parts))


def _met(x: Interval, inner: Interval) -> tuple[Visit, ...]:
    return () if inner is x else (Visit(None, x, inner),)


def count(rule: Rule) -> int:
    """The number of `NonlinearRule`s in a rule."""
    if isinstance(rule, ForkRule):
        return sum(count(inner) for branch in rule.branches for inner in branch)
    return int(isinstance(rule, NonlinearRule))


def _with_costs(visit: Visit, mid: Tensor | None) -> Visit:
    """With errors and lines; the middle `mid`, if not that of x, chooses between lower ones."""
    rule, x, y = visit.rule, visit.x, visit.y
    if isinstance(rule, RelaxedRule):
        slope = None if mid is None else rule.preferred(mid)
        return visit._replace(lines=(rounded(rule.lines(x, y, slope), x),))
    if isinstance(rule, FactorsRule):
        first, second = visit.parts
        pairs = zip(rule.planes(first, second, y), visit.parts, strict=True)
        return visit._replace(lines=tuple(rounded(lines, part) for lines, part in pairs))
    if isinstance(rule, SumRule):
        return visit._replace(errors=rule.errors(*visit.parts))
    if isinstance(rule, ProductRule | ScaleRule):
        return visit._replace(errors=rule.slack(x, y))
    # Of an `EndpointRule` only the ends of its output are known.
    return visit._replace(errors=y.rad) if isinstance(rule, EndpointRule) else visit


def rounded(lines: RuleLines, x: Interval) -> RuleLines:
    """Lines over x, (B, ...), whose gaps include the rounding of a coefficient times a slope."""
    slopes, rad = lines[:2], rounding(x)[:, None]
    gaps = zip(lines[2:], slopes, strict=True)
    sums = (torch.addcmul(gap, slope.abs(), rad) for gap, slope in gaps)
    return RuleLines(*slopes, *(raised(total, 4, 2) for total in sums))


def rounding(x: Interval) -> Tensor:
    """The slack, (B, ...), for rounding a coefficient of x - mid, for each of its units."""
    return raised(ROUND * x.rad, 1, 1)


def taken(value: Any, samples: Any) -> Any:
    """The tensors in intervals, lines, visits and tuples of them, of the `samples` alone."""
    if isinstance(value, Tensor):
        return value[samples]
    if isinstance(value, Interval):
        return value.apply(lambda x: x[samples])
    if isinstance(value, Visit | RuleLines):
        return type(value)(*(taken(part, samples) for part in value))
    return tuple(taken(part, samples) for part in value) if isinstance(value, tuple) else value


def flat(passed: Sequence[Visit]) -> list[Visit]:
    """All visits, those in branches before their fork."""
    return [
        inner
        for visit in passed
        for inner in (*(p for branch in visit.branches for p in flat(branch)), visit)
    ]
