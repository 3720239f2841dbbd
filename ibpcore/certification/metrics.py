"""Measures of certified radii: accuracies, ACR, ART (eq. 12-13), and fronts of their trade-off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor


def acr(radii: Tensor, epsilon_max: float) -> float:
    """Average certified radius: the mean of (N,) radii as a fraction of `epsilon_max` (eq. 12)."""
    # A radius stored in float32 may be the float just above epsilon_max.
    return float(radii.double().clamp(max=epsilon_max).mean()) / epsilon_max


def art(accuracy: float, acr: float) -> float:
    """Geometric mean of accuracy and ACR, both fractions (eq. 13): one number to rank models by."""
    return math.sqrt(accuracy * acr)


def near_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy, a fraction, is hardly above that of guessing one of the classes.

    At most twice that, and at most a tenth of the way from there to 1, which decides where there
    are few classes.
    """
    chance = 1 / classes
    return accuracy <= min(2 * chance, chance + (1 - chance) / 10)


def certified_accuracy(radii: Tensor, epsilon: float) -> float:
    """Fraction of samples whose (N,) certified radius is at least `epsilon` > 0."""
    # In float64: rounding `epsilon` down to float32 would claim too much.
    return float((radii.double() >= epsilon).double().mean())


def accuracy_curve(radii: Tensor, epsilon_max: float) -> tuple[list[float], list[float]]:
    """Certified accuracy against the radius, a step function with the ACR as its area.

    Args:
        radii: (N,) certified radii of all samples, in pixel units.
        epsilon_max: the limit that they were found under.

    Returns:
        the ends of the steps, from 0 to `epsilon_max`, each once, ascending; and the accuracy
        up to and including each end, in percent.
    """
    # A radius stored in float32 may be the float just above epsilon_max.
    positive = radii.double().clamp(max=epsilon_max)[radii > 0]
    steps, counts = positive.unique(return_counts=True)
    reaching = counts.flip(0).cumsum(0).flip(0).tolist()
    ends = [0.0, *steps.tolist()]
    accuracies = [100 * count / len(radii) for count in (len(positive), *reaching)]
    if ends[-1] < epsilon_max:
        ends, accuracies = [*ends, epsilon_max], [*accuracies, 0.0]
    return ends, accuracies


Point = tuple[float, float]
"""(ACR, accuracy) of a model, fractions."""


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one equals or beats in both, by rising ACR and falling accuracy."""
    front: list[Point] = []
    for acr, accuracy in sorted(set(points), reverse=True):
        if not front or accuracy > front[-1][1]:
            front.append((acr, accuracy))
    return front[::-1]


def hypervolume(points: Iterable[Point]) -> float:
    """Area between (0, 0) and the Pareto front, in [0, 1]: a method's worth at all trade-offs."""
    area, before = 0.0, 0.0
    for acr, accuracy in pareto_front(points):
        area += (acr - before) * accuracy
        before = acr
    return area


def accuracy_at(points: Iterable[Point], acr: float) -> float | None:
    """Accuracy at `acr`, interpolated linearly on the Pareto front; None beyond its ends.

    It compares methods at the same ACR.
    """
    front = pareto_front(points)
    if acr in (exact := dict(front)):
        return exact[acr]
    for (low, left), (high, right) in pairwise(front):
        if low < acr < high:
            return left + (right - left) * (acr - low) / (high - low)
    return None


def common_levels(fronts: Sequence[Sequence[Point]], count: int = 3) -> list[float]:
    """`count` ACRs, evenly spaced over the range that all fronts cover; empty if there is none.

    Fronts of a single point do not restrict the range.
    """
    spans = [(front[0][0], front[-1][0]) for front in fronts if len(front) > 1]
    low, high = max((a for a, _ in spans), default=0.0), min((b for _, b in spans), default=0.0)
    if len(spans) < 2 or low >= high:
        return []
    return [low + (high - low) * step / (count - 1) for step in range(count)]
