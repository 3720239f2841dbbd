"""Which pixels a certified margin depends on: its derivative in each pixel's own epsilon."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import between, check_epsilon
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.network import FoldedNetwork, detached
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS, bound_named
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import weight_like
from ibpcore.precision import full_precision

CHUNK = 8
"""Images at a time: a gradient saves many times the memory of an image."""
TINY = torch.finfo(torch.float64).tiny


def margin_sensitivity(
    network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor, options: BoundOptions
) -> Tensor:
    """dR/de_p for each pixel p: how fast the margin worsens if p alone may change more.

    R(e) is the certified margin (eq. 3) over the box of all images whose pixel p changes by at
    most e_p in each of its channels, intersected with `clip`. The result is the right
    derivative at e_p = radius for all pixels, 0 where `clip` leaves no room. Its sum over the
    pixels is the slope of R at the radius. So at a root of R, if p alone may change by a
    small d more, the radius certified for all pixels shrinks by d times p's share of that sum.
    This holds almost everywhere; at a kink of R the result is one of the adjacent slopes. With
    IBP no slope is negative. CROWN-IBP's bounds are not monotone, so some of theirs may be.

    The result explains a certificate but proves nothing: it is computed in `images.dtype`.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices that the certificates are for.
        radii: (B,) in pixel units.
        options: those used for the radii.

    Returns:
        (B, H, W).

    Raises:
        UserError: an argument has the wrong shape or values, or there is no such bound.
    """
    bound_named(options.bound)
    check_batch(images, labels, options.clip)
    check_epsilon(radii, "radii")
    with full_precision():
        network = detached(network)
        check_fit(network, images, labels)
        radii, labels = radii.to(images.dtype), labels.long()
        chunks = (slice(i, i + CHUNK) for i in range(0, len(images), CHUNK))
        return torch.cat(
            [_sensitivity(network, images[p], labels[p], radii[p], options) for p in chunks]
        )


def _sensitivity(
    network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor, options: BoundOptions
) -> Tensor:
    radii = radii.view(-1, 1, 1, 1)
    low, high = options.clip or (-torch.inf, torch.inf)
    lower, upper = images - radii, images + radii
    # A larger radius moves an end of the box only where it is still inside the range.
    free = lower > low, upper < high
    ends = [lower.clamp(min=low).requires_grad_(), upper.clamp(max=high).requires_grad_()]
    with torch.enable_grad():
        box = between(*ends)
        bounds = BOUNDS[options.bound].box_logits(network, box, labels, options)
        margin = largest_difference(bounds, labels)
        down, up = torch.autograd.grad(margin.sum(), ends)
    return (up * free[1] - down * free[0]).sum(1)


def heatmaps(
    model: nn.Module, data: ImageSet, radii: Tensor, options: BoundOptions
) -> list[Tensor | None]:
    """`margin_sensitivity` of each image with a certificate, (H, W) on the CPU, else None.

    Args:
        model: interval layers in evaluation mode, on the device of `data`.
        data: N images, with the labels that their certificates are for.
        radii: (N,) in pixel units, found with `options`; of its rungs the last one is shown.
    """
    options = replace(options, bound=rungs(options.bound)[-1])
    found: list[Tensor | None] = [None] * len(data)
    rows = (radii > 0).nonzero().squeeze(1).tolist()
    if rows:
        some = data[torch.tensor(rows, device=data.images.device)]
        images = as_pixels(some.images).to(weight_like(model).dtype)
        radii = radii[rows].to(images.device)
        maps = margin_sensitivity(fold(model), images, some.labels, radii, options).cpu()
        for row, one in zip(rows, maps, strict=True):
            found[row] = one
    return found


def peak(sensitivity: Tensor) -> tuple[int, int, float]:
    """Row and column, from 0, of the largest of (H, W) slopes, and its share of the sum or 0."""
    parts = sensitivity.double().clamp(min=0)
    place, width = int(parts.argmax()), parts.shape[1]
    return place // width, place % width, float(parts.max() / parts.sum().clamp(min=TINY))
