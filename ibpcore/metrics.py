"""Accuracy, average certified radius, and their trade-off (eq. 12-13)."""

from __future__ import annotations

import math

from torch import Tensor


def acr(radii: Tensor, epsilon_max: float) -> float:
    """Mean of (N,) certified radii as a fraction of `epsilon_max` (eq. 12)."""
    # A radius stored in float32 may be the float just above epsilon_max.
    return float(radii.double().clamp(max=epsilon_max).mean()) / epsilon_max


def art(accuracy: float, acr: float) -> float:
    """Geometric mean of accuracy and ACR, both fractions (eq. 13)."""
    return math.sqrt(accuracy * acr)


def certified_accuracy(radii: Tensor, epsilon: float) -> float:
    """Fraction of samples whose (N,) certified radius is at least `epsilon` > 0."""
    # In float64: rounding `epsilon` down to float32 would claim too much.
    return float((radii.double() >= epsilon).double().mean())
