"""Proofs of radii that unchecked passes found; a radius shrinks until its claim is proved."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ibpcore.bounds.alpha_crown import Slopes, optimised, slopes
from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.chunking import crown_chunk_size
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.options import BoundOptions, Clip
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.radii import (
    Radii,
    RadiusStatus,
    check_radii,
    leftmost_roots,
    scatter_rows,
)
from ibpcore.certification.soundness.linear import of_samples
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
    slope_steps: int = 20,
    inner_slopes: bool = False,
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
        bound, elide, clip, budget, slope_steps, inner_slopes: those used for `radii`, see
            `certified_radii` and `prove_radii`.

    Returns:
        radii in float64. `upper` is the smallest at which a bound pass failed, and `root` is
        the radius itself if that was shrunk.

    Raises:
        UserError: no proof covers the model, see `sound_network`, or an argument is invalid.
    """
    rungs(bound)
    options = BoundOptions(bound, elide, clip, budget, slope_steps, inner_slopes)
    check_batch(images, labels, clip)
    check_radii(radii, images)
    network = model if isinstance(model, SoundNetwork) else sound_network(model, claim)
    with torch.no_grad(), full_precision():
        check_fit(partial(midpoint_logits, network), images, labels)
        return prove_radii(network, images, labels.long(), radii, options)


def prove_radii(
    network: SoundNetwork, images: Tensor, labels: Tensor, radii: Radii, options: BoundOptions
) -> Radii:
    """`verified_radii` in full precision, for checked images (B, C, H, W) and labels (B,).

    Each radius is proved by the bound that found it, see `Radii.rung`, or by the tightest one of
    `options` if it is not among them.
    """
    places = {[*BOUNDS].index(name): name for name in rungs(options.bound)}
    known = torch.isin(radii.rung, radii.rung.new_tensor([*places]))
    rung = torch.where(known, radii.rung, [*places][-1])
    radius, upper, root = (part.double() for part in radii[:3])
    radii = radii._replace(radius=radius, upper=upper, root=root)
    for place, name in places.items():
        rows = ((radii.radius > 0) & (rung == place)).nonzero().squeeze(1)
        bound = replace(options, bound=name)
        for some in rows.split(_lanes(network, images, bound)) if len(rows) > 0 else ():
            found = Radii(*(part[some] for part in radii))
            proved = _proved(network, images[some], labels[some], found, bound)
            radii = scatter_rows(proved, some, radii)
    return radii


def _lanes(network: SoundNetwork, images: Tensor, options: BoundOptions) -> int:
    """The number of samples whose slopes are kept at a time; of the other bounds there are none."""
    if options.bound != "alpha-crown":
        return len(images)
    return crown_chunk_size(network.folded, images[:1], options.budget)


def _proved(
    network: SoundNetwork, images: Tensor, labels: Tensor, radii: Radii, options: BoundOptions
) -> Radii:
    """`prove_radii` of B > 0 samples by one bound."""
    given = _slopes(network, images, labels, radii.radius, options)

    def margins_of(epsilons: Tensor, lanes: Tensor) -> Tensor:
        some = {place: of_samples(slopes, lanes) for place, slopes in given.items()}
        return sound_margins(network, images[lanes], labels[lanes], epsilons, options, some)

    every = torch.arange(len(images), device=images.device)
    at_radius = margins_of(radii.radius, every)
    rows = (~(at_radius < 0)).nonzero().squeeze(1)
    if len(rows) == 0:
        return radii
    ceiling, evaluations, rung = radii.radius[rows], radii.evaluations[rows], radii.rung[rows]
    at_zero = margins_of(torch.zeros_like(ceiling), rows)

    def margin(epsilons: Tensor, lanes: Tensor) -> Tensor:
        return margins_of(epsilons, rows[lanes])

    values = at_zero, at_radius[rows]
    roots = leftmost_roots(margin, values, torch.zeros_like(ceiling), ceiling, TIGHTEST)
    proved = at_zero < 0
    radius = torch.where(proved, roots.lower, 0)
    converged = roots.status == RootStatus.CONVERGED
    status = torch.where(converged, int(RadiusStatus.CONVERGED), int(RadiusStatus.ITERATION_LIMIT))
    status = torch.where(proved, status, int(RadiusStatus.UNPROVED))
    upper = torch.where(proved, roots.upper, 0)
    rung = torch.where(radius > 0, rung, -1)
    return scatter_rows(Radii(radius, upper, radius, status, evaluations, rung), rows, radii)


def _slopes(
    network: SoundNetwork, images: Tensor, labels: Tensor, radius: Tensor, options: BoundOptions
) -> Slopes:
    """The slopes that certify the radii, (B,), found again as in the search for these radii."""
    if options.bound != "alpha-crown":
        return {}
    box = Interval.ball(images, radius.to(images.dtype), options.clip, check=False)
    return slopes(optimised(network.folded, box, labels, options))
