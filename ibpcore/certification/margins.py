"""Certified margins of a batch, by any bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.interval import Interval, as_radii, check_box
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions, Clip
from ibpcore.bounds.registry import BOUNDS, bound_named
from ibpcore.errors import UserError, first_line
from ibpcore.nn.folding import as_folded
from ibpcore.precision import full_precision


def certified_margins(
    model: nn.Module | FoldedNetwork,
    images: Tensor | Interval,
    labels: Tensor,
    epsilons: Tensor | float | str | None = None,
    *,
    mask: Tensor | None = None,
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    budget: int | None = None,
    slope_steps: int = 20,
    inner_slopes: bool = False,
) -> Tensor:
    """R_cert(x, epsilon) (eq. 3): negative means certified.

    All radii go through the network as one batch, as far as `budget` allows. A model in
    training mode is bounded with the batch statistics of `images`; its running statistics
    do not change. A sample whose bounds overflow or become NaN anywhere gets +inf: not
    certified.

    Args:
        model: interval layers, or the network folded from them.
        images: (B, C, H, W) in pixel units; or boxes of images, see `Interval.from_bounds`.
        labels: (B,) class indices.
        epsilons: radii in pixel units; a scalar, a text such as "8/255", (B,) or (K, B). With
            three or more dimensions they are radii of pixels and broadcast against the images:
            (C, 1, 1) for channels, (H, W) written as (1, H, W). None for boxes.
        mask: bool, broadcasts against the images; pixels where it is False do not change.
        bound: a name in `BOUNDS`: for "crown-ibp", "crown" and "alpha-crown" the smaller of this
            bound's and IBP's on each f_i - f_y. The search of "alpha-crown" ends at a negative
            margin, however close to 0.
        elide: merge a linear last layer with the differences W_i - W_y, which is tighter
            than eq. 3 and still sound. IBP gives eq. 3 for networks with another last layer.
        clip: valid pixel range to intersect the ball with; None for the unclipped ball. Boxes
            are taken as they are.
        budget: bytes for intermediate results, met by splitting the batch into chunks;
            None for 32 MiB, or an eighth of a CUDA device's memory. Tensors saved for a
            gradient come on top.
        slope_steps, inner_slopes: of "alpha-crown", see `BoundOptions`.

    Returns:
        (B,) margins for a scalar, (B,), radii of pixels or boxes, (K, B) for (K, B).
        Differentiable; the slopes that "crown" and "alpha-crown" choose are taken as constant.

    Raises:
        UserError: an argument has the wrong shape or values, or a layer has no interval rule.
    """
    chosen = bound_named(bound)
    options = BoundOptions(bound, elide, clip, budget, slope_steps, inner_slopes)
    if isinstance(images, Interval):
        if epsilons is not None or mask is not None:
            raise UserError("boxes have no epsilons and no mask: give None")
        check_box(images)
        return _over_boxes(model, images, labels, options)
    check_batch(images, labels, clip)
    if epsilons is None:
        raise UserError("epsilons are missing: give radii in pixel units, or boxes for images")
    radii = as_radii(epsilons, images, "epsilons")
    if radii.dim() > 2 or mask is not None:
        radii = _of_pixels(radii, mask, images)
        box = Interval.ball(images, radii, clip, check=False)
        return _over_boxes(model, box, labels, options)
    if radii.dim() == 0:
        radii = radii.expand(len(images))
    if radii.shape[-1] != len(images):
        raise UserError(
            f"epsilons must be a scalar, ({len(images)},) or (K, {len(images)}), or radii of pixels"
            f" with three or more dimensions, but have shape {tuple(radii.shape)}"
        )
    with full_precision():
        network = as_folded(model, images)
        check_fit(network, images, labels)
        return chosen.margins(network, images, labels.long(), radii, options)


def _over_boxes(
    model: nn.Module | FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """(B,) margins over boxes, (B, C, H, W)."""
    check_batch(box.mid, labels, None)
    with full_precision():
        network = as_folded(model, box.mid)
        check_fit(network, box.mid, labels)
        return BOUNDS[options.bound].box_margins(network, box, labels.long(), options)


def _of_pixels(radii: Tensor, mask: Tensor | None, images: Tensor) -> Tensor:
    """Radii of every pixel, (B, C, H, W), 0 where the mask is False."""
    if mask is not None and not isinstance(mask, Tensor):
        raise UserError(f"mask must be a torch tensor, not {type(mask).__name__}")
    if radii.dim() == 1:
        radii = radii.view(-1, *[1] * (images.dim() - 1))
    if radii.dim() == 2:
        raise UserError("with a mask, epsilons must be a scalar, one radius an image, or of pixels")
    try:
        radii = radii.expand_as(images)
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"mask must be bool, but is {mask.dtype}")
        return radii if mask is None else radii * mask.to(radii).expand_as(images)
    except RuntimeError as error:
        raise UserError(
            f"epsilons and mask must fit images of shape {tuple(images.shape)}: {first_line(error)}"
        ) from None
