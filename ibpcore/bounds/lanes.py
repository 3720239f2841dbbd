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
Lanes = Callable[[FoldedNetwork, Tensor, int | None], int]
"""The number of boxes in a pass, for a network, images (B, ...) and the memory budget."""


def box_margins(
    over_boxes: OverBoxes,
    lanes: Lanes,
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
) -> Tensor:
    """R_cert (eq. 3), (B,), over boxes (B, C, H, W) with labels (B,), in chunks."""
    if len(labels) == 0:
        return box.mid.new_zeros(0)

    def chunk(_: Tensor, some: slice) -> Tensor:
        part = box.apply(lambda end: end[some])
        bounds = over_boxes(network, part, labels[some], options)
        return largest_difference(bounds, labels[some])

    size = lanes(network, box.mid, options.budget)
    return in_chunks(chunk, box.mid.new_zeros(len(labels)), size)


def lane_margins(
    over_boxes: OverBoxes,
    lanes: Lanes,
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
) -> Tensor:
    """R_cert (eq. 3) over balls, (B,) or (K, B) like `epsilons`.

    Args:
        over_boxes: +inf for a sample that cannot be bounded.
    """
    if epsilons.numel() == 0:
        return torch.zeros_like(epsilons)

    def chunk(radii: Tensor, samples: slice) -> Tensor:
        repeats = len(radii) if radii.dim() == 2 else 1
        pixels = images[samples].repeat(repeats, *[1] * (images.dim() - 1))
        classes = labels[samples].repeat(repeats)
        box = Interval.ball(pixels, radii.flatten(), options.clip, check=False)
        bounds = over_boxes(network, box, classes, options)
        return largest_difference(bounds, classes).view_as(radii)

    return in_chunks(chunk, epsilons, lanes(network, images, options.budget))
