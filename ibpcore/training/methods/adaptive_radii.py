"""The radii of a step: the scheduled epsilon, or ACERT's, each sample's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.ibp import clean_margins
from ibpcore.certification.radii import CleanSamples, certifiable, ibp_radii
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.base import CleanBatch, StepRadii

COARSE = 0.01
"""With a tolerance below this share of epsilon memory alone cannot say that R(epsilon) < 0."""


def step_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """One radius for all, or with `adaptive` E_cert(x), below the scheduled `epsilon`."""
    if batch.at is not None:
        return batch.at
    if config.adaptive:
        return adaptive_radii(batch, epsilon, config)
    radii = torch.full_like(batch.images[:, 0, 0, 0], epsilon)
    return StepRadii(radii, None if epsilon > 0 else batch.labels[:0], batch.slopes)


def adaptive_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """E_cert(x) by IBP, capped at the scheduled epsilon (arXiv 2307.13078, eq. 8-9).

    With `max_iterations` 0 this is ACERT-fast: no root is sought, the radius is 0 where
    the sample is misclassified and epsilon elsewhere; with the solver `tracked` it is
    what the sample's last visit suggests.
    """
    options = config.root_options(epsilon)
    at_zero = clean_margins(batch.logits.detach(), batch.labels)
    rows = certifiable(at_zero) if epsilon > 0 else batch.labels[:0]
    if options.max_iterations == 0 and options.solver != "tracked":
        radii = torch.zeros_like(batch.images[:, 0, 0, 0]).index_fill(0, rows, epsilon)
        return StepRadii(radii, rows, batch.slopes)
    guess = _guess(batch, at_zero) if options.solver == "tracked" else None
    if guess is not None and options.xtol < COARSE * epsilon:
        guess = guess.clamp(max=epsilon)

    samples = CleanSamples(batch.images, batch.labels, at_zero)
    radii = ibp_radii(
        batch.network, samples, epsilon, options, config.bound_options, rows=rows, guess=guess
    ).root
    if options.max_iterations == 0:
        # Nothing was bounded but at epsilon: remembering the guess would confirm itself.
        return StepRadii(radii, rows, batch.slopes)
    # R is 0 at the root; where epsilon came first, this is more than the slope up to there.
    secants = (-at_zero / radii).to(batch.slopes.dtype)
    slopes = torch.where(secants.isfinite() & (secants > 0), secants, batch.slopes)
    return StepRadii(radii, rows, slopes)


def _guess(batch: CleanBatch, at_zero: Tensor) -> Tensor:
    """Root of the secant of the last visit; a sample that had none takes the usual one."""
    slopes, known = batch.slopes, batch.all_slopes
    usual = _usual(slopes if known is None else known)
    return -at_zero / torch.where(slopes.isnan(), usual, slopes)


def _usual(slopes: Tensor) -> Tensor:
    """Median of those that are known, NaN without any: one step for the host, unlike nanmedian."""
    known = slopes.isfinite()
    middle = ((known.sum() - 1) // 2).clamp(min=0)
    return slopes.sort().values.gather(0, middle[None]).squeeze(0)
