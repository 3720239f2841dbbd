"""Intervals of inner layers, narrowed by linear bounds with every rounding error.

Numbers in parentheses are equations of docs/soundness.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.certification.soundness.arithmetic import from_ends, lower_end, upper_end
from ibpcore.certification.soundness.linear import (
    NO_SLOPES,
    Slopes,
    SoundBounds,
    back,
    largest,
    of_samples,
)
from ibpcore.certification.soundness.rules import (
    EndpointRule,
    ProductRule,
    RearrangeRule,
    ReshapeRule,
    ScaleRule,
)
from ibpcore.certification.soundness.visits import Narrow, Visit, taken


def narrowing(slopes: Mapping[int, Slopes], lanes: int) -> Narrow:
    """`narrowed` with the slopes for the rows of each rule's input, by the number of the rule."""

    def narrow(
        path: Sequence[Visit], x: Interval, where: Tensor, number: int | None
    ) -> tuple[Interval, Tensor]:
        chosen = NO_SLOPES if number is None else slopes.get(number, NO_SLOPES)
        return narrowed(path, x, where, chosen, lanes)

    return narrow


def narrowed(
    path: Sequence[Visit], x: Interval, where: Tensor, slopes: Slopes, lanes: int
) -> tuple[Interval, Tensor]:
    """x met with linear bounds on those of its numbers that `where` names; x if there are none.

    Also the middle of these bounds, and of x elsewhere.

    Samples are sorted by how many numbers they name, and rows made of the first ones of each,
    the next ones, and so on, as long as a sample has any.

    Args:
        path: all visits on the way from the box to x, (B, ...).
        where: (B, ...), bool.
        slopes: for all rows, (B, 1, ...).
        lanes: the number of rows that are propagated at once.
    """
    if _is_exact(path):
        return x, x.mid
    counts, order = where.flatten(1).sum(1).sort(descending=True)
    left = counts.tolist()
    if left[0] == 0:
        return x, x.mid
    places = where.flatten(1)[order].to(torch.int8).argsort(dim=1, descending=True, stable=True)
    path, slopes = taken(tuple(path), order), of_samples(slopes, order)
    ends = x.mid.new_full((len(order), 2, places.shape[1]), torch.inf)
    start = 0
    while samples := sum(count > start for count in left):
        some = places[:samples, start : start + max(1, lanes // (2 * samples))]
        first = slice(samples)
        found = _above_and_below(taken(path, first), some, of_samples(slopes, first))
        ends[:samples].scatter_(2, some[:, None].expand_as(found), found)
        start += some.shape[1]
    ends = ends[order.argsort()].unflatten(2, x.shape[1:])
    alone = (ends[:, 0] - ends[:, 1]) / 2
    mid = torch.where(where & alone.isfinite(), alone, x.mid)
    return _met(x, -ends[:, 1], ends[:, 0], where), mid


def _is_exact(path: Sequence[Visit]) -> bool:
    """Whether an interval is already what linear bounds would make of it.

    It is after a single product, since the box or since a rule of whose output only the ends
    are known.
    """
    products = 0
    for visit in reversed(path):
        if isinstance(visit.rule, EndpointRule):
            break
        if not isinstance(visit.rule, ProductRule | ScaleRule | ReshapeRule | RearrangeRule):
            return False
        products += isinstance(visit.rule, ProductRule)
    return products <= 1


def _above_and_below(path: tuple[Visit, ...], places: Tensor, slopes: Slopes) -> Tensor:
    """Upper bounds, (B, 2, R), on z and -z for numbers z of the last output.

    Args:
        places: (B, R), of the numbers in an output.
        slopes: see `narrowed`.
    """
    both, box = torch.cat([places, places], 1), path[0].x
    signs = places.new_tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(places.shape[1])
    value = path[-1].y.mid.flatten(1).gather(1, both) * signs
    path, bounds = _start(path, both, signs[:, None], value)
    return largest(back(path, bounds, slopes), box).unflatten(1, (2, -1))


def _start(
    path: tuple[Visit, ...], places: Tensor, signs: Tensor, value: Tensor
) -> tuple[tuple[Visit, ...], SoundBounds]:
    """Bounds on the numbers at `places`, times signs (R, 1): (22); and the visits before them."""
    last, none = path[-1], torch.zeros_like(value)
    if isinstance(last.rule, ProductRule) and last.rule.pick is not None:
        # A row of zeros and a one times the weight is a part of the weight.
        assert last.errors is not None
        slack = last.errors.flatten(1).gather(1, places)
        shape = torch.Size((places.numel(), *last.x.shape[1:]))
        rows = last.rule.pick(places.flatten(), last.rule.weight, shape)
        rows = rows.unflatten(0, places.shape)
        return path[:-1], SoundBounds(rows * signs.view(-1, *[1] * len(shape[1:])), value, slack)
    rows = none[..., None].repeat(1, 1, last.y.mid[0].numel())
    rows.scatter_(2, places[..., None], signs.expand(*places.shape, 1))
    return path, SoundBounds(rows.unflatten(2, last.y.shape[1:]), value, none)


def _met(x: Interval, lower: Tensor, upper: Tensor, where: Tensor) -> Interval:
    """x met with [lower, upper], (B, ...), `where` that is narrower: (23)."""
    lower, upper = torch.maximum(lower_end(x), lower), torch.minimum(upper_end(x), upper)
    met = from_ends(lower, upper)
    # Comparisons with NaN are false, so x stays as it is. Two intervals that hold the same
    # numbers are never apart.
    better = where & (lower <= upper) & (met.rad < x.rad)
    return Interval(
        mid=torch.where(better, met.mid, x.mid), rad=torch.where(better, met.rad, x.rad)
    )
