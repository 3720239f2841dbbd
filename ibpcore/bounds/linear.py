"""Linear bounds, propagated backwards from any operator to the input of the network.

A bound consists of a row of coefficients and a value: for x in an operator's input box with
midpoint mid, the function is at most value + row . (x - mid). Linear operators map midpoints
to midpoints, so they change the row but not the value, and biases need no rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from math import prod
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.convolutions import TransposedConvolution
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relaxed, sums_from
from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    Concatenation,
    Fork,
    Nonlinear,
    NonnegativeLinear,
    Observer,
    Operator,
    Product,
    Simple,
    Sum,
)
from ibpcore.bounds.relaxations import Lines, product
from ibpcore.bounds.windows import Windows


class LinearBounds(NamedTuple):
    """Linear upper bounds on R functions over an operator's input box, for each of B samples.

    Attributes:
        rows: (B, R, ...), coefficients of x - mid; those in windows of x, (B, R, C, *size).
        value: (B, R), the bounds at mid.
        windows: the parts of x outside of which `rows` are zero, each for R / W of them; None for
            rows of all of x.
    """

    rows: Tensor
    value: Tensor
    windows: Windows | None = None


class Visit(NamedTuple):
    """An operator with its input and output intervals, as a backward pass needs them.

    Attributes:
        operator: the operator.
        x, y: its input and output, (B, ...). Linear bounds over the input are relative to the
            midpoint of `x`.
        refined: the part of `x` over which a nonlinear operator is relaxed.
        number: of a nonlinear operator, from 0 in order of execution; of others -1.
        lines: of an activation; of both factors of a product; otherwise empty.
        other: of an activation that was refined, with the other lower line if there are two.
        branches: the visits in each branch of a fork.
        parts: the outputs of these branches.
    """

    operator: Operator
    x: Interval
    refined: Interval
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
Shares: TypeAlias = Mapping[int, Tensor]
"""Where the lower lines of nonlinear operators lie between their two choices, by number: from 0 for
`lines` to 1 for `other_lines`, (B, R, ...) or (B, 1, ...)."""


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
        return Visit(operator, x, x, operator(x))
    number = next(numbers)
    inner, choice = (x, x) if refine is None else refine(operator, number, x, path)
    if operator.lines is None:
        return Visit(operator, x, inner, operator(inner), number)
    lines, other = operator.lines(inner), None
    if refine is not None and operator.other_lines is not None:
        lines, other = _chosen(operator.lines(choice), lines, operator.other_lines(inner))
        other = moved(other, inner, x)
    lines = moved(lines, inner, x)
    return Visit(operator, x, inner, operator(inner), number, (lines,), other)


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
    return Visit(operator, x, x, operator.join(inner), -1, lines, None, branches, parts)


def moved(lines: Lines, inner: Interval, x: Interval) -> Lines:
    """Lines relative to the midpoint of `inner`, as lines relative to that of `x`, (B, ...)."""
    if inner is x:
        return lines
    shift = x.mid - inner.mid
    above = lines.upper_slope * shift
    if lines.upper_gap is not None:
        above = above + lines.upper_gap
    return lines._replace(lower_gap=lines.lower_gap - lines.lower_slope * shift, upper_gap=above)


def maximum(
    path: Path, bounds: LinearBounds, box: Interval, shares: Shares | None = None
) -> Tensor:
    """(B, R) upper bounds over the input `box`, from `bounds` at the end of `path`."""
    for visits in reversed(path):
        bounds = to_input(visits, bounds, shares or {})
    return bounds.value + _width(bounds, box)


def _width(bounds: LinearBounds, x: Interval) -> Tensor:
    """(B, R) by how much the rows of `bounds` vary from the midpoint of x, (B, ...)."""
    rows, _, windows = bounds
    if windows is None:
        return sums_from(2, rows.abs() * x.rad[:, None])
    rad = windows.cut(x.rad)[0]
    return sums_from(2, windows.by_window(rows).abs().mul(rad[:, None])).view_as(bounds.value)


def components(path: Path, x: Interval, index: Tensor) -> tuple[Path, LinearBounds]:
    """The components `index`, (B, R), of x, (B, ...), as rows; and the path to where these are.

    The rows of a linear layer or a convolution are parts of its weight, so that no product is
    computed for it.
    """
    value = x.mid.flatten(1).gather(1, index)
    last = path[-1][-1].operator if path[-1] else None
    before = (*path[:-1], path[-1][:-1])
    if isinstance(last, Affine) and last.operation is F.linear and x.mid.dim() == 2:
        return before, LinearBounds(last.weight[index], value)
    if x.mid.dim() == 2:
        rows = value.new_zeros(*index.shape, x.mid.shape[1]).scatter_(2, index[..., None], 1)
        return path, LinearBounds(rows, value)
    sides = x.mid.shape[2:]
    channel, cells = index // sides.numel(), index % sides.numel()
    windows = Windows.of_numbers(cells, sides)
    if isinstance(last, Affine) and isinstance(last.transpose, TransposedConvolution):
        kernels = last.transpose.kernels(last.weight)
        windows, path = windows.before(last.transpose, last.weight), before
    else:
        identity = torch.eye(x.mid.shape[1], dtype=value.dtype, device=value.device)
        kernels = identity.view(*identity.shape, *[1] * len(sides))
    # In the order of memory that convolutions use, see `Windows.cut`.
    table = kernels.movedim(1, -1).flatten(1)
    shape = *index.shape, *windows.size, kernels.shape[1]
    rows = table.index_select(0, channel.flatten()).view(shape)
    return path, LinearBounds(rows.movedim(-1, 2), value, windows)


def to_input(visits: Sequence[Visit], bounds: LinearBounds, shares: Shares) -> LinearBounds:
    """Propagates bounds over the output of `visits` to their input."""
    for visit in reversed(visits):
        operator = visit.operator
        if isinstance(operator, Fork):
            bounds = _through_fork(visit, operator, bounds, shares)
        elif isinstance(operator, Nonlinear):
            bounds = _through_lines(visit, bounds, shares)
        elif bounds.windows is not None:
            bounds = _through_windows(visit, bounds, bounds.windows)
        else:
            bounds = _through_linear(visit, bounds)
    return bounds


def _whole(bounds: LinearBounds, x: Interval) -> LinearBounds:
    """Bounds over x, (B, ...), with rows of all of it."""
    rows, value, windows = bounds
    if windows is None:
        return bounds
    return LinearBounds(windows.whole(rows, x.mid.shape[2:]), value)


def _through_linear(visit: Visit, bounds: LinearBounds) -> LinearBounds:
    """Propagates through a linear operator; rows may be windows if it has one number a channel."""
    lanes = bounds.rows.flatten(0, 1)
    shape = torch.Size((len(lanes), *visit.x.shape[1:]))
    operator = cast(Affine | ChannelAffine | NonnegativeLinear, visit.operator)
    rows = operator.transposed(lanes, shape).unflatten(0, bounds.value.shape)
    return bounds._replace(rows=rows)


def _through_windows(visit: Visit, bounds: LinearBounds, windows: Windows) -> LinearBounds:
    """Propagates windows through a linear operator; the result may be whole rows."""
    operator, before = visit.operator, _before(visit, windows)
    if before is windows:
        return _through_linear(visit, bounds)
    transpose = operator.transpose if isinstance(operator, Affine) else None
    if not (isinstance(operator, Affine) and isinstance(transpose, TransposedConvolution)):
        return _through_linear(visit, _whole(bounds, visit.y))
    rows = bounds.rows
    if not windows.clean:
        rows = windows.cleaned(rows, visit.y.mid.shape[2:])
    rows = transpose.with_padding(rows.flatten(0, 1), operator.weight)
    rows, found = rows.unflatten(0, bounds.value.shape), windows.before(transpose, operator.weight)
    bounds = LinearBounds(rows, bounds.value, found)
    return _whole(bounds, visit.x) if before is None else bounds


def _before(visit: Visit, windows: Windows) -> Windows | None:
    """The windows of a bound over the input of an operator that is no fork; None for whole rows."""
    operator = visit.operator
    if isinstance(operator, ChannelAffine):
        return windows if operator.per_channel else None
    if isinstance(operator, Affine) and isinstance(operator.transpose, TransposedConvolution):
        found = windows.before(operator.transpose, operator.weight)
        return None if found.covers(visit.x.mid.shape[2:]) else found
    return windows if visit.lines else None


def widest(path: Path, windows: Windows | None) -> int:
    """Numbers in the largest row on the way from the end of `path`, where it is in `windows`."""
    largest = 0
    for visits in reversed(path):
        size, windows = _widest(visits, windows)
        largest = max(largest, size)
    return largest


def _widest(visits: Sequence[Visit], windows: Windows | None) -> tuple[int, Windows | None]:
    largest = 0
    for visit in reversed(visits):
        if isinstance(visit.operator, Fork):
            kept = windows if isinstance(visit.operator, Sum) else None
            parts = [_widest(branch, kept) for branch in visit.branches]
            largest = max(largest, *(size for size, _ in parts))
            windows = None if kept is None else _joined_windows(parts[0][1], parts[1][1], visit.x)
        elif windows is not None:
            windows = _before(visit, windows)
        sides = visit.x.shape[2:] if windows is None else windows.size
        largest = max(largest, visit.x.shape[1] * prod(sides))
    return largest, windows


def _through_lines(visit: Visit, bounds: LinearBounds, shares: Shares) -> LinearBounds:
    """Uses the upper line of an activation where a coefficient is positive, else the lower.

    Without lines, the operator is bounded by the ends of its output interval.
    """
    rows, value, windows = bounds
    if not visit.lines:
        value = value + _width(bounds, visit.y)
        return LinearBounds(value.new_zeros(*value.shape, *visit.x.shape[1:]), value)
    share = shares.get(visit.number)
    lines = visit.lines[0] if share is None else mixed(visit, share)
    if windows is None:
        rows, gaps = relaxed(rows, *lines)
        return LinearBounds(rows, value + gaps)
    found, gaps = relaxed(windows.by_window(rows), *_cut(windows, lines))
    value = value + gaps.view_as(value)
    return LinearBounds(
        found.unflatten(0, windows.cells.shape).flatten(1, 2), value, windows._replace(clean=True)
    )


def _cut(windows: Windows, lines: Lines) -> Lines:
    """Windows, (B * W, ...), of lines (B, ...), or of lines (B, 1, ...) that all rows share."""
    dim = lines.upper_slope.dim()
    maps = [line.squeeze(1) if line.dim() > dim else line for line in lines if line is not None]
    lower, upper, below, *above = windows.cut(*maps)
    return Lines(lower, upper, below, above[0] if above else None)


def mixed(visit: Visit, share: Tensor) -> Lines:
    """Lines between the two choices of an activation, for a `share` as in `Shares`."""
    first, other = visit.lines[0], cast(Lines, visit.other)
    slope = torch.lerp(first.lower_slope[:, None], other.lower_slope[:, None], share)
    gap = torch.lerp(first.lower_gap[:, None], other.lower_gap[:, None], share)
    return first._replace(lower_slope=slope, lower_gap=gap)


def _through_fork(
    visit: Visit, operator: Fork, bounds: LinearBounds, shares: Shares
) -> LinearBounds:
    """Propagates through all branches, each with the rows for its part of the output."""
    if isinstance(operator, Sum):
        branch, shortcut = visit.branches
        first = to_input(branch, bounds, shares)
        return _sum(first, to_input(shortcut, bounds._replace(value=first.value), shares), visit.x)
    rows, value, _ = _whole(bounds, visit.y)
    parts: Sequence[Tensor]
    if isinstance(operator, Concatenation):
        sizes = [part.shape[operator.dim] for part in visit.parts]
        parts = rows.split(sizes, operator.dim + 1)
    else:
        planes = [relaxed(rows, *lines) for lines in visit.lines]
        parts = [part for part, _ in planes]
        value = value + planes[0][1] + planes[1][1]
    total: Tensor | None = None
    for branch, part in zip(visit.branches, parts, strict=True):
        rows, value, _ = to_input(branch, LinearBounds(part, value), shares)
        total = rows if total is None else total + rows
    return LinearBounds(cast(Tensor, total), value)


def _sum(first: LinearBounds, second: LinearBounds, x: Interval) -> LinearBounds:
    """The sum of rows over x, (B, ...); with the value of the second."""
    joined = _joined_windows(first.windows, second.windows, x)
    if joined is None:
        rows = _whole(first, x).rows + _whole(second, x).rows
        return LinearBounds(rows, second.value)
    parts = [cast(Windows, b.windows).widened(b.rows, joined) for b in (first, second)]
    return LinearBounds(parts[0] + parts[1], second.value, joined)


def _joined_windows(first: Windows | None, second: Windows | None, x: Interval) -> Windows | None:
    """The windows of a sum of rows over x, (B, ...); None for whole rows."""
    joined = None if first is None or second is None else first.joined(second)
    return None if joined is None or joined.covers(x.mid.shape[2:]) else joined
