"""Optimised CROWN: CROWN with the lower lines of activations chosen by gradient descent.

Any line between the two candidates of `other_lines` is a lower line, so the bounds hold whatever
the search finds (alpha-CROWN, Xu et al. 2021). It starts at CROWN's own lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from ibpcore.bounds.crown import trace_crown
from ibpcore.bounds.crown_ibp import MarginTrace
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.linear import LinearBounds, maximum, mixed
from ibpcore.bounds.network import FoldedNetwork, tensors_of, with_tensors
from ibpcore.bounds.operators import Nonlinear
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.visits import Visit, flattened
from ibpcore.precision import without_autocast

RATE, DECAY = 0.25, 0.95
"""Step size of Adam for shares in [0, 1], and what it is multiplied by after a step."""
PATIENCE, PROGRESS = 5, 1e-3
"""The search stops if so many steps have improved no open margin by this share of its size."""
MARGINS = -2
"""The key of the margins' shares, beside those of nonlinear operators by number.

Factors of products have the number -1, and CROWN's lines.
"""

Goal: TypeAlias = Callable[[Tensor], Tensor]
"""From bounds on f_i - f_y, (B, classes), to margins, (B,), of which a negative one suffices."""
Slopes: TypeAlias = Mapping[int, Mapping[int, Tensor]]
"""For the rows of each nonlinear operator's input, by its number, and for those of the margins, by
`MARGINS`: slopes of the lower lines of nonlinear operators, by number, (B, classes, ...) or
(B, 1, ...)."""


class Optimised(NamedTuple):
    """The result of a search.

    Attributes:
        upper: (B, classes) CROWN's bounds on f_i - f_y.
        traced: the pass with the best bounds of the inner layers.
        classes: (B, R) those whose bounds were still open.
        shares: for each place as in `Slopes`; those of the margins are (B, R, ...).
    """

    upper: Tensor
    traced: MarginTrace
    classes: Tensor
    shares: dict[int, dict[int, Tensor]]

    def logits(self) -> Tensor:
        """The smallest bounds on f_i - f_y, (B, classes)."""
        traced, visits = self.traced, (self.traced.visits,)
        start = traced.differences()
        found = maximum(visits, _rows(start, self.classes), traced.box, self.shares[MARGINS])
        given = self.upper.gather(1, self.classes)
        # CROWN's bound is infinite if something is not finite anywhere, which nothing may undo.
        usable = given.isfinite() & found.isfinite()
        smaller = torch.where(usable, torch.minimum(given, found), given)
        return self.upper.scatter(1, self.classes, smaller)


@without_autocast
def box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """Bounds on f_i - f_y over boxes by optimised CROWN, at most CROWN's; see `OverBoxes`."""
    return optimised(network, box, labels, options).logits()


def robust_logits(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """`box_logits` over balls; differentiable, with the slopes of the lower lines fixed."""
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    return box_logits(network, ball, labels, options)


def optimised(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    goal: Goal | None = None,
    deadline: float | None = None,
) -> Optimised:
    """Searches for lower lines that certify boxes (B, C, H, W) with labels (B,).

    With `options.inner_slopes`, those of the rows from inner layers are searched for, too. All
    rows of a layer share them.

    Args:
        goal: where it is negative, the search stops; None for the largest of all differences.
        deadline: of `time.monotonic`, after which no further step is made.
    """
    if torch.is_inference_mode_enabled():
        # Tensors of that mode have no gradients, not even with respect to others; copies have.
        with torch.inference_mode(False), torch.no_grad():
            network = with_tensors(network, [tensor.clone() for tensor in tensors_of(network)])
            box, labels = box.apply(torch.clone), labels.clone()
            return optimised(network, box, labels, options, goal, deadline)
    goal = partial(largest_difference, labels=labels) if goal is None else goal
    traced = trace_crown(network, box, labels, options)
    upper = traced.smaller(maximum((traced.visits,), traced.differences(), box))
    index = _open_classes(upper.detach(), labels, goal)
    shares = _at_crown(traced, index.shape[1], options.inner_slopes)

    def bounds() -> Tensor:
        found = trace_crown(network, box, labels, options, shares) if inner else traced
        start = _rows(found.differences(), index)
        return maximum((found.visits,), start, box, shares[MARGINS])

    inner = options.inner_slopes
    flat = [share for place in shares.values() for share in place.values()]
    if flat and index.shape[1] > 0:
        best = _descended(bounds, flat, Open(upper.detach(), index, goal), options, deadline)
        places = iter(best)
        shares = {place: {n: next(places) for n in some} for place, some in shares.items()}
    if inner:
        traced = trace_crown(network, box, labels, options, shares)
    return Optimised(upper, traced, index, shares)


class Open(NamedTuple):
    """The bounds that a search starts from.

    Attributes:
        upper: (B, classes) bounds on f_i - f_y.
        classes: (B, R) those whose bounds are searched.
        goal: see `Goal`.
    """

    upper: Tensor
    classes: Tensor
    goal: Goal

    def margins(self, found: Tensor) -> Tensor:
        """(B,) margins for bounds `found`, (B, R)."""
        return self.goal(self.upper.scatter(1, self.classes, found))


def _descended(
    bounds: Callable[[], Tensor],
    shares: list[Tensor],
    start: Open,
    options: BoundOptions,
    deadline: float | None,
) -> list[Tensor]:
    """The best shares that Adam finds for `bounds`, (B, R); it changes `shares` in place.

    Each step moves all shares and then puts them back into [0, 1]. Shares of one row are kept when
    its bound is best, those that rows have in common when the margin is.
    """
    optimizer = torch.optim.Adam(shares, RATE)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    best = [share.detach().clone() for share in shares]
    smallest = start.upper.gather(1, start.classes)
    margins, idle = start.margins(smallest), 0
    for _ in range(options.slope_steps):
        with torch.enable_grad():
            found = bounds()
            gradients = torch.autograd.grad(found.sum(), shares, allow_unused=True)
        found = torch.where(found.isfinite(), found, torch.inf).detach()
        now = start.margins(found)
        better = (now < margins)[:, None] if options.inner_slopes else found < smallest
        best = [_where(better, share, old) for share, old in zip(shares, best, strict=True)]
        smallest = torch.where(better, found, smallest)
        now = torch.minimum(start.margins(smallest), margins)
        moved = ((margins - now) > PROGRESS * now.abs()) & (now >= 0)
        margins, idle = now, 0 if bool(moved.any()) else idle + 1
        late = deadline is not None and time.monotonic() > deadline
        if late or idle == PATIENCE or not bool((margins >= 0).any()):
            break
        for share, gradient in zip(shares, gradients, strict=True):
            share.grad = gradient
        optimizer.step()
        decay.step()
        with torch.no_grad():
            for share in shares:
                share.clamp_(0, 1)
    return best


def _where(better: Tensor, share: Tensor, old: Tensor) -> Tensor:
    """`share` for the rows or samples that are `better`, (B, R) or (B, 1), else `old`."""
    return torch.where(better.view(*better.shape, *[1] * (share.dim() - 2)), share.detach(), old)


def _open_classes(upper: Tensor, labels: Tensor, goal: Goal) -> Tensor:
    """(B, R) the classes with the largest bounds, as many as there are open ones in a sample."""
    others = upper.scatter(1, labels[:, None], -torch.inf)
    count = ((others >= 0) & (goal(upper) >= 0)[:, None]).sum(1)
    # The host has to wait for this number, which is the size of all that follows.
    return others.argsort(dim=1, descending=True)[:, : int(count.amax())]


def _rows(bounds: LinearBounds, index: Tensor) -> LinearBounds:
    """The rows `index`, (B, R), of bounds (B, classes, ...)."""
    lanes = torch.arange(len(index), device=index.device)[:, None]
    return LinearBounds(bounds.rows[lanes, index], bounds.value.gather(1, index))


def _at_crown(traced: MarginTrace, rows: int, inner: bool) -> dict[int, dict[int, Tensor]]:
    """Shares of 0, which are CROWN's lines: for `rows` of the margins, and those inside."""
    visits = [visit for visit in flattened(traced.visits) if visit.number >= 0]
    free = [visit for visit in visits if cast(Nonlinear, visit.operator).other_lines is not None]

    def zeros(visit: Visit, rows: int) -> Tensor:
        x = visit.x.mid
        return x.new_zeros(len(x), rows, *x.shape[1:]).requires_grad_()

    shares = {MARGINS: {visit.number: zeros(visit, rows) for visit in free}}
    for place in visits if inner else []:
        before = [visit for visit in free if visit.number < place.number]
        shares[place.number] = {visit.number: zeros(visit, 1) for visit in before}
    return shares


def slopes(found: Optimised) -> Slopes:
    """The slopes of the lower lines that a search found, and CROWN's where nothing was searched."""
    visits = {v.number: v for v in flattened(found.traced.visits) if v.number >= 0}
    plain = {n: v.lines[0].lower_slope[:, None] for n, v in visits.items() if v.other is not None}
    values = dict.fromkeys((*visits, MARGINS), plain)
    for place, some in found.shares.items():
        searched = {n: mixed(visits[n], share).lower_slope for n, share in some.items()}
        if place == MARGINS:
            count = found.traced.value.shape[1]
            searched = {n: _spread(s, found.classes, count, plain[n]) for n, s in searched.items()}
        values[place] = plain | searched
    return values


def _spread(slope: Tensor, index: Tensor, count: int, default: Tensor) -> Tensor:
    """Slopes of the classes `index`, (B, R, ...), as those of all classes, (B, count, ...).

    `default`, (B, 1, ...), stands for the others.
    """
    full = default.repeat(1, count, *[1] * (default.dim() - 2))
    lanes = torch.arange(len(index), device=index.device)[:, None]
    return full.index_put((lanes, index), slope)
