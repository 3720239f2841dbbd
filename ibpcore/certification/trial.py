"""Tries a bound on a few images that other bounds left open, to tell what it would cost."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from ibpcore.bounds.interval import at_least
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import weight_like
from ibpcore.precision import full_precision

IMAGES, SECONDS = 4, 10.0
"""A trial ends after so many images, or after the first that ends later than this."""


class Trial(NamedTuple):
    """How many images were tried and certified at epsilon_max, and the seconds that it took."""

    tried: int
    certified: int
    seconds: float


@torch.no_grad()
def try_bound(
    model: nn.Module, images: ImageSet, epsilon_max: float, options: BoundOptions
) -> Trial:
    """Evaluates a bound at `epsilon_max` for a few images, spread over all, one after the other.

    Args:
        model: interval layers in evaluation mode, on the device of the images.
        images: those that are open, at least one.
        options: with the name of a single bound.
    """
    count = min(len(images), IMAGES)
    some = torch.linspace(0, len(images) - 1, count).round().long().to(images.labels.device)
    tried = certified = 0
    with full_precision():
        network, dtype = fold(model), weight_like(model).dtype
        radius = torch.full((1,), at_least(epsilon_max, dtype), dtype=dtype).to(some.device)
        start = time.perf_counter()
        for one in some.split(1):
            image = images[one]
            pixels = as_pixels(image.images).to(dtype)
            margin = BOUNDS[options.bound].margins(network, pixels, image.labels, radius, options)
            tried, certified = tried + 1, certified + int(margin < 0)
            if time.perf_counter() - start > SECONDS:
                break
    return Trial(tried, certified, time.perf_counter() - start)
