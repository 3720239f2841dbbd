"""Search for the smallest radius at which an attack succeeds, independent of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.attacks.pgd import Attacker
from ibpcore.bounds.checks import Clip
from ibpcore.bounds.interval import Interval

FIRST_STEP = 1 / 16
"""First step of the upward search, as a fraction of the radius that it starts from."""
LEAST_RADIUS = 1 / 100
"""The smallest such radius, as a fraction of epsilon_max: steps from 0 must not be 0."""


class Found(NamedTuple):
    """The nearest successful attack on each sample.

    Attributes:
        distance: (B,) float64, l-infinity, in pixel units; infinity if there is none.
        images: (B, C, H, W), the attacked images where the distance is finite.
    """

    distance: Tensor
    images: Tensor


Judge = Callable[[Tensor, Tensor], Tensor]
"""(samples (n,), images (n, C, H, W)) -> (n,) whether the images are really misclassified."""
Attempt = Callable[[Tensor, Tensor], Found]
"""(samples (n,), radii (n,) float64) -> the result of an attack on these."""


def attempts(images: Tensor, labels: Tensor, clip: Clip, attack: Attacker, judge: Judge) -> Attempt:
    """A function that attacks `images` (B, C, H, W) at any radii and confirms each success.

    Args:
        attack: finds the worst images in a box.
        judge: decides about success, regardless of the attack's own result.
    """

    def attempt(samples: Tensor, radii: Tensor) -> Found:
        some = images[samples]
        box = Interval.ball(some, radii, clip, check=False)
        lower, upper = inner_box(some, radii, clip)
        attacked = attack(box, labels[samples]).images.clamp(lower, upper)
        distance = (attacked.double() - some.double()).abs().flatten(1).amax(1)
        return Found(distance.masked_fill(~judge(samples, attacked), torch.inf), attacked)

    return attempt


def inner_box(images: Tensor, radii: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Ends (n, C, H, W) of the largest box of floats in the balls, rounded towards the images.

    `Interval.ball` rounds to nearest, so its corners may lie outside.
    """
    epsilon = radii.double().view(-1, *[1] * (images.dim() - 1))
    lower, upper = images.double() - epsilon, images.double() + epsilon
    if clip is not None:
        lower, upper = lower.clamp(min=clip[0]), upper.clamp(max=clip[1])
    return _towards(images, lower, torch.lt), _towards(images, upper, torch.gt)


def _towards(images: Tensor, end: Tensor, beyond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`end` in the type of the images, rounded towards these."""
    rounded = end.to(images.dtype)
    return torch.where(beyond(rounded.double(), end), torch.nextafter(rounded, images), rounded)


def attempted(found: Found, attempt: Attempt, samples: Tensor, radii: Tensor) -> Found:
    """`found`, updated with nearer successes on `samples` (n,) at their `radii` (B,)."""
    if len(samples) == 0:
        return found
    new = attempt(samples, radii[samples])
    better = new.distance < found.distance[samples]
    samples = samples[better]
    return Found(
        found.distance.index_copy(0, samples, new.distance[better]),
        found.images.index_copy(0, samples, new.images[better]),
    )


def upwards(
    found: Found, attempt: Attempt, lower: Tensor, epsilon_max: float, limit: float
) -> tuple[Found, Tensor]:
    """Attempts at increasing radii, until one succeeds or the limit is reached.

    Args:
        found: samples that already have a success are skipped.
        lower: (B,) float64: the first radius is a sixteenth above it, the next an eighth,
            and so on. Below a hundredth of epsilon_max, these are fractions of the latter.
        limit: the last radius.

    Returns:
        `found`, and (B,) the largest radii at which an attempt failed, else `lower`.
    """
    start, step = lower, FIRST_STEP * lower.clamp(min=LEAST_RADIUS * epsilon_max)
    while True:
        samples = (found.distance.isinf() & (lower < limit)).nonzero()[:, 0]
        if len(samples) == 0:
            return found, lower
        radii = (start + step).clamp(max=limit)
        found = attempted(found, attempt, samples, radii)
        lower = torch.where(found.distance.isinf(), radii.maximum(lower), lower)
        step = 2 * step


def bisected(found: Found, attempt: Attempt, lower: Tensor, bisections: int) -> Found:
    """Bisects between `lower` (B,) and the distance, for samples that have a success.

    An attack that fails at one radius may succeed at a smaller one, so the smallest radius
    may be missed. But every distance is that of a success.
    """
    samples = (found.distance.isfinite() & (found.distance > lower)).nonzero()[:, 0]
    for _ in range(bisections):
        before, middle = found.distance, (lower + found.distance) / 2
        found = attempted(found, attempt, samples, middle)
        lower = torch.where(found.distance < before, lower, middle)
    return found
