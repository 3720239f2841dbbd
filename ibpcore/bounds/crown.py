"""CROWN-IBP: linear bounds propagated from margins back to inputs, over IBP's inner bounds.

A bound consists of a row of coefficients and a value: for x in an operator's input box with
midpoint mid, the function is at most value + row . (x - mid). Linear operators map midpoints
to midpoints, so they change the row but not the value, and biases need no rule here.

These bounds are usually tighter than IBP's, but cost one row per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ibpcore.bounds.chunking import backward_chunk_size, in_chunks
from ibpcore.bounds.ibp import FinitenessMonitor, elided, largest_difference, separate
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relaxed, sums_from
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import (
    Concatenation,
    Fork,
    Nonlinear,
    Observer,
    Operator,
    Product,
    run,
)
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.relaxations import Relaxation, product
from ibpcore.precision import without_autocast


class LinearBounds(NamedTuple):
    """Linear upper bounds on R functions over an operator's input box, for each of B samples.

    Attributes:
        rows: (B, R, ...), coefficients of x - mid.
        value: (B, R), the bounds at mid.
    """

    rows: Tensor
    value: Tensor


@without_autocast
def crown_logits(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bounds on f_i - f_y over the balls by CROWN-IBP and by IBP; 0 at i = y.

    CROWN-IBP's bounds (Zhang et al. 2020) are not always the smaller ones. Both use the same
    interval pass. They are differentiable, including the relaxations.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        epsilons: (B,) in pixel units, not checked.
        options: with `elide`, rows of f_i - f_y are propagated, otherwise those of f_i and of
            -f_y separately.
        observe: called with each operator of the interval pass and its input.

    Returns:
        (B, classes) by CROWN-IBP and (B, classes) by `ibpcore.bounds.ibp.robust_logits`.
    """
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    return _both_logits(network, ball, labels, options, observe)


def robust_logits(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """The CROWN-IBP bounds of `crown_logits` alone, (B, classes)."""
    return crown_logits(network, images, labels, epsilons, options)[0]


@without_autocast
def box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """The smaller of CROWN-IBP's and IBP's bounds on f_i - f_y over boxes (B, C, H, W)."""
    return _smaller(*_both_logits(network, box, labels, options, None))


def _smaller(crown: Tensor, ibp: Tensor) -> Tensor:
    return torch.where(crown.isfinite(), torch.minimum(crown, ibp), ibp)


def _both_logits(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    observe: Observer | None,
) -> tuple[Tensor, Tensor]:
    """`crown_logits` over arbitrary boxes of images (B, C, H, W) instead of balls."""
    index = labels[:, None]
    operators, last = final_linear(network, options.elide)
    found, inputs = _traced(operators, box, observe)
    if last is not None:
        bounds = elided(last, found, labels)
        start = LinearBounds(last.weight - last.weight[index], bounds.mid)
        return _upper(operators, start, inputs, box), bounds.upper
    middle, apart = found.mid, separate(found, labels)
    identity = torch.eye(found.shape[1], dtype=middle.dtype, device=middle.device)
    if options.elide:
        start = LinearBounds(identity - identity[index], middle - middle.gather(1, index))
        return _upper(operators, start, inputs, box), apart
    # The last row is that of -f_y.
    rows = torch.cat([identity.expand(len(labels), -1, -1), -identity[index]], 1)
    values = torch.cat([middle, -middle.gather(1, index)], 1)
    upper = _upper(operators, LinearBounds(rows, values), inputs, box)
    return (upper[:, :-1] + upper[:, -1:]).scatter(1, index, 0.0), apart


@without_autocast
def fused_cross_entropy(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bounds on each sample's cross-entropy over its ball, by loss fusion; IBP's logits.

    The cross-entropy is the logarithm of the sum of exp(f_i - f_y). Each exp lies below its
    chord over the interval bounds on f_i - f_y, and the sum of these chords is one linear
    function of the logits. So a single row is propagated backwards, whatever the number of
    classes (Xu et al. 2020, loss fusion).

    Args: those of `crown_logits`; without `elide`, only the interval bounds are separate.

    Returns:
        (B,) bounds on the loss, and (B, classes) by `ibpcore.bounds.ibp.robust_logits`.
    """
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    index = labels[:, None]
    operators, last = final_linear(network, options.elide)
    found, inputs = _traced(operators, ball, observe)
    if last is None:
        middle = found.mid - found.mid.gather(1, index)
        bounds = Interval(middle, separate(found, labels) - middle)
    else:
        bounds = elided(last, found, labels)
    # All terms are divided by exp(largest) to avoid overflow. The chords sum to at least 1/2.
    largest = bounds.upper.amax(1, keepdim=True).detach()
    lower, upper = (bounds.lower - largest).exp(), (bounds.upper - largest).exp()
    share = bounds.rad > 0
    slope = torch.where(share, (upper - lower) / torch.where(share, 2 * bounds.rad, 1), upper)
    weights = slope.scatter_add(1, index, -slope.sum(1, keepdim=True))
    rows = weights if last is None else weights @ last.weight
    start = LinearBounds(rows[:, None], ((upper + lower) / 2).sum(1, keepdim=True))
    total = _upper(operators, start, inputs, ball)
    return (total.log() + largest)[:, 0], bounds.upper


def margins(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """R_cert by the smaller of both bounds on each f_i - f_y; +inf where IBP's are not finite.

    (B,) or (K, B) like `epsilons`. Unlike IBP's margins, these need not be monotone in epsilon.
    """
    if epsilons.numel() == 0:
        return torch.zeros_like(epsilons)

    def chunk(radii: Tensor, samples: slice) -> Tensor:
        repeats = len(radii)
        lanes = images[samples].repeat(repeats, *[1] * (images.dim() - 1))
        classes = labels[samples].repeat(repeats)
        return _lane_margins(network, lanes, classes, radii.flatten(), options).view_as(radii)

    return in_chunks(chunk, epsilons, backward_chunk_size(network, images, options.budget))


def _lane_margins(
    network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor, options: BoundOptions
) -> Tensor:
    """(N,) margins of N lanes."""
    monitor = FinitenessMonitor()
    crown, ibp = crown_logits(network, images, labels, radii, options, monitor)
    margin = largest_difference(_smaller(crown, ibp), labels)
    return torch.where(ibp.isfinite().all(-1) & monitor.finite(margin), margin, torch.inf)


def _traced(
    operators: Sequence[Operator], x: Interval, observe: Observer | None
) -> tuple[Interval, list[Interval]]:
    """The output of `operators` for `x`, and the inputs of all operators in execution order."""
    inputs: list[Interval] = []

    def record(operator: Operator, x: Interval) -> None:
        inputs.append(x)
        if observe is not None:
            observe(operator, x)

    return run(operators, x, record), inputs


def _upper(
    operators: Sequence[Operator], start: LinearBounds, inputs: list[Interval], ball: Interval
) -> Tensor:
    """(B, R) upper bounds over the ball, from bounds `start` over the output of `operators`."""
    rows, value = _to_input(operators, start, inputs)
    return value + sums_from(2, rows.abs() * ball.rad[:, None])


def _to_input(
    operators: Sequence[Operator], bounds: LinearBounds, inputs: list[Interval]
) -> LinearBounds:
    """Propagates bounds from the output of `operators` to their input; consumes `inputs`."""
    for operator in reversed(operators):
        if isinstance(operator, Fork):
            bounds = _through_fork(operator, bounds, inputs)
        elif isinstance(operator, Nonlinear):
            bounds = _relaxed(operator, inputs.pop(), bounds)
        else:
            lanes = bounds.rows.flatten(0, 1)
            shape = torch.Size((len(lanes), *inputs.pop().shape[1:]))
            rows = operator.transposed(lanes, shape).unflatten(0, bounds.value.shape)
            bounds = bounds._replace(rows=rows)
    return bounds


def _through_fork(operator: Fork, bounds: LinearBounds, inputs: list[Interval]) -> LinearBounds:
    """Propagates through all branches, each with the rows for its part of the output."""
    (rows, value), total = bounds, None
    shares: Sequence[Tensor] = [rows] * len(operator.branches)
    if isinstance(operator, Concatenation):
        sizes = [inputs.pop().shape[operator.dim] for _ in operator.branches]
        shares = rows.split(sizes[::-1], operator.dim + 1)
    if isinstance(operator, Product):
        second, first = inputs.pop(), inputs.pop()
        planes = [relaxed(rows, *lines) for lines in product(first, second)]
        shares = [share for share, _ in planes]
        value = value + planes[0][1]  # the gaps of both
    # `inputs` is consumed from its end, where those of the last branch are.
    for branch, rows in zip(reversed(operator.branches), reversed(shares), strict=True):
        rows, value = _to_input(branch, LinearBounds(rows, value), inputs)
        total = rows if total is None else rows + total
    return LinearBounds(cast(Tensor, total), value)


def _relaxed(operator: Nonlinear, x: Interval, bounds: LinearBounds) -> LinearBounds:
    """Uses the upper line of an activation where a coefficient is positive, else the lower.

    Without lines, the operator is bounded by the ends of its output interval.
    """
    relaxation: Relaxation | None = operator.lines
    if relaxation is None:
        value = bounds.value + sums_from(2, bounds.rows.abs() * operator(x).rad[:, None])
        return LinearBounds(x.mid.new_zeros(*value.shape, *x.shape[1:]), value)
    rows, gaps = relaxed(bounds.rows, *relaxation(x))
    return LinearBounds(rows, bounds.value + gaps)
