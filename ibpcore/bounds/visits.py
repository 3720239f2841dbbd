"""The forward pass that linear bounds need: every operator with its intervals and its lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple, TypeAlias

import torch

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import Fork, Nonlinear, Observer, Operator, Product, Simple
from ibpcore.bounds.relaxations import Lines, product


class Visit(NamedTuple):
    """An operator with its input and output intervals, as a backward pass needs them.

    Attributes:
        operator: the operator.
        x, y: its input and output, (B, ...). Linear bounds over the input are relative to the
            midpoint of `x`.
        number: of a nonlinear operator, from 0 in order of execution; of others -1.
        lines: of an activation; of both factors of a product; otherwise empty.
        other: of an activation that was refined, with the other lower line if there are two.
        branches: the visits in each branch of a fork.
        parts: the outputs of these branches.
    """

    operator: Operator
    x: Interval
    y: Interval
    number: int = -1
    lines: tuple[Lines, ...] = ()
    other: Lines | None = None
    branches: tuple[tuple[Visit, ...], ...] = ()
    parts: tuple[Interval, ...] = ()


Path: TypeAlias = tuple[tuple[Visit, ...], ...]
"""The visits from the input of the network to some place, one part for each fork around it."""
Refine: TypeAlias = Callable[[Operator, int, Interval, Path], tuple[Interval, Interval]]
"""Finds a smaller interval for the input of a nonlinear operator or for a factor of a product.

Called with the operator, its number (-1 for a factor), the interval (B, ...) and its path. Returns
the smaller interval, and the one by whose midpoint one of two lower lines is chosen.
"""


def trace(
    operators: Sequence[Operator],
    x: Interval,
    refine: Refine | None = None,
    observe: Observer | None = None,
    path: Path = (),
    numbers: Iterator[int] | None = None,
) -> tuple[Visit, ...]:
    """Runs `operators` on `x`, (B, ...), and returns their visits.

    Args:
        refine: None to keep the intervals of interval arithmetic.
        observe: called with each operator and its input, before that is refined.
        path: of `x`.
        numbers: of the nonlinear operators.
    """
    numbers = count() if numbers is None else numbers
    visits: list[Visit] = []
    for operator in operators:
        here = (*path, tuple(visits))
        if isinstance(operator, Fork):
            branches = [
                trace(branch, x, refine, observe, here, numbers) for branch in operator.branches
            ]
            visit = _joined(operator, x, tuple(branches), refine, here)
        else:
            if observe is not None:
                observe(operator, x)
            visit = _visited(operator, x, refine, here, numbers)
        visits.append(visit)
        x = visit.y
    return tuple(visits)


def flattened(visits: Sequence[Visit]) -> Iterator[Visit]:
    """All visits in order of execution, those in the branches of a fork before the fork's."""
    for visit in visits:
        for branch in visit.branches:
            yield from flattened(branch)
        yield visit


def output(visits: Sequence[Visit], x: Interval) -> Interval:
    """The output of `visits` of the input `x`, (B, ...)."""
    return visits[-1].y if visits else x


def _visited(
    operator: Simple, x: Interval, refine: Refine | None, path: Path, numbers: Iterator[int]
) -> Visit:
    if not isinstance(operator, Nonlinear):
        return Visit(operator, x, operator(x))
    number = next(numbers)
    inner, choice = (x, x) if refine is None else refine(operator, number, x, path)
    if operator.lines is None:
        return Visit(operator, x, operator(inner), number)
    lines, other = operator.lines(inner), None
    if refine is not None and operator.other_lines is not None:
        lines, other = _chosen(operator.lines(choice), lines, operator.other_lines(inner))
        other = moved(other, inner, x)
    lines = moved(lines, inner, x)
    return Visit(operator, x, operator(inner), number, (lines,), other)


def _chosen(wanted: Lines, lines: Lines, other: Lines) -> tuple[Lines, Lines]:
    """`lines` and `other` with their lower lines exchanged where `other` has the `wanted` slope."""
    swap = wanted.lower_slope != lines.lower_slope
    swap = swap & (wanted.lower_slope == other.lower_slope)
    slopes, gaps = (lines.lower_slope, other.lower_slope), (lines.lower_gap, other.lower_gap)
    pairs = [(torch.where(swap, b, a), torch.where(swap, a, b)) for a, b in (slopes, gaps)]
    first, second = zip(*pairs, strict=True)
    return (
        lines._replace(lower_slope=first[0], lower_gap=first[1]),
        other._replace(lower_slope=second[0], lower_gap=second[1]),
    )


def _joined(
    operator: Fork,
    x: Interval,
    branches: tuple[tuple[Visit, ...], ...],
    refine: Refine | None,
    path: Path,
) -> Visit:
    parts = inner = tuple(output(branch, x) for branch in branches)
    lines: tuple[Lines, ...] = ()
    if isinstance(operator, Product):
        if refine is not None:
            pairs = zip(parts, branches, strict=True)
            inner = tuple(refine(operator, -1, part, (*path, b))[0] for part, b in pairs)
        planes = zip(product(*inner), inner, parts, strict=True)
        lines = tuple(moved(*plane) for plane in planes)
    return Visit(operator, x, operator.join(inner), -1, lines, None, branches, parts)


def moved(lines: Lines, inner: Interval, x: Interval) -> Lines:
    """Lines relative to the midpoint of `inner`, as lines relative to that of `x`, (B, ...)."""
    if inner is x:
        return lines
    shift = x.mid - inner.mid
    above = lines.upper_slope * shift
    if lines.upper_gap is not None:
        above = above + lines.upper_gap
    return lines._replace(lower_gap=lines.lower_gap - lines.lower_slope * shift, upper_gap=above)
