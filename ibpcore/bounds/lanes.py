"""Margins over balls from bounds over boxes: one lane for each pair of a sample and a radius."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ibpcore.bounds.chunking import in_chunks
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions

OverBoxes = Callable[[FoldedNetwork, Interval, Tensor, BoundOptions], Tensor]
"""Bounds on f_i - f_y, (B, classes), over boxes (B, C, H, W) with labels (B,)."""


def lane_margins(
    over_boxes: OverBoxes,
    size: Callable[[FoldedNetwork, Tensor, int | None], int],
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
) -> Tensor:
    """R_cert (eq. 3) over balls, (B,) or (K, B) like `epsilons`.

    Args:
        over_boxes: +inf for a sample that cannot be bounded.
        size: the number of lanes in a pass, of a network, its images and the memory budget.
    """
    if epsilons.numel() == 0:
        return torch.zeros_like(epsilons)

    def chunk(radii: Tensor, samples: slice) -> Tensor:
        repeats = len(radii)
        lanes = images[samples].repeat(repeats, *[1] * (images.dim() - 1))
        classes = labels[samples].repeat(repeats)
        box = Interval.ball(lanes, radii.flatten(), options.clip, check=False)
        bounds = over_boxes(network, box, classes, options)
        return largest_difference(bounds, classes).view_as(radii)

    return in_chunks(chunk, epsilons, size(network, images, options.budget))
