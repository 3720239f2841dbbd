"""Which pixels the certified margin hangs on: its slope in each pixel's own epsilon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import Clip, check_batch, check_fit
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import Interval, check_epsilon
from ibpcore.bounds.network import FoldedNetwork, detached
from ibpcore.bounds.registry import BOXES, margins_by
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision

PIECE = 8
"""Images at a time: what a gradient keeps is many times an image."""


TINY = torch.finfo(torch.float64).tiny


def heat(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    *,
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """dR/de_p for each pixel p: how fast the margin worsens if p alone may change more.

    R(e) is the certified margin (eq. 3) over the box of all images whose pixel p, in each of
    its channels, is changed by at most e_p, met with `clip`. The slope is that to the right,
    at e_p = radius for all pixels: 0 where `clip` leaves no room. The sum over the pixels is the
    slope of R at the radius. So at a root of R, if p alone may change by a little d more, the
    certified radius of all shrinks by d times the share of p in that sum. Almost everywhere,
    that is: at a kink of R it is one of the slopes beside it. By IBP no pixel has a slope below
    0; CROWN-IBP's bounds are not monotone, and there one may.

    It explains a certificate and proves nothing: it is of a pass in the type of `images`.

    Args:
        network: folded from the model.
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices, what the certificates are of.
        radii: (B,) in pixel units.
        bound, elide, clip: as they were for the radii, see `ibpcore.certified_margins`.

    Returns:
        (B, H, W).

    Raises:
        UserError: an argument has the wrong shape or values, or there is no such bound.
    """
    margins_by(bound)
    check_batch(images, labels, clip)
    check_epsilon(radii, "radii")
    with full_precision():
        network = detached(network)
        check_fit(network, images, labels)
        radii, labels = radii.to(images.dtype), labels.long()
        pieces = (slice(i, i + PIECE) for i in range(0, len(images), PIECE))
        return torch.cat(
            [_heat(network, images[p], labels[p], radii[p], bound, elide, clip) for p in pieces]
        )


def _heat(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    bound: str,
    elide: bool,
    clip: Clip,
) -> Tensor:
    radii = radii.view(-1, 1, 1, 1)
    low, high = (-torch.inf, torch.inf) if clip is None else clip
    lower, upper = images - radii, images + radii
    # A wider box has an end further out only where it is not at the end of the range yet.
    free = lower > low, upper < high
    ends = [lower.clamp(min=low).requires_grad_(), upper.clamp(max=high).requires_grad_()]
    with torch.enable_grad():
        bounds = BOXES[bound](network, Interval.from_bounds(*ends), labels, elide)
        margin = largest_difference(bounds, labels)
        down, up = torch.autograd.grad(margin.sum(), ends)
    return (up * free[1] - down * free[0]).sum(1)


def heatmaps(
    model: nn.Module, data: ImageSet, radii: Tensor, **settings: Any
) -> list[Tensor | None]:
    """`heat` of each image that has a certificate, (H, W) on the CPU, None for the others.

    Args:
        model: interval layers in evaluation mode, on the device of `data`.
        data: N images, with the labels that their certificates are of.
        radii: (N,) in pixel units.
        settings: those of `heat`.
    """
    found: list[Tensor | None] = [None] * len(data)
    rows = (radii > 0).nonzero().squeeze(1).tolist()
    if rows:
        some = data[torch.tensor(rows, device=data.images.device)]
        images = as_pixels(some.images).to(next(model.parameters()).dtype)
        radii = radii[rows].to(images.device)
        maps = heat(fold(model), images, some.labels, radii, **settings).cpu()
        for row, one in zip(rows, maps, strict=True):
            found[row] = one
    return found


def peak(heat: Tensor) -> tuple[int, int, float]:
    """Row and column, from 0, of the hottest pixel of (H, W), and its share of all, 0 for none."""
    heat = heat.double().clamp(min=0)
    place, width = int(heat.argmax()), heat.shape[1]
    return place // width, place % width, float(heat.max() / heat.sum().clamp(min=TINY))
