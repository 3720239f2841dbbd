"""The standard model of floating-point arithmetic (docs/soundness.md, section 1)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.checks import Clip
from ibpcore.bounds.interval import Interval, outward
from ibpcore.errors import UserError


class Arithmetic(NamedTuple):
    """fl(a op b) = (a op b)(1 + delta) + eta, |delta| <= unit, |eta| <= tiny, below `largest`.

    Attributes:
        unit: the unit roundoff.
        tiny: the smallest normal number, which bounds the error of an underflow even if
            results are flushed to 0.
        largest: the largest finite number.
        constants: the type in which the network stores its numbers.
    """

    unit: float
    tiny: float
    largest: float
    constants: torch.dtype = torch.float32

    def stored(self, number: float) -> float:
        """A number given in Python, such as a slope, as the network stores it."""
        return torch.tensor(number, dtype=self.constants).item()


REALS = Arithmetic(0.0, 0.0, math.inf)
FLOAT32 = Arithmetic(2.0**-24, 2.0**-126, torch.finfo(torch.float32).max)
WORKING = Arithmetic(2.0**-53, 2.0**-1022, torch.finfo(torch.float64).max)
"""float64, the arithmetic of all computations here."""


@cache
def gamma(roundings: int, unit: float) -> float:
    """gamma_n = n u / (1 - n u) of equation (2), rounded up.

    Raises:
        UserError: n u is 1 or more, where the model gives no bound.
    """
    share = roundings * Fraction(unit)
    if share >= 1:
        raise _too_long(roundings)
    return math.nextafter(float(share / (1 - share)), math.inf) if share else 0.0


def _too_long(roundings: int) -> UserError:
    return UserError(f"sums of {roundings} terms are too long for a proof in this arithmetic")


def raised(x: Tensor, roundings: int, underflows: int = 0) -> Tensor:
    """An upper bound on the exact value of `x`, (...) and not negative: equation (3).

    Args:
        roundings: upper bound on the roundings in each term of `x`, a sum of terms >= 0.
        underflows: upper bound on its operations that may have underflowed.

    Raises:
        UserError: underflows * gamma_roundings is above 1, where (3) does not hold.
    """
    factor, rest = raising(roundings, underflows)
    return x * factor + rest


@cache
def raising(roundings: int, underflows: int = 0) -> tuple[float, float]:
    """The factor F and the summand (m + 2) lambda of equation (3), see `raised`."""
    if underflows * gamma(roundings, WORKING.unit) > 1:
        raise _too_long(roundings)
    factor = math.nextafter(1 + gamma(roundings + 2, WORKING.unit), math.inf)
    return factor, (underflows + 2) * WORKING.tiny


def from_ends(lower: Tensor, upper: Tensor) -> Interval:
    """An interval that contains [lower, upper], both (...): equation (4)."""
    mid = lower + (upper - lower) * 0.5
    return Interval(mid=mid, rad=above(torch.maximum(upper - mid, mid - lower)))


def ball(images: Tensor, epsilons: Tensor, clip: Clip) -> Interval:
    """An interval that contains every image within `epsilons` and `clip`: equation (5).

    Args:
        images: (B, ...), float64, in pixel units.
        epsilons: (B,), float64, in pixel units.
    """
    epsilons = epsilons.view(-1, *[1] * (images.dim() - 1))
    lower, upper = below(images - epsilons), above(images + epsilons)
    if clip is not None:
        # Otherwise an image on the edge of the range may lie outside, and the box be empty.
        low, high = outward(clip, torch.float32)
        lower, upper = lower.clamp(min=low), upper.clamp(max=high)
    return from_ends(lower, upper)


def upper_end(x: Interval) -> Tensor:
    """An upper bound on mid + rad, (...)."""
    return above(x.mid + x.rad)


def lower_end(x: Interval) -> Tensor:
    """A lower bound on mid - rad, (...)."""
    return below(x.mid - x.rad)


def above(x: Tensor) -> Tensor:
    """The next larger floats, (...)."""
    return torch.nextafter(x, _infinities(x.dtype, x.device)[1])


def below(x: Tensor) -> Tensor:
    """The next smaller floats, (...)."""
    return torch.nextafter(x, _infinities(x.dtype, x.device)[0])


@cache
def _infinities(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Minus and plus infinity, scalars."""
    with torch.inference_mode(False):  # autograd refuses tensors of that mode, and these remain
        ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype, device=device)
        return ends[0], ends[1]
