"""Certified margins of a batch, by any bound."""

from __future__ import annotations

from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.interval import as_radii
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions, Clip
from ibpcore.bounds.registry import bound_named
from ibpcore.errors import UserError
from ibpcore.nn.folding import as_folded
from ibpcore.precision import full_precision


def certified_margins(
    model: nn.Module | FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor | float,
    *,
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    budget: int | None = None,
) -> Tensor:
    """R_cert(x, epsilon) (eq. 3): negative means certified.

    All radii go through the network as one batch, as far as `budget` allows. A model in
    training mode is bounded with the batch statistics of `images`; its running statistics
    do not change. A sample whose bounds overflow or become NaN anywhere gets +inf: not
    certified.

    Args:
        model: interval layers, or the network folded from them.
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        epsilons: radii in pixel units; a scalar, (B,) or (K, B).
        bound: a name in `BOUNDS`; "ibp", or "crown-ibp" for the smaller of IBP's and
            CROWN-IBP's bounds on each f_i - f_y.
        elide: merge a linear last layer with the differences W_i - W_y, which is tighter
            than eq. 3 and still sound. IBP gives eq. 3 for networks with another last layer.
        clip: valid pixel range to intersect the ball with; None for the unclipped ball.
        budget: bytes for intermediate results, met by splitting the batch into chunks;
            None for 32 MiB, or an eighth of a CUDA device's memory. Tensors saved for a
            gradient come on top.

    Returns:
        (B,) margins for a scalar or (B,), (K, B) for (K, B). Differentiable.

    Raises:
        UserError: an argument has the wrong shape or values, or a layer has no interval rule.
    """
    chosen = bound_named(bound).margins
    options = BoundOptions(bound, elide, clip, budget)
    check_batch(images, labels, clip)
    radii = as_radii(epsilons, images, "epsilons")
    if radii.dim() == 0:
        radii = radii.expand(len(images))
    if radii.dim() > 2 or radii.shape[-1] != len(images):
        raise UserError(
            f"epsilons must be a scalar, ({len(images)},) or (K, {len(images)}),"
            f" but has shape {tuple(radii.shape)}"
        )
    with full_precision():
        network = as_folded(model, images)
        check_fit(network, images, labels)
        return chosen(network, images, labels.long(), radii, options)
