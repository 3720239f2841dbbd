"""Accuracy against ACR: Pareto fronts, and numbers that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

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
