"""CROWN: linear bounds from the margins and from every unstable neuron back to the input.

CROWN-IBP bounds the inputs of activations by interval arithmetic. Here each of them that decides
on a relaxation is bounded by rows of its own (Zhang et al. 2018), layer by layer, and the smaller
interval is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ibpcore.bounds.chunking import LIVE_ROWS, default_budget, kept_numbers
from ibpcore.bounds.crown_ibp import MarginTrace, trace_margins
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.linear import LinearBounds, Shares, components, maximum, widest
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    Nonlinear,
    NonnegativeLinear,
    Operator,
)
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.visits import Path
from ibpcore.precision import without_autocast


@without_autocast
def box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """The smaller of CROWN's and IBP's bounds on f_i - f_y over boxes; see `OverBoxes`.

    Both use CROWN's bounds of the inner layers.
    """
    traced = trace_crown(network, box, labels, options)
    return traced.smaller(maximum((traced.visits,), traced.differences(), box))


@without_autocast
def robust_logits(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """CROWN's bounds on f_i - f_y over balls, (B, classes); see `OverBalls`.

    They are differentiable, with the slopes of the lower lines fixed.
    """
    ball = Interval.ball(images, epsilons, options.clip, check=False)
    traced = trace_crown(network, ball, labels, options)
    return maximum((traced.visits,), traced.differences(), ball)


def trace_crown(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    shares: Mapping[int, Shares] | None = None,
) -> MarginTrace:
    """`trace_margins` of boxes (B, C, H, W), with CROWN's bounds of the inner layers.

    Args:
        shares: for the rows of each nonlinear operator's input, by its number.
    """
    budget = default_budget(box.mid.device) if options.budget is None else options.budget
    refine = partial(_refined, box=box, budget=budget, shares=shares or {})
    return trace_margins(network, box, labels, options, refine)


def _refined(
    operator: Operator,
    number: int,
    x: Interval,
    path: Path,
    box: Interval,
    budget: int,
    shares: Mapping[int, Shares],
) -> tuple[Interval, Interval]:
    """`x`, (B, ...), the input of a nonlinear operator, with its loose components refined; and with
    these components as linear bounds alone have them.

    The latter choose the lower lines. Then a smaller interval never makes a line worse, and no
    bound is looser than those of CROWN without interval arithmetic.
    """
    if _is_exact(path):
        return x, x
    loose = loosely_bounded(operator, x).flatten(1)
    # The host has to wait for this number, which is the size of all that follows.
    most = int(loose.sum(1).amax())
    if most == 0:
        return x, x
    # Other components fill up the rows of samples with fewer loose ones. They stay as they are, so
    # that bounds do not depend on the batch.
    index = loose.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    room = budget // box.mid.element_size() - sum(kept_numbers(visits) for visits in path)
    size = room // (LIVE_ROWS * _width(path, x, index) * len(index))
    chosen = shares.get(number, {})
    parts = [_ends(path, x, part, box, chosen) for part in index.split(max(1, size), 1)]
    lower, upper = (torch.cat(ends, 1) for ends in zip(*parts, strict=True))
    own = Interval(mid=x.mid.flatten(1).gather(1, index), rad=x.rad.flatten(1).gather(1, index))
    alone = loose.gather(1, index) & lower.isfinite() & upper.isfinite()
    lower, upper = torch.where(alone, lower, own.lower), torch.where(alone, upper, own.upper)
    met = torch.maximum(own.lower, lower), torch.minimum(own.upper, upper)
    return _replaced(x, index, alone, *met), _replaced(x, index, alone, lower, upper)


def loosely_bounded(operator: Operator, x: Interval) -> Tensor:
    """Which components of `x`, (B, ...), make the bounds of `operator` inexact; bool."""
    if not isinstance(operator, Nonlinear) or operator.lines is None:
        return x.rad > 0
    lines, y = operator.lines(x), operator(x)
    gaps = lines.lower_gap if lines.upper_gap is None else lines.lower_gap + lines.upper_gap
    # Fitted lines may miss a linear function by some roundings.
    size = x.mid.abs() + x.rad + y.mid.abs() + y.rad
    return gaps > 16 * torch.finfo(gaps.dtype).eps * size


def _is_exact(path: Path) -> bool:
    """Whether interval arithmetic is exact: at most one operator sums, no other does more than
    scale or move numbers."""
    sums = 0
    for visit in (visit for part in path for visit in part):
        sums += isinstance(visit.operator, Affine)
        moves = isinstance(visit.operator, NonnegativeLinear) and (
            visit.x.mid.numel() == visit.y.mid.numel()
        )
        if not (moves or isinstance(visit.operator, Affine | ChannelAffine)):
            return False
    return sums <= 1


def _width(path: Path, x: Interval, index: Tensor) -> int:
    """Numbers in the largest row on the way from the components `index`, (B, R), of `x`."""
    path, start = components(path, x, index[:, :0])
    return max(start.rows.shape[2:].numel(), widest(path, start.windows))


def _ends(
    path: Path, x: Interval, index: Tensor, box: Interval, shares: Shares
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds, (B, R), on the components `index` of `x`."""
    path, (rows, value, windows) = components(path, x, index)
    # Side by side, so that both have the same window.
    rows, value = (torch.stack([part, -part], 2).flatten(1, 2) for part in (rows, value))
    found = maximum(path, LinearBounds(rows, value, windows), box, shares)
    # An overflow of either sign bounds nothing.
    upper, under = torch.where(found.isfinite(), found, torch.inf).unflatten(1, (-1, 2)).unbind(2)
    return -under, upper


def _replaced(x: Interval, index: Tensor, where: Tensor, lower: Tensor, upper: Tensor) -> Interval:
    """`x`, (B, ...), whose components `index`, (B, R), are [lower, upper] `where` that is set."""
    mid, rad = x.mid.flatten(1), x.rad.flatten(1)
    # Rounding may put ends that nearly meet in the wrong order.
    half = (upper - lower) / 2
    mid = mid.scatter(1, index, torch.where(where, lower + half, mid.gather(1, index)))
    rad = rad.scatter(1, index, torch.where(where, half.abs(), rad.gather(1, index)))
    return Interval(mid=mid.view_as(x.mid), rad=rad.view_as(x.rad))
