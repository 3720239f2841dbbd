"""Accuracy, average certified radius, their trade-off (eq. 12-13) and Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

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


Point = tuple[float, float]
"""(ACR, accuracy), fractions."""


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other equals or beats in both; ACR rises, accuracy falls."""
    front: list[Point] = []
    for acr, accuracy in sorted(set(points), reverse=True):
        if not front or accuracy > front[-1][1]:
            front.append((acr, accuracy))
    return front[::-1]


def hypervolume(points: Iterable[Point]) -> float:
    """Area of what the points dominate above (0, 0), in [0, 1]."""
    area, before = 0.0, 0.0
    for acr, accuracy in pareto_front(points):
        area += (acr - before) * accuracy
        before = acr
    return area


def accuracy_at(points: Iterable[Point], acr: float) -> float | None:
    """Accuracy at `acr`, linear between the points of the front; None beyond its ends."""
    front = pareto_front(points)
    for point in front:
        if point[0] == acr:
            return point[1]
    for (low, left), (high, right) in pairwise(front):
        if low < acr < high:
            return left + (right - left) * (acr - low) / (high - low)
    return None


def common_levels(fronts: Sequence[Sequence[Point]], count: int = 3) -> list[float]:
    """ACRs, evenly spread over what all fronts span; none where they have nothing in common."""
    spans = [(front[0][0], front[-1][0]) for front in fronts if len(front) > 1]
    low, high = max((a for a, _ in spans), default=0.0), min((b for _, b in spans), default=0.0)
    if len(spans) < 2 or low >= high:
        return []
    return [low + (high - low) * step / (count - 1) for step in range(count)]
