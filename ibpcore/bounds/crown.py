"""CROWN-IBP: linear bounds from the margins back to the input, over interval bounds between.

A bound is a row of coefficients and a value: over the box that an operator reads, the function
is at most value + row . (x - mid), where mid is the middle of the box. Interval passes take
middles to middles through every linear operator, so its bias needs no rule here; and a row of
an interval's output that meets nothing but linear operators ends as the interval bound itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ibpcore.bounds.chunking import backward_chunk_size, in_chunks
from ibpcore.bounds.ibp import FinitenessMonitor, elided, largest_difference, separate
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relaxed
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Concatenation, Fork, Monotone, Observer, Operator, Relu, run
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.relaxations import Relaxation


class LinearBounds(NamedTuple):
    """Upper bounds of R functions for each of B samples, over the box that an operator reads.

    Attributes:
        rows: (B, R, ...), coefficients of x - mid.
        value: (B, R), what is reached at mid.
    """

    rows: Tensor
    value: Tensor


def crown_logits(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bounds of f_i - f_y over the balls, 0 at i = y: CROWN-IBP's, and IBP's.

    CROWN-IBP's (Zhang et al. 2020) need not be the smaller ones. Both come of one interval
    pass, and are differentiable, through the relaxations too.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        epsilons: (B,) in pixel units, unchecked.
        options: with `elide`, rows of W_i - W_y are propagated; else those of f_i and of
            -f_y apart.
        observe: called with each operator of the interval pass and what it reads.

    Returns:
        (B, classes) and (B, classes), the second as `ibpcore.bounds.ibp.robust_logits`.

    Raises:
        UserError: with `elide`, the network does not end in a linear layer.
    """
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    return _both_logits(network, ball, labels, options, observe)


def robust_logits(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
) -> Tensor:
    """CROWN-IBP's alone of `crown_logits`, (B, classes)."""
    return crown_logits(network, images, labels, epsilons, options)[0]


def box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """The lesser of CROWN-IBP's and IBP's bounds of f_i - f_y over boxes (B, C, H, W)."""
    return _lesser(*_both_logits(network, box, labels, options, None))


def _lesser(crown: Tensor, ibp: Tensor) -> Tensor:
    return torch.where(crown.isfinite(), torch.minimum(crown, ibp), ibp)


def _both_logits(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    observe: Observer | None,
) -> tuple[Tensor, Tensor]:
    """`crown_logits` over any box of images (B, C, H, W) instead of a ball."""
    index = labels[:, None]
    if options.elide:
        body, last = final_linear(network)
        hidden, read = _traced(body, box, observe)
        bounds = elided(last, hidden, labels)
        start = LinearBounds(last.weight - last.weight[index], bounds.mid)
        return _upper(body, start, read, box), bounds.upper
    logits, read = _traced(network.operators, box, observe)
    every = torch.eye(logits.shape[1], dtype=logits.mid.dtype, device=logits.mid.device)
    # The last row is that of -f_y.
    rows = torch.cat([every.expand(len(labels), -1, -1), -every[index]], 1)
    values = torch.cat([logits.mid, -logits.mid.gather(1, index)], 1)
    upper = _upper(network.operators, LinearBounds(rows, values), read, box)
    return (upper[:, :-1] + upper[:, -1:]).scatter(1, index, 0.0), separate(logits, labels)


def fused_cross_entropy(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bounds of each sample's cross-entropy over its ball, by loss fusion; IBP's logits.

    The cross-entropy is the logarithm of the sum of exp(f_i - f_y). Each exp lies below its
    chord over the interval bounds of f_i - f_y, and the sum of these chords is one linear
    function of the logits: a single row goes back through the network, however many classes
    there are (Xu et al. 2020, loss fusion).

    Args: those of `crown_logits`; without `elide` only the interval bounds are apart.

    Returns:
        (B,) and (B, classes), the second as `ibpcore.bounds.ibp.robust_logits`.

    Raises:
        UserError: with `elide`, the network does not end in a linear layer.
    """
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    operators, index = network.operators, labels[:, None]
    if options.elide:
        operators, last = final_linear(network)
        hidden, read = _traced(operators, ball, observe)
        bounds = elided(last, hidden, labels)
    else:
        logits, read = _traced(operators, ball, observe)
        upper = separate(logits, labels)
        middle = logits.mid - logits.mid.gather(1, index)
        bounds = Interval(middle, upper - middle)
    # All is divided by exp(largest), lest it overflow. The chords add up to 1/2 or more.
    largest = bounds.upper.amax(1, keepdim=True).detach()
    lower, upper = (bounds.lower - largest).exp(), (bounds.upper - largest).exp()
    share = bounds.rad > 0
    slope = torch.where(share, (upper - lower) / torch.where(share, 2 * bounds.rad, 1), upper)
    weights = slope.scatter_add(1, index, -slope.sum(1, keepdim=True))
    rows = weights @ last.weight if options.elide else weights
    start = LinearBounds(rows[:, None], ((upper + lower) / 2).sum(1, keepdim=True))
    total = _upper(operators, start, read, ball)
    return (total.log() + largest)[:, 0], bounds.upper


def margins(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
) -> Tensor:
    """R_cert by the lesser of both bounds of each f_i - f_y, +inf where IBP's are not finite.

    Unlike IBP's it need not be monotone in epsilon. See `ibpcore.bounds.registry.Bound`.
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
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    options: BoundOptions,
) -> Tensor:
    """(N,) margins of N lanes."""
    monitor = FinitenessMonitor()
    crown, ibp = crown_logits(network, images, labels, radii, options, monitor)
    margin = largest_difference(_lesser(crown, ibp), labels)
    return torch.where(ibp.isfinite().all(-1) & monitor.finite(margin), margin, torch.inf)


def _traced(
    operators: Sequence[Operator], x: Interval, observe: Observer | None
) -> tuple[Interval, list[Interval]]:
    """What `operators` make of `x`, and the intervals that they read, in order of execution."""
    read: list[Interval] = []

    def note(operator: Operator, x: Interval) -> None:
        read.append(x)
        if observe is not None:
            observe(operator, x)

    return run(operators, x, note), read


def _upper(
    operators: Sequence[Operator], start: LinearBounds, read: list[Interval], ball: Interval
) -> Tensor:
    """(B, R) upper bounds, over the ball, of what `start` bounds over the output of `operators`."""
    rows, value = _backward(operators, start, read)
    return value + _row_products(rows.abs(), ball.rad)


def _backward(
    operators: Sequence[Operator], bounds: LinearBounds, read: list[Interval]
) -> LinearBounds:
    """Bounds over the output of `operators` to bounds over their input; uses `read` up."""
    for operator in reversed(operators):
        if isinstance(operator, Fork):
            bounds = _through_fork(operator, bounds, read)
        elif isinstance(operator, Monotone | Relu):
            bounds = _relaxed(operator, read.pop(), bounds)
        else:
            lanes = bounds.rows.flatten(0, 1)
            shape = torch.Size((len(lanes), *read.pop().shape[1:]))
            rows = operator.transposed(lanes, shape).unflatten(0, bounds.value.shape)
            bounds = bounds._replace(rows=rows)
    return bounds


def _through_fork(operator: Fork, bounds: LinearBounds, read: list[Interval]) -> LinearBounds:
    """Through all branches, each with the rows of its part of the output."""
    shares = [bounds.rows] * len(operator.branches)
    if isinstance(operator, Concatenation):
        sizes = [read.pop().shape[operator.dim] for _ in operator.branches]
        shares = list(bounds.rows.split(sizes[::-1], operator.dim + 1))
    value, total = bounds.value, None
    # What the branch that ran last has read comes first.
    for branch, rows in zip(reversed(operator.branches), reversed(shares), strict=True):
        rows, value = _backward(branch, LinearBounds(rows, value), read)
        total = rows if total is None else rows + total
    return LinearBounds(cast(Tensor, total), value)


def _relaxed(operator: Monotone | Relu, x: Interval, bounds: LinearBounds) -> LinearBounds:
    """Through an activation: the upper line where a coefficient is positive, else the lower.

    Without lines the ends of the interval that it makes, and nothing before it matters.
    """
    relaxation: Relaxation | None = operator.lines
    if relaxation is None:
        value = bounds.value + _row_products(bounds.rows.abs(), operator(x).rad)
        return LinearBounds(x.mid.new_zeros(*value.shape, *x.shape[1:]), value)
    rows, gaps = relaxed(bounds.rows, *relaxation(x))
    return LinearBounds(rows, bounds.value + gaps)


def _row_products(rows: Tensor, x: Tensor) -> Tensor:
    """(B, R, ...) and (B, ...) to (B, R); flattening would copy what lies channels last."""
    return (rows * x[:, None]).sum(tuple(range(2, rows.dim())))
