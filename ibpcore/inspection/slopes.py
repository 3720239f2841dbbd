"""The slope of R_cert at the certified radius, which Theorem 3.4 requires to be non-zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.certification.radii import certified_radii
from ibpcore.inspection.continuity import share
from ibpcore.inspection.subject import Subject

WIDTH = 2.0**-20
"""Width of the difference quotient, as a fraction of epsilon_max: far above rounding in float64,
and so small that it rarely contains a kink of R."""
FLAT = 1e-6
"""Slopes below this fraction of the secant count as 0."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Slopes(NamedTuple):
    """Slopes of R at the certified radii strictly between 0 and epsilon_max, each (n,), float64.

    Attributes:
        radius: in pixel units.
        slope: dR / d epsilon by central difference, per pixel unit.
        secant: (R(radius) - R(0)) / radius, the slope of the chord. A solver that starts
            from a straight line relies on it. Its quality is secant / slope: 1 if R is
            straight from 0 to the root, less if R becomes steeper, more if the edge of
            the pixel range flattens it.
        kink: |right - left difference quotient| / slope: 0 where R is differentiable, as
            Theorem 3.4 assumes. For ReLU networks R is piecewise linear, with kinks.
    """

    radius: Tensor
    slope: Tensor
    secant: Tensor
    kink: Tensor

    @property
    def zero(self) -> Tensor:
        """(n,) whether the slope is 0, so that the theorem does not apply."""
        return self.slope <= FLAT * self.secant

    def summary(self) -> dict[str, Any]:
        """Counts and quantiles."""
        summary: dict[str, Any] = {"samples": len(self.slope), "zero": int(self.zero.sum())}
        if len(self.slope) == 0:
            return summary
        return summary | {
            "smallest": float(self.slope.min()),
            "quantiles": quantiles(self.slope),
            "largest": float(self.slope.max()),
            "secant_to_slope": quantiles(share(self.secant, self.slope)),
            "kinks": int((self.kink > 1e-3).sum()),
        }


def quantiles(values: Tensor) -> dict[str, float]:
    """`QUANTILES` of (n,) values, n > 0, with keys such as "0.05"."""
    at = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
    found = values.quantile(at, interpolation="linear").tolist()
    return {f"{q:g}": value for q, value in zip(QUANTILES, found, strict=True)}


@torch.no_grad()
def slopes_at_radii(exact: Subject, epsilon_max: float) -> Slopes:
    """The `Slopes` of `exact`, a subject in float64."""
    elide, clip = exact.bounds.elide, exact.bounds.clip
    found = certified_radii(
        *exact.problem, epsilon_max, xtol=1e-12, rtol=1e-12, elide=elide, clip=clip
    )
    between = ((found.radius > 0) & (found.radius < epsilon_max)).nonzero()[:, 0]
    inner, radius = exact.at(between), found.radius[between]
    if len(radius) == 0:
        return Slopes(radius, radius, radius, radius)
    width = (radius / 2).clamp(max=WIDTH * epsilon_max)
    left, middle, right = inner.margins(torch.stack([radius - width, radius, radius + width]))
    slope = (right - left) / (2 * width)
    secant = (middle - inner.at_zero()) / radius
    kink = share(((right - middle) - (middle - left)).abs() / width, slope)
    return Slopes(radius, slope, secant, kink)
