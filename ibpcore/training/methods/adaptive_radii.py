"""The radii of a training step: the scheduled epsilon, or each sample's own for ACERT."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.ibp import clean_margins
from ibpcore.certification.radii import CleanSamples, certifiable, find_radii, ibp_radii
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.base import CleanBatch, StepRadii

COARSE = 0.01
"""If the tolerance is below this fraction of epsilon, R(epsilon) < 0 is evaluated, not guessed."""


def step_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """The scheduled `epsilon` for all samples, or with `adaptive`, E_cert(x) up to it."""
    if batch.at is not None:
        return batch.at
    if config.adaptive:
        return adaptive_radii(batch, epsilon, config)
    radii = batch.images.new_full((len(batch.images),), epsilon)
    return StepRadii(radii, None if epsilon > 0 else batch.labels[:0], batch.slopes)


def adaptive_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """E_cert(x), capped at the scheduled epsilon (arXiv 2307.13078, eq. 8-9).

    It is by all bounds up to `train_bound`; with another than IBP, no search starts at the
    sample's last visit.

    With `max_iterations` 0 this is ACERT-fast: there is no root search, and the radius is 0
    where the sample is misclassified and epsilon elsewhere; with the solver `tracked`, it is
    extrapolated from the sample's last visit.
    """
    options = config.root_options(epsilon)
    at_zero = clean_margins(batch.logits.detach(), batch.labels)
    rows = certifiable(at_zero) if epsilon > 0 else batch.labels[:0]
    if options.max_iterations == 0 and options.solver != "tracked":
        radii = torch.zeros_like(batch.images[:, 0, 0, 0]).index_fill(0, rows, epsilon)
        return StepRadii(radii, rows, batch.slopes)
    bounds = config.bound_options
    samples = CleanSamples(batch.images, batch.labels, at_zero)
    if bounds.bound != "ibp" and epsilon > 0:
        found = find_radii(batch.network, samples, epsilon, options, bounds)
        return StepRadii(found.root, rows, batch.slopes)
    guess = _guess(batch, at_zero) if options.solver == "tracked" else None
    if guess is not None and options.xtol < COARSE * epsilon:
        guess = guess.clamp(max=epsilon)
    radii = ibp_radii(batch.network, samples, epsilon, options, bounds, rows=rows, guess=guess).root
    if options.max_iterations == 0:
        # The guess was not evaluated, so remembering its slope would only confirm it.
        return StepRadii(radii, rows, batch.slopes)
    # R is 0 at the root. Where the radius is epsilon instead, this overestimates the slope.
    secants = (-at_zero / radii).to(batch.slopes.dtype)
    slopes = torch.where(secants.isfinite() & (secants > 0), secants, batch.slopes)
    return StepRadii(radii, rows, slopes)


def _guess(batch: CleanBatch, at_zero: Tensor) -> Tensor:
    """Root of the secant of the last visit; samples without one use the median slope."""
    slopes, known = batch.slopes, batch.all_slopes
    median = _median(slopes if known is None else known)
    return -at_zero / torch.where(slopes.isnan(), median, slopes)


def _median(slopes: Tensor) -> Tensor:
    """Median of the finite slopes, NaN without any; unlike nanmedian, the host need not wait."""
    known = slopes.isfinite()
    middle = ((known.sum() - 1) // 2).clamp(min=0)
    return slopes.sort().values.gather(0, middle[None]).squeeze(0)
