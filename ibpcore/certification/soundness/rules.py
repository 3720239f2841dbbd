"""Interval rules for each kind of layer that account for every rounding error.

A rule maps an interval of all possible inputs of a layer to one of all its possible outputs:
in exact arithmetic, or in any execution in the arithmetic of the claim. Rules compute in
float64; where a result is not finite, the radius becomes NaN and stays NaN. Numbers in brackets
are equations of docs/soundness.md.

`back` maps rows of coefficients of the output to rows of coefficients of the input. `slack` is
the error bound of both for each unit of a coefficient, see
`ibpcore.certification.soundness.linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from ibpcore.bounds import relaxations
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import along_channels
from ibpcore.bounds.relaxations import Lines
from ibpcore.certification.soundness.arithmetic import (
    WORKING,
    Arithmetic,
    above,
    below,
    from_ends,
    gamma,
    lower_end,
    raised,
    raising,
    upper_end,
)

DUST = 2.0**-40
"""Of a number of this relative size it does not matter on which side of a kink it is."""


@dataclass(frozen=True, eq=False)
class ProductRule:
    """y = W x + b as sums of products in any order: linear layers, convolutions, averages.

    Attributes:
        weight: (..., terms), float64, the second argument of `multiply`.
        bias: float64, broadcastable to the outputs.
        multiply: maps an input (N, ...) and a weight to W x (N, ...), by matrix products.
        transpose: maps rows of coefficients of the output (N, ...), a weight and the shape of
            an input (N, ...) to coefficients of that input.
        pick: maps places (N,) in an output, a weight and the shape of an input (N, ...) to the
            coefficients of these numbers, exactly; None where that takes a sum.
        uses: the largest number of outputs that an input contributes to.
        patches: numbers that `multiply` allocates for each number of its input.
        arithmetic: the arithmetic of the claim.
    """

    weight: Tensor
    bias: Tensor
    multiply: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, Tensor, torch.Size], Tensor]
    pick: Callable[[Tensor, Tensor, torch.Size], Tensor] | None
    uses: int
    patches: int
    arithmetic: Arithmetic

    @property
    def terms(self) -> int:
        return self.weight.shape[-1]

    @cached_property
    def weight_abs(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def largest_sum(self) -> Tensor:
        """The largest sum of |w| over the terms of an output, a scalar."""
        return self.weight_abs.sum(-1).amax()

    @cached_property
    def constant(self) -> Tensor:
        """The terms of (7) and (8) that do not depend on x, raised by (3), in the shape of `bias`.

        Underflow errors of the spread, at most 4 lambda, are multiplied by |W|.
        """
        factor, rest = self._raising
        underflow = (self.terms + 2) * self.arithmetic.tiny + 4.0 * WORKING.tiny * self.largest_sum
        return raised(self._gammas()[1] * self.bias.abs() * factor + rest + underflow, 8)

    @cached_property
    def limit(self) -> Tensor:
        """The |x| from which on a sum of the execution may overflow, a scalar: (9)."""
        most = self.arithmetic.largest / (4 * (1 + self._gammas()[0])) - self.bias.abs().amax()
        return (most / self.largest_sum).nan_to_num(nan=-torch.inf, posinf=torch.inf)

    @property
    def _raising(self) -> tuple[float, float]:
        """What raises a sum of `terms` products with spreads, see `raising`."""
        return raising(self.terms + 8, 2 * self.terms + 8)

    def middle(self, x: Interval) -> Tensor:
        """The output at the middle of x, in the shape of the output."""
        return self.multiply(x.mid, self.weight) + self.bias  # (6)

    def __call__(self, x: Interval) -> Interval:
        mid = self.middle(x)
        # 0 times a number that is not finite is NaN, which no later maximum removes.
        rad = torch.add(self._through(x.rad + self._spread(x)), mid, alpha=0.0)  # (8)
        return Interval(mid=mid, rad=rad)

    def errors(self, x: Interval) -> Tensor:
        """Bounds on |execution - (computed middle + W (x - mid))|, of the output's shape: (7)."""
        return self._through(self._spread(x))

    def back(self, rows: Tensor, x: Interval) -> Tensor:
        return self.transpose(rows, self.weight, torch.Size((len(rows), *x.shape[1:])))

    def slack(self, x: Interval, y: Interval) -> Tensor:
        return torch.add(self.errors(x), y.rad, alpha=gamma(self.uses + 4, WORKING.unit))  # (14)

    def _gammas(self) -> tuple[float, float]:
        """gamma of the execution, and the sum of it and that of the computed middle."""
        theirs = gamma(self.terms + 1, self.arithmetic.unit)
        return theirs, theirs + gamma(self.terms + 1, WORKING.unit)

    def _spread(self, x: Interval) -> Tensor:
        """s of (7); infinite where a sum with x may overflow."""
        theirs, both = self._gammas()
        size = x.mid.abs()
        return _unlimited(torch.add(theirs * x.rad, size, alpha=both), size, x, self)

    def _through(self, spread: Tensor) -> Tensor:
        """|W| spread plus the terms that do not depend on x."""
        total = self.multiply(spread, self.weight_abs)
        return torch.add(self.constant, total, alpha=self._raising[0])


@dataclass(frozen=True, eq=False)
class ScaleRule:
    """y = scale x + shift, elementwise, by any of the usual formulas: (10).

    Attributes: each tensor is float64 and of a shape that `along_channels` takes.
        scale, shift: with relative errors of a few roundings.
        shift_size: |scale| |mean| + |bias|, the terms of the shift.
        mean_size: |mean|.
        reach: an upper bound on all products of the factors of scale, weight and 1 / deviation.
        arithmetic: the arithmetic of the claim.

    The terms of (10) are added up channel by channel once, to what |mid| + rad is multiplied by
    and a summand. These are raised by (3) for the roundings of all that is computed with them.
    """

    scale: Tensor
    shift: Tensor
    shift_size: Tensor
    mean_size: Tensor
    reach: Tensor
    arithmetic: Arithmetic

    @cached_property
    def scale_size(self) -> Tensor:
        """|scale|, raised."""
        return raised(self.scale.abs(), 8)

    @cached_property
    def error_slope(self) -> Tensor:
        """The errors for each unit of |mid| + rad."""
        both, tiny = self._both_and_tiny()
        return raised(both * self.scale.abs() + tiny * self.reach, 16, 2)

    @cached_property
    def error_constant(self) -> Tensor:
        """The errors at 0."""
        both, tiny = self._both_and_tiny()
        span = self.reach * (self.mean_size + 1.0)
        return raised(both * self.shift_size + tiny * span, 16, 8)

    @cached_property
    def limit(self) -> Tensor:
        """The |x| from which on an execution may overflow, see (10)."""
        most = (self.arithmetic.largest / 4 - self.shift_size) / self.reach - self.mean_size - 1.0
        return most.nan_to_num(nan=-torch.inf, posinf=torch.inf)

    def _both_and_tiny(self) -> tuple[float, float]:
        both = gamma(12, self.arithmetic.unit) + gamma(12, WORKING.unit)
        return both, 16 * (self.arithmetic.tiny + WORKING.tiny)

    def __call__(self, x: Interval) -> Interval:
        sizes = (self.scale, self.shift, self.scale_size)
        scale, shift, size = (along_channels(v, x.mid) for v in sizes)
        mid = torch.addcmul(shift, x.mid, scale)
        rad = torch.addcmul(self.errors(x), size, x.rad)
        return Interval(mid=mid, rad=torch.add(rad, mid, alpha=0.0))

    def errors(self, x: Interval) -> Tensor:
        """See `ProductRule.errors`."""
        sizes = (self.error_slope, self.error_constant)
        slope, constant = (along_channels(v, x.mid) for v in sizes)
        size = x.mid.abs()
        return _unlimited(torch.addcmul(constant, slope, size + x.rad), size, x, self)

    def back(self, rows: Tensor, x: Interval) -> Tensor:
        return rows * along_channels(self.scale, rows)

    def slack(self, x: Interval, y: Interval) -> Tensor:
        return torch.add(self.errors(x), y.rad, alpha=gamma(12, WORKING.unit))  # (14)


def _unlimited(errors: Tensor, size: Tensor, x: Interval, rule: ProductRule | ScaleRule) -> Tensor:
    """`errors`, (B, ...), but infinite where an execution of `rule` on x may overflow.

    `size` is |mid|. The result is `errors` itself, changed in place.
    """
    if rule.arithmetic.largest >= WORKING.largest:
        return errors  # the float64 result would overflow too
    limit = along_channels(rule.limit, x.mid) if rule.limit.dim() > 0 else rule.limit
    return errors.masked_fill_(size + x.rad >= limit, torch.inf)


@dataclass(frozen=True)
class ReluRule:
    """max(x, 0), which is exact in every arithmetic: (11)."""

    def __call__(self, x: Interval) -> Interval:
        upper = upper_end(x).clamp_(min=0)
        half = upper * 0.5
        active = x.mid >= x.rad
        # Not just `half`: half of a subnormal number may be rounded.
        rest = torch.maximum(half, upper - half)
        return Interval(mid=torch.where(active, x.mid, half), rad=torch.where(active, x.rad, rest))

    def bends(self, x: Interval) -> Tensor:
        """Where it is no line over x, (B, ...)."""
        return _crosses(x, 0.0)

    def preferred(self, mid: Tensor) -> Tensor:
        """The slope of the lower line by the middle of an interval, (B, ...): (B, 1, ...)."""
        return (mid > 0.0).to(mid)[:, None]

    def lines(self, x: Interval, y: Interval, slope: Tensor | None = None) -> RuleLines:
        """See `RuleLines`; (15).

        Args:
            slope: (B, 1 or R, ...), of the lower line where it bends, moved into [0, 1]; None
                for the identity or 0, whichever leaves less area.
        """
        x, y = _as_row(x), _as_row(y)
        active, dead = x.mid >= x.rad, y.mid + y.rad == 0.0
        # Any slope is valid, however it is rounded: the gaps below are computed for it.
        lower = (active | (x.mid > 0.0)).to(x.mid)
        if slope is not None:
            lower = torch.where(self.bends(x), slope.clamp(0, 1), lower)
        # 1 for active neurons, 0 for dead ones; over [0, 0] there is no quotient.
        share = (x.mid / x.rad).nan_to_num_(nan=1.0).clamp_(-1, 1)
        upper, exact = (share + 1.0) * 0.5, active | dead
        rise = upper * x.rad
        below = y.mid - lower * x.mid
        above = torch.maximum(rise - y.mid, x.mid + x.rad - y.mid - rise)
        allowance = gamma(8, WORKING.unit) * (x.mid.abs() + x.rad + y.mid) + WORKING.tiny
        gaps = [
            gap.clamp_(min=0).add_(allowance).masked_fill_(exact, 0.0) for gap in (below, above)
        ]
        return RuleLines(lower, upper, *gaps)


class RuleLines(NamedTuple):
    """Lines below and above y = f(x) over an interval, relative to the midpoints.

    With dx = x - mid, and dy = y - mid for the interval that the rule returns,
    lower_slope * dx - lower_gap <= dy <= upper_slope * dx + upper_gap.

    Attributes: each (B, 1 or R, ...), for all R rows or one for each, with (B, ...) the shape of
        `mid`; the gaps are not negative.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    lower_gap: Tensor
    upper_gap: Tensor


def _as_row(x: Interval) -> Interval:
    """x, (B, ...), for all rows: (B, 1, ...)."""
    return Interval(mid=x.mid[:, None], rad=x.rad[:, None])


@dataclass(frozen=True, eq=False)
class ClampRule:
    """min(max(x, low), high), which is exact in every arithmetic.

    Attributes:
        low, high: numbers, or float64 for each channel, (channels,).
    """

    low: Tensor | float
    high: Tensor | float

    def __call__(self, x: Interval) -> Interval:
        low, high = self._limits(x)
        y = from_ends(*(end.clamp(min=low).clamp(max=high) for end in _ends(x)))
        return Interval(mid=y.mid, rad=y.rad + 0 * x.rad)  # it must not hide an overflow

    def bends(self, x: Interval) -> Tensor:
        """Where it is no line over x, (B, ...)."""
        low, high = self._limits(x)
        return _crosses(x, low) | _crosses(x, high)

    def preferred(self, mid: Tensor) -> None:
        """There are more than two lower lines."""

    def lines(self, x: Interval, y: Interval, slope: Tensor | None = None) -> RuleLines:
        """See `RuleLines`, and `ReluRule.lines` for `slope`, which may be any number here."""
        low, high = self._limits(x)
        slopes = _chosen(relaxations.clamp(x, low, high), slope, self.bends(x))
        kinks = [(kink, kink.clamp(min=low).clamp(max=high)) for kink in _points(x, low, high)]
        return _fitted(x, y, *slopes, kinks)

    def _limits(self, x: Interval) -> tuple[Tensor | float, ...]:
        limits = (self.low, self.high)
        return tuple(v if isinstance(v, float) else along_channels(v, x.mid) for v in limits)


@dataclass(frozen=True, eq=False)
class PReluRule:
    """max(x, 0) + slope * min(x, 0), with one rounding below 0: (19).

    Attributes:
        slope: float64, (channels,) or a single number, of any sign.
        arithmetic: the arithmetic of the claim.
    """

    slope: Tensor
    arithmetic: Arithmetic

    def __call__(self, x: Interval) -> Interval:
        values = torch.stack([value for _, value in self._values(x)])
        errors = self._errors(x)
        return from_ends(below(values.amin(0) - errors), above(values.amax(0) + errors))

    def bends(self, x: Interval) -> Tensor:
        """Where it is no line over x, (B, ...)."""
        return _crosses(x, 0.0)

    def preferred(self, mid: Tensor) -> Tensor | None:
        """As of `ReluRule`, for a leaky ReLU, whose slope is a number; otherwise None."""
        if self.slope.dim() > 0 or not 0 <= self.slope <= 1:
            return None
        return torch.where(mid > 0, 1, self.slope)[:, None]

    def lines(self, x: Interval, y: Interval, slope: Tensor | None = None) -> RuleLines:
        """See `RuleLines`, and `ReluRule.lines` for `slope`, which may be any number here."""
        slopes = _chosen(relaxations.prelu(x, self._slope(x)), slope, self.bends(x))
        lines, errors = _fitted(x, y, *slopes, self._values(x)), self._errors(x)[:, None]
        lower, upper = (raised(gap + errors, 1) for gap in lines[2:])
        return lines._replace(lower_gap=lower, upper_gap=upper)

    def _slope(self, x: Interval) -> Tensor:
        return self.slope if self.slope.numel() == 1 else along_channels(self.slope, x.mid)

    def _values(self, x: Interval) -> list[tuple[Tensor, Tensor]]:
        """The ends and 0 if it lies between, each with the value there."""
        slope = self._slope(x)
        return [(at, at.clamp(min=0) + slope * at.clamp(max=0)) for at in _points(x, 0.0)]

    def _errors(self, x: Interval) -> Tensor:
        """Bounds on the error of an execution and of `_values` together."""
        both = gamma(4, self.arithmetic.unit) + gamma(4, WORKING.unit)
        size = self._slope(x).abs() * lower_end(x).clamp(max=0).abs()
        total = raised(both * size, 4, 2) + 4 * (self.arithmetic.tiny + WORKING.tiny)
        return torch.where(4 * size < self.arithmetic.largest, total, torch.inf)


def _ends(x: Interval) -> tuple[Tensor, Tensor]:
    return lower_end(x), upper_end(x)


def _points(x: Interval, *kinks: Tensor | float) -> list[Tensor]:
    """Both ends of x, moved outward, and the numbers between them that are closest to `kinks`."""
    start, end = _ends(x)
    return [start, end, *(torch.maximum(end.clamp(max=kink), start) for kink in kinks)]


def _crosses(x: Interval, kink: Tensor | float) -> Tensor:
    """Where x, (B, ...), holds numbers on both sides of `kink`, by more than rounding explains."""
    dust = DUST * (x.mid.abs() + x.rad)
    return (x.mid - x.rad + dust < kink) & (x.mid + x.rad - dust > kink)


def _chosen(lines: Lines, slope: Tensor | None, bends: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes below and above, (B, 1 or R, ...), with `slope` below where a function bends."""
    lower, upper = lines.lower_slope[:, None], lines.upper_slope[:, None]
    return lower if slope is None else torch.where(bends[:, None], slope, lower), upper


def _fitted(
    x: Interval,
    y: Interval,
    lower: Tensor,
    upper: Tensor,
    values: Sequence[tuple[Tensor, Tensor]],
) -> RuleLines:
    """Lines of any slopes with gaps that fit a piecewise linear function: (15).

    Args:
        lower, upper: slopes, (B, 1 or R, ...).
        values: pairs of points and the values there: both ends of x, and all kinks between.
    """
    x, y = _as_row(x), _as_row(y)
    rises = [(value[:, None] - y.mid, at[:, None] - x.mid) for at, value in values]
    lower_gap = torch.stack([lower * dx - dy for dy, dx in rises]).amax(0)
    upper_gap = torch.stack([dy - upper * dx for dy, dx in rises]).amax(0)
    reach = torch.maximum(lower.abs(), upper.abs()) * (x.mid.abs() + x.rad)
    size = torch.stack([value.abs() for _, value in values]).amax(0)[:, None]
    size = size + y.mid.abs() + 2 * reach
    allowance = gamma(8, WORKING.unit) * size + 8 * WORKING.tiny
    gaps = (gap.clamp(min=0) + allowance for gap in (lower_gap, upper_gap))
    return RuleLines(lower, upper, *gaps)


@dataclass(frozen=True)
class EndpointRule:
    """A function that increases, or does so after `least`, bounded by its values there: (16).

    Such as max pooling, leaky ReLU and hard swish.

    Attributes:
        function: maps (B, ...), float64, to (B, ...).
        roundings: the largest number of roundings in one output.
        arithmetic: the arithmetic of the claim.
        least: where a function of each number is least; -inf for one that only increases.
    """

    function: Callable[[Tensor], Tensor]
    roundings: int
    arithmetic: Arithmetic
    least: float = -math.inf

    def __call__(self, x: Interval) -> Interval:
        lower, upper = self.function(lower_end(x)), self.function(upper_end(x))
        if self.least > -math.inf:
            turn = self.function(_points(x, self.least)[-1])
            lower, upper = turn, torch.maximum(lower, upper)
        if self.roundings:
            lower, upper = lower - self._allowance(lower), upper + self._allowance(upper)
        return from_ends(lower, upper)

    def bends(self, x: Interval) -> Tensor:
        """Where x, (B, ...), is more than a point: each end counts."""
        return x.rad > 0

    def _allowance(self, end: Tensor) -> Tensor:
        units = (self.arithmetic.unit, WORKING.unit)
        both = sum(gamma(self.roundings + 4, unit) for unit in units)
        safe = 4 * end.abs() < self.arithmetic.largest
        tiny = 4 * (self.arithmetic.tiny + WORKING.tiny)
        return torch.where(safe, both * end.abs() + tiny, torch.inf)


@dataclass(frozen=True)
class ReshapeRule:
    """A change of shape."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Interval) -> Interval:
        return x.apply(self.function)

    def back(self, rows: Tensor, x: Interval) -> Tensor:
        return rows.reshape(len(rows), *x.shape[1:])


@dataclass(frozen=True)
class RearrangeRule:
    """Permutation, selection and padding by zeros: no number is copied twice or computed."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Interval) -> Interval:
        return x.apply(self.function)

    def back(self, rows: Tensor, x: Interval) -> Tensor:
        back = torch.func.vjp(self.function, rows.new_zeros(len(rows), *x.shape[1:]))[1]
        return cast(Tensor, back(rows)[0])


@dataclass(frozen=True, eq=False)
class SumRule:
    """The sum of two branches with the same input: (13)."""

    branch: tuple[Rule, ...]
    shortcut: tuple[Rule, ...]
    arithmetic: Arithmetic

    @property
    def branches(self) -> tuple[tuple[Rule, ...], ...]:
        return self.branch, self.shortcut

    def of(self, a: Interval, b: Interval) -> Interval:
        mid = a.mid + b.mid
        return Interval(mid=mid, rad=raised(a.rad + b.rad + self.errors(a, b), 6, 4) + 0 * mid)

    def errors(self, a: Interval, b: Interval) -> Tensor:
        """Bounds on |execution - (computed middle + (a - mid) + (b - mid))|."""
        size = a.mid.abs() + a.rad + b.mid.abs() + b.rad
        both = gamma(4, self.arithmetic.unit) + gamma(4, WORKING.unit)
        safe = 4 * size < self.arithmetic.largest
        return torch.where(safe, both * size + 4 * self.arithmetic.tiny, torch.inf)


@dataclass(frozen=True, eq=False)
class FactorsRule:
    """The product of two branches with the same input: (20)."""

    first: tuple[Rule, ...]
    second: tuple[Rule, ...]
    arithmetic: Arithmetic

    @property
    def branches(self) -> tuple[tuple[Rule, ...], ...]:
        return self.first, self.second

    def of(self, a: Interval, b: Interval) -> Interval:
        ends = [(lower_end(x), upper_end(x)) for x in (a, b)]
        corners = torch.stack([x * y for x in ends[0] for y in ends[1]])
        lower, upper = corners.amin(0), corners.amax(0)
        errors = self._errors(torch.maximum(lower.abs(), upper.abs()))
        # Infinite errors or NaN on either side make the interval infinite or NaN.
        return from_ends(below(lower - errors), above(upper + errors))

    def _errors(self, size: Tensor) -> Tensor:
        """Bounds on the errors of the execution and of products here, at most `size` each."""
        both = gamma(4, self.arithmetic.unit) + gamma(4, WORKING.unit)
        safe = 4 * size < self.arithmetic.largest
        tiny = 4 * (self.arithmetic.tiny + WORKING.tiny)
        return torch.where(safe, raised(both * size + tiny, 4, 2), torch.inf)

    def planes(self, a: Interval, b: Interval, y: Interval) -> tuple[RuleLines, RuleLines]:
        """Planes below and above the product, as the lines of each factor: (21).

        All gaps stand with the first.
        """
        # Any slopes are valid, however they are rounded: the gaps below are computed for them.
        slopes = [(part.lower_slope, part.upper_slope) for part in relaxations.product(a, b)]
        (low, high), (flat, steep) = [[torch.nan_to_num(s) for s in pair] for pair in slopes]
        size = (a.mid.abs() + a.rad) * (b.mid.abs() + b.rad) + y.mid.abs()
        spans = (torch.maximum(low.abs(), high.abs()), torch.maximum(flat.abs(), steep.abs()))
        size = size + spans[0] * a.rad + spans[1] * b.rad
        under = over = torch.full_like(size, -torch.inf)
        for dx in (-a.rad, a.rad):
            for dy in (-b.rad, b.rad):
                dz = (a.mid + dx) * (b.mid + dy) - y.mid
                under = torch.maximum(under, low * dx + flat * dy - dz)
                over = torch.maximum(over, dz - high * dx - steep * dy)
        errors = self._errors(size) + gamma(16, WORKING.unit) * size + 16 * WORKING.tiny
        gaps = (raised(gap.clamp(min=0) + errors, 4, 4) for gap in (under, over))
        none = torch.zeros_like(size)
        planes = (low, high, *gaps), (flat, steep, none, none)
        first, second = (RuleLines(*(part[:, None] for part in plane)) for plane in planes)
        return first, second


@dataclass(frozen=True, eq=False)
class ConcatenationRule:
    """The concatenated outputs of branches with the same input: nothing is computed.

    Attributes:
        branches: the rules of each branch, in order.
        dim: the dimension of the concatenation.
    """

    branches: tuple[tuple[Rule, ...], ...]
    dim: int

    def of(self, *parts: Interval) -> Interval:
        mids, rads = [part.mid for part in parts], [part.rad for part in parts]
        return Interval(mid=torch.cat(mids, self.dim), rad=torch.cat(rads, self.dim))


ForkRule: TypeAlias = SumRule | FactorsRule | ConcatenationRule
RelaxedRule: TypeAlias = ReluRule | ClampRule | PReluRule
"""Rules with linear relaxations."""
NonlinearRule: TypeAlias = RelaxedRule | EndpointRule
"""Rules of which linear bounds need the interval of their input."""
Rule: TypeAlias = (
    ProductRule | ScaleRule | RelaxedRule | EndpointRule | ReshapeRule | RearrangeRule | ForkRule
)
