"""CROWN-IBP: linear bounds from the margins back to the input, over IBP's inner bounds.

These bounds are usually tighter than IBP's, but cost one row per class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.ibp import FinitenessMonitor, elided, separate
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.linear import LinearBounds, maximum
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Affine, Observer
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.visits import Refine, Visit, flattened, output, trace
from ibpcore.precision import without_autocast


class MarginTrace(NamedTuple):
    """A pass over boxes, from which linear bounds on the differences f_i - f_y start.

    Attributes:
        box: the input, (B, C, H, W).
        labels: (B,).
        visits: of the operators, without `last`.
        last: a linear layer after them, to be merged into the differences.
        value: f_i - f_y at the midpoint, (B, classes).
        ibp: (B, classes) bounds on f_i - f_y from the output interval; 0 at i = y.
    """

    box: Interval
    labels: Tensor
    visits: tuple[Visit, ...]
    last: Affine | None
    value: Tensor
    ibp: Tensor

    def differences(self) -> LinearBounds:
        """f_i - f_y, (B, classes), over the output of `visits`."""
        if self.last is None:
            rows = torch.eye(self.value.shape[1], dtype=self.value.dtype, device=self.value.device)
        else:
            rows = self.last.weight
        return LinearBounds(rows - rows[self.labels[:, None]], self.value)

    def smaller(self, upper: Tensor) -> Tensor:
        """The smaller of `upper` and `ibp`, (B, classes).

        It is +inf for a sample if a bound of interval arithmetic was not finite anywhere.
        """
        monitor = FinitenessMonitor()
        for visit in flattened(self.visits):
            monitor(visit.operator, visit.x)
        both = torch.minimum(upper.nan_to_num(torch.inf, torch.inf, torch.inf), self.ibp)
        return torch.where(monitor.finite(self.ibp)[:, None], both, torch.inf)


def trace_margins(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    refine: Refine | None = None,
    observe: Observer | None = None,
) -> MarginTrace:
    """Runs boxes (B, C, H, W) with labels (B,) through a network, see `linear.trace`.

    With `options.elide`, a linear last layer is merged into the margins; else `ibp` is eq. 3.
    """
    operators, last = final_linear(network, options.elide)
    visits = trace(operators, box, refine, observe)
    found = output(visits, box)
    if last is not None:
        bounds = elided(last, found, labels)
        return MarginTrace(box, labels, visits, last, bounds.mid, bounds.upper)
    value = found.mid - found.mid.gather(1, labels[:, None])
    return MarginTrace(box, labels, visits, None, value, separate(found, labels))


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
    traced = trace_margins(network, ball, labels, options, observe=observe)
    return _upper(traced, options), traced.ibp


def _upper(traced: MarginTrace, options: BoundOptions) -> Tensor:
    """CROWN-IBP's bounds on f_i - f_y, (B, classes)."""
    visits, index = traced.visits, traced.labels[:, None]
    if options.elide:
        return maximum((visits,), traced.differences(), traced.box)
    # The last row is that of -f_y.
    middle = output(visits, traced.box).mid
    identity = torch.eye(middle.shape[1], dtype=middle.dtype, device=middle.device)
    rows = torch.cat([identity.expand(len(index), -1, -1), -identity[index]], 1)
    values = torch.cat([middle, -middle.gather(1, index)], 1)
    upper = maximum((visits,), LinearBounds(rows, values), traced.box)
    return (upper[:, :-1] + upper[:, -1:]).scatter(1, index, 0.0)


def robust_logits(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """The CROWN-IBP bounds of `crown_logits` alone, (B, classes)."""
    return crown_logits(network, images, labels, epsilons, options)[0]


@without_autocast
def box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """The smaller of CROWN-IBP's and IBP's bounds on f_i - f_y over boxes; see `OverBoxes`."""
    traced = trace_margins(network, box, labels, options)
    return traced.smaller(_upper(traced, options))


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
    visits = trace(operators, ball, observe=observe)
    found = output(visits, ball)
    if last is None:
        middle = found.mid - found.mid.gather(1, index)
        bounds = Interval(mid=middle, rad=separate(found, labels) - middle)
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
    total = maximum((visits,), start, ball)
    return (total.log() + largest)[:, 0], bounds.upper
