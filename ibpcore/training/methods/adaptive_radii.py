"""The radii of a training step: the scheduled epsilon, or each sample's own for ACERT."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.ibp import clean_margins
from ibpcore.certification.radii import CleanSamples, certifiable, find_radii, ibp_roots
from ibpcore.roots import Estimate
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.base import CleanBatch, Searched, StepRadii

COARSE = 0.005
"""If the tolerance is below this fraction of epsilon, every radius is doubted."""
DEVIATIONS = 2.0
"""The error of a slope that was expected, in mean deviations."""
ACCEPTED = 0.02
"""Mean doubt that needs no pass, as a share of epsilon, unless radii are precise."""


def step_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """The scheduled `epsilon` for all samples, or with `adaptive`, E_cert(x) up to it."""
    if batch.at is not None:
        return batch.at
    if config.adaptive:
        return adaptive_radii(batch, epsilon, config)
    radii = batch.images.new_full((len(batch.images),), epsilon)
    return StepRadii(radii, None if epsilon > 0 else batch.labels[:0])


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
        return StepRadii(radii, rows)
    bounds = config.bound_options
    samples = CleanSamples(batch.images, batch.labels, at_zero)
    if bounds.bound != "ibp" and epsilon > 0:
        return StepRadii(find_radii(batch.network, samples, epsilon, options, bounds).root, rows)
    if len(rows) == 0:
        return StepRadii(torch.zeros_like(at_zero), rows)
    samples = CleanSamples(*(part.index_select(0, rows) for part in samples))
    ceiling = torch.full_like(samples.at_zero, epsilon)
    start = None
    if options.solver == "tracked":
        slopes = batch.slopes.index_select(0, rows)
        slack = 0.0 if options.xtol < COARSE * epsilon else ACCEPTED * epsilon
        start = _start(-samples.at_zero / slopes, batch.deviation, ceiling, slack)
    found = ibp_roots(batch.network, samples, ceiling, options, bounds, start)
    roots = found.root.nan_to_num(nan=epsilon)  # R(epsilon) < 0 where there is none
    radii = torch.zeros_like(at_zero).index_copy(0, rows, roots)
    return StepRadii(radii, rows, Searched(at_zero, found.evaluations > 1))


def _start(guess: Tensor, deviation: Tensor | float, ceiling: Tensor, slack: float) -> Estimate:
    """The radii to expect from the slopes, and how far the slopes' deviation makes them doubtful.

    A radius is not doubted if it would exceed the ceiling, epsilon, even with a steeper slope.
    All are doubted without slack, and those of samples that were never visited.

    Args:
        guess: (n,) where the margins reach 0 with these slopes, NaN if there is none.
        deviation: of the logarithms of the slopes, a scalar.
        ceiling: (n,) epsilon.
        slack: mean doubt that needs no pass; 0 if radii must be precise.
    """
    if slack == 0:
        return Estimate(guess, torch.full_like(guess, torch.inf))
    error = guess * (DEVIATIONS * deviation)
    doubt = torch.minimum(error, (ceiling - guess + error).clamp_(min=0))
    return Estimate(guess, doubt.nan_to_num_(nan=torch.inf), slack)
