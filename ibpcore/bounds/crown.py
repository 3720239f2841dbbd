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

from ibpcore.bounds.checks import Clip
from ibpcore.bounds.chunking import backward_size, in_pieces
from ibpcore.bounds.ibp import Doubt, elided, largest_difference, separate
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import relaxed
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Concatenation, Fork, Monotone, Observer, Operator, Relu, run
from ibpcore.bounds.relaxations import Relaxation


class Bounds(NamedTuple):
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
    *,
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bounds of f_i - f_y over the balls, 0 at i = y: CROWN-IBP's, and IBP's.

    CROWN-IBP's (Zhang et al. 2020) need not be the smaller ones. Both come of one interval
    pass, and are differentiable, through the relaxations too.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        epsilons: (B,) in pixel units, unchecked.
        elide: propagate rows of W_i - W_y; else those of f_i and of -f_y apart.
        clip: valid pixel range that the ball is met with; None for the bare ball.
        observe: is shown each operator of the interval pass and what it reads.

    Returns:
        (B, classes) and (B, classes), the second as `ibpcore.bounds.ibp.robust_logits`.

    Raises:
        UserError: with `elide`, the network does not end in a linear layer.
    """
    ball = Interval.ball(images, epsilons, clip, check=False)
    return crown_box_logits(network, ball, labels, elide=elide, observe=observe)


def crown_box_logits(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    *,
    elide: bool = True,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """`crown_logits` over any box of images (B, C, H, W) instead of a ball."""
    index = labels[:, None]
    if elide:
        body, last = final_linear(network)
        hidden, read = _traced(body, box, observe)
        bounds = elided(last, hidden, labels)
        start = Bounds(last.weight - last.weight[index], bounds.mid)
        return _upper(body, start, read, box), bounds.upper
    logits, read = _traced(network.operators, box, observe)
    every = torch.eye(logits.shape[1], dtype=logits.mid.dtype, device=logits.mid.device)
    # The last row is that of -f_y.
    rows = torch.cat([every.expand(len(labels), -1, -1), -every[index]], 1)
    values = torch.cat([logits.mid, -logits.mid.gather(1, index)], 1)
    upper = _upper(network.operators, Bounds(rows, values), read, box)
    return (upper[:, :-1] + upper[:, -1:]).scatter(1, index, 0.0), separate(logits, labels)


def fused_cross_entropy(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    *,
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
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
    ball = Interval.ball(images, epsilons, clip, check=False)
    operators, index = network.operators, labels[:, None]
    if elide:
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
    rows = weights @ last.weight if elide else weights
    start = Bounds(rows[:, None], ((upper + lower) / 2).sum(1, keepdim=True))
    total = _upper(operators, start, read, ball)
    return (total.log() + largest)[:, 0], bounds.upper


def crown_margins(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    *,
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    budget: int | None = None,
) -> Tensor:
    """R_cert by the lesser of both bounds of each f_i - f_y, +inf where IBP's are not finite.

    Unlike IBP's it need not be monotone in epsilon.

    Args: those of `ibpcore.bounds.ibp.margins`.

    Returns:
        (B,) or (K, B), like `epsilons`.
    """
    radii = epsilons if epsilons.dim() == 2 else epsilons[None]

    def piece(radii: Tensor, samples: slice) -> Tensor:
        repeats = len(radii)
        lanes = images[samples].repeat(repeats, *[1] * (images.dim() - 1))
        found = _margins(network, lanes, labels[samples].repeat(repeats), radii, elide, clip)
        return found.view_as(radii)

    if radii.numel() == 0:
        return torch.zeros_like(epsilons)
    size = backward_size(network, images, budget)
    return in_pieces(piece, radii, size).view_as(epsilons)


def _margins(
    network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor, elide: bool, clip: Clip
) -> Tensor:
    """(N,) margins of N lanes."""
    doubt = Doubt()
    crown, ibp = crown_logits(
        network, images, labels, radii.flatten(), elide=elide, clip=clip, observe=doubt
    )
    bounds = torch.where(crown.isfinite(), torch.minimum(crown, ibp), ibp)
    margin = largest_difference(bounds, labels)
    return torch.where(ibp.isfinite().all(-1) & doubt.free(margin), margin, torch.inf)


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
    operators: Sequence[Operator], start: Bounds, read: list[Interval], ball: Interval
) -> Tensor:
    """(B, R) upper bounds, over the ball, of what `start` bounds over the output of `operators`."""
    rows, value = _back(operators, start, read)
    return value + _dot(rows.abs(), ball.rad)


def _back(operators: Sequence[Operator], bounds: Bounds, read: list[Interval]) -> Bounds:
    """Bounds over the output of `operators` to bounds over their input; uses `read` up."""
    for operator in reversed(operators):
        if isinstance(operator, Fork):
            bounds = _forked(operator, bounds, read)
        elif isinstance(operator, Monotone | Relu):
            bounds = _relaxed(operator, read.pop(), bounds)
        else:
            lanes = bounds.rows.flatten(0, 1)
            shape = torch.Size((len(lanes), *read.pop().shape[1:]))
            rows = operator.transposed(lanes, shape).unflatten(0, bounds.value.shape)
            bounds = bounds._replace(rows=rows)
    return bounds


def _forked(operator: Fork, bounds: Bounds, read: list[Interval]) -> Bounds:
    """Through all branches, each with the rows of its part of the output."""
    shares = [bounds.rows] * len(operator.branches)
    if isinstance(operator, Concatenation):
        sizes = [read.pop().shape[operator.dim] for _ in operator.branches]
        shares = list(bounds.rows.split(sizes[::-1], operator.dim + 1))
    value, total = bounds.value, None
    # What the branch that ran last has read comes first.
    for branch, rows in zip(reversed(operator.branches), reversed(shares), strict=True):
        rows, value = _back(branch, Bounds(rows, value), read)
        total = rows if total is None else rows + total
    return Bounds(cast(Tensor, total), value)


def _relaxed(operator: Monotone | Relu, x: Interval, bounds: Bounds) -> Bounds:
    """Through an activation: the upper line where a coefficient is positive, else the lower.

    Without lines the ends of the interval that it makes, and nothing before it matters.
    """
    relaxation: Relaxation | None = operator.lines
    if relaxation is None:
        value = bounds.value + _dot(bounds.rows.abs(), operator(x).rad)
        return Bounds(x.mid.new_zeros(*value.shape, *x.shape[1:]), value)
    rows, gaps = relaxed(bounds.rows, *relaxation(x))
    return Bounds(rows, bounds.value + gaps)


def _dot(rows: Tensor, x: Tensor) -> Tensor:
    """(B, R, ...) and (B, ...) to (B, R); flattening would copy what lies channels last."""
    return (rows * x[:, None]).sum(tuple(range(2, rows.dim())))
