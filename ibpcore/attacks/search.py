"""The smallest radius at which an attack succeeds, confirmed; knows attackers, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.attacks.pgd import Attacker
from ibpcore.bounds.checks import Clip
from ibpcore.bounds.interval import Interval

FIRST_STEP = 1 / 16
"""Of the search upwards, as a share of the radius that it starts from."""
LEAST_RADIUS = 1 / 100
"""That counts as that radius, as a share of epsilon_max: steps from 0 must lead somewhere."""


class Found(NamedTuple):
    """The nearest success of each sample.

    Attributes:
        distance: (B,) float64, l-infinity, in pixel units; infinity where there is none.
        images: (B, C, H, W), what succeeded where the distance is finite.
    """

    distance: Tensor
    images: Tensor


Judge = Callable[[Tensor, Tensor], Tensor]
"""(samples (n,), images (n, C, H, W)) -> (n,) whether the images are misclassified indeed."""
Attempt = Callable[[Tensor, Tensor], Found]
"""(samples (n,), radii (n,) float64) -> what an attack of these came to."""


def attempts(images: Tensor, labels: Tensor, clip: Clip, attack: Attacker, judge: Judge) -> Attempt:
    """Attacks of `images` (B, C, H, W) in balls of any radii, each success confirmed.

    Args:
        attack: finds the worst images of a box.
        judge: decides, whatever the attack says.
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
    """Ends (n, C, H, W) of the largest box of floats in the balls: rounded towards the images.

    `Interval.ball` rounds to nearest, so that its corners may lie outside.
    """
    epsilon = radii.double().view(-1, *[1] * (images.dim() - 1))
    lower, upper = images.double() - epsilon, images.double() + epsilon
    if clip is not None:
        lower, upper = lower.clamp(min=clip[0]), upper.clamp(max=clip[1])
    return _towards(images, lower, torch.lt), _towards(images, upper, torch.gt)


def _towards(images: Tensor, end: Tensor, beyond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`end` as a float of the images' type, never beyond itself as seen from the images."""
    rounded = end.to(images.dtype)
    return torch.where(beyond(rounded.double(), end), torch.nextafter(rounded, images), rounded)


def attempted(found: Found, attempt: Attempt, samples: Tensor, radii: Tensor) -> Found:
    """`found`, with what an attempt at `radii` (B,) of `samples` (n,) finds nearer."""
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
    """Attempts at growing radii, until one succeeds or the limit is reached.

    Args:
        found: samples that have a success already are left alone.
        lower: (B,) float64: the first radius is a sixteenth above it, the next an eighth,
            and so on; where it is small, that much of a hundredth of epsilon_max.
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
    """Bisection between `lower` (B,) and the distance, of samples that have a success.

    An attack that fails at one radius may succeed at a smaller one, so the true radius may
    be smaller still; but every distance is that of a success.
    """
    samples = (found.distance.isfinite() & (found.distance > lower)).nonzero()[:, 0]
    for _ in range(bisections):
        before, middle = found.distance, (lower + found.distance) / 2
        found = attempted(found, attempt, samples, middle)
        lower = torch.where(found.distance < before, lower, middle)
    return found
