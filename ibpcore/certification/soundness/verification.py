"""Proofs of radii that unchecked passes found; a radius shrinks until its claim is proved."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.options import BoundOptions, Clip
from ibpcore.bounds.registry import bound_named
from ibpcore.certification.radii import (
    Radii,
    RadiusStatus,
    check_radii,
    leftmost_roots,
    on_lanes,
    scatter_rows,
)
from ibpcore.certification.soundness.margins import midpoint_logits, sound_margins
from ibpcore.certification.soundness.network import SoundNetwork, sound_network
from ibpcore.precision import full_precision
from ibpcore.roots import RootOptions, RootStatus

TIGHTEST = RootOptions(solver="brentq", xtol=1e-15, rtol=2.0**-23)
"""Tolerances as fine as the spacing of float32 radii."""


def verified_radii(
    model: nn.Module | SoundNetwork,
    images: Tensor,
    labels: Tensor,
    radii: Radii,
    *,
    claim: str = "real",
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    budget: int | None = None,
) -> Radii:
    """Proves the claim at each of `radii`; a radius without a proof is shrunk, none grows.

    The proof holds for the stored weights, for exactly these `images`, and for all real or
    float32 images within the radius, see docs/soundness.md.

    Args:
        model: interval layers in evaluation mode, or the result of `sound_network` for them.
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        radii: from `ibpcore.certified_radii`.
        claim: a name in `CLAIMS`; "real" for the real-valued network,
            "float32" for every float32 execution of it with sums in any order.
        bound, elide, clip, budget: those used for `radii`, see `certified_radii`.

    Returns:
        radii in float64. `upper` is the smallest at which a bound pass failed, and `root` is
        the radius itself if that was shrunk.

    Raises:
        UserError: no proof covers the model, see `sound_network`, or an argument is invalid.
    """
    bound_named(bound)
    options = BoundOptions(bound, elide, clip, budget)
    check_batch(images, labels, clip)
    check_radii(radii, images)
    network = model if isinstance(model, SoundNetwork) else sound_network(model, claim)
    with torch.no_grad(), full_precision():
        check_fit(partial(midpoint_logits, network), images, labels)
        return prove_radii(network, images, labels.long(), radii, options)


def prove_radii(
    network: SoundNetwork, images: Tensor, labels: Tensor, radii: Radii, options: BoundOptions
) -> Radii:
    """`verified_radii` in full precision, for checked images (B, C, H, W) and labels (B,)."""
    radius, upper, root = (part.double() for part in radii[:3])
    radii = radii._replace(radius=radius, upper=upper, root=root)
    rows = (radii.radius > 0).nonzero().squeeze(1)
    at_radius = sound_margins(network, images[rows], labels[rows], radii.radius[rows], options)
    failed = ~(at_radius < 0)
    rows, at_radius = rows[failed], at_radius[failed]
    if len(rows) == 0:
        return radii
    images, labels, ceiling = images[rows], labels[rows], radii.radius[rows]
    at_zero = sound_margins(network, images, labels, torch.zeros_like(ceiling), options)
    margin = on_lanes(sound_margins, network, images, labels, options)
    values = at_zero, at_radius
    roots = leftmost_roots(margin, values, torch.zeros_like(ceiling), ceiling, None, TIGHTEST)
    proved = at_zero < 0
    radius = torch.where(proved, roots.lower, 0)
    converged = roots.status == RootStatus.CONVERGED
    status = torch.where(converged, int(RadiusStatus.CONVERGED), int(RadiusStatus.ITERATION_LIMIT))
    status = torch.where(proved, status, int(RadiusStatus.UNPROVED))
    upper = torch.where(proved, roots.upper, 0)
    shrunk = Radii(radius, upper, radius, status, radii.evaluations[rows])
    return scatter_rows(shrunk, rows, radii)
