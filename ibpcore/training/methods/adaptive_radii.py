"""The radii of a training step: the scheduled epsilon, each sample's own, or random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.ibp import clean_margins, margins
from ibpcore.certification.radii import (
    CleanSamples,
    certifiable,
    find_radii,
    ibp_radii,
    indices_of,
    on_lanes,
)
from ibpcore.roots.base import ONE, constant
from ibpcore.roots.warm_start import Tolerance, approach
from ibpcore.training.config import TrainConfig
from ibpcore.training.effort import accepted_doubt, worth_leaving_out
from ibpcore.training.methods.base import CleanBatch, Searched, StepRadii
from ibpcore.training.presets import IBP_ALONE

COARSE = 0.005
"""If the tolerance is below this fraction of epsilon, every radius is doubted."""
DEVIATIONS = constant(2.0)
"""The error of a slope that was expected, in mean deviations."""
NEAREST = 1e-4
"""The least radius that a search starts from, as a share of epsilon."""
FLOOR = 0.05
"""Added to the error of a small radius: as a share of epsilon, for each mean deviation."""


def step_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """The scheduled `epsilon` for all samples, or the radii of `adaptive` or `random_radii`."""
    if batch.at is not None:
        return batch.at
    if config.adaptive:
        return adaptive_radii(batch, epsilon, config)
    if config.random_radii:
        return random_radii(batch, epsilon, config)
    images = batch.images
    radii = torch.full((len(images),), epsilon, dtype=images.dtype, device=images.device)
    return StepRadii(radii, None if epsilon > 0 else batch.labels[:0])


def random_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """Uniform in [0, `epsilon`] for the samples that are classified correctly, 0 for the others.

    The mean loss of a sample is then that of all radii up to epsilon, as ACR counts them all.
    """
    open_ = certifiable(clean_margins(batch.logits.detach(), batch.labels))
    rows = indices_of(open_) if epsilon > 0 else batch.labels[:0]
    images = batch.images
    radii = epsilon * torch.rand(len(images), dtype=images.dtype, device=images.device)
    radii = radii.masked_fill_(~open_, 0)
    return StepRadii(radii, _bounded(batch, rows, config) if len(rows) > 0 else rows)


def adaptive_radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> StepRadii:
    """E_cert(x), capped at the scheduled epsilon (arXiv 2307.13078, eq. 8-9).

    It is by all bounds up to `train_bound`; with another than IBP, no search starts at the
    sample's last visit.

    With `max_iterations` 0 this is ACERT-fast: there is no root search, and the radius is 0
    where the sample is misclassified and epsilon elsewhere; with the solver `tracked`, it is
    extrapolated from the sample's last visit.
    """
    at_zero = clean_margins(batch.logits.detach(), batch.labels).to(batch.images.dtype)
    open_ = certifiable(at_zero)
    rows = indices_of(open_) if epsilon > 0 else batch.labels[:0]
    if len(rows) == 0:
        return StepRadii(torch.zeros_like(at_zero), rows)
    if config.solver == "tracked" and config.train_bound == "ibp":
        return _tracked(batch, at_zero, open_, rows, epsilon, config)
    options, bounds = config.root_options(epsilon), config.bound_options
    if options.max_iterations == 0 and options.solver != "tracked":
        return StepRadii(torch.zeros_like(at_zero).index_fill(0, rows, epsilon), rows)
    samples = CleanSamples(batch.images, batch.labels, at_zero)
    balls = batch.network, samples, epsilon, options, bounds
    if bounds.bound != "ibp":
        return StepRadii(find_radii(*balls).root, rows)
    found = ibp_radii(*balls, rows=rows)
    searched = Searched(at_zero, found.evaluations > 0)
    return StepRadii(found.root, _bounded(batch, rows, config), searched)


@torch.no_grad()
def _tracked(
    batch: CleanBatch,
    at_zero: Tensor,
    open_: Tensor,
    rows: Tensor,
    epsilon: float,
    config: TrainConfig,
) -> StepRadii:
    """Radii near those to expect from the slopes; searched for where these are doubtful.

    Args:
        at_zero: (B,) R(0).
        open_, rows: (B,) the samples with R(0) < 0, and (n,) the same as indices.
    """
    options, network = config.root_options(epsilon), batch.network
    margin = on_lanes(margins, network, batch.images, batch.labels, config.bound_options)
    whole, absolute = (
        torch.full((), x, dtype=at_zero.dtype, device=at_zero.device)
        for x in (epsilon, min(options.xtol / epsilon, 1.0))
    )

    def value(at: Tensor, lanes: Tensor) -> Tensor:
        return margin(at * whole, lanes)

    at = -at_zero / batch.slopes / whole
    if options.xtol < COARSE * epsilon:
        tolerance = Tolerance(absolute, options.rtol)
        doubt = torch.full_like(at, torch.inf)
    else:
        accepted = accepted_doubt(network, batch.images, config.batch_size) * len(rows)
        tolerance = Tolerance(absolute, options.rtol, torch.full_like(whole, accepted))
        doubt = _doubt(at, batch.deviation).nan_to_num_(nan=torch.inf)
    doubt.masked_fill_(~open_, 0)
    at = at.clamp_(NEAREST, 1).nan_to_num_(nan=1)
    found = approach(value, at_zero, at, doubt, tolerance, options.max_iterations, len(rows))
    radii = (found.at * whole).masked_fill_(~open_, 0)
    evaluated = found.opened[0] if found.opened else torch.zeros_like(open_)
    return StepRadii(radii, _bounded(batch, rows, config), Searched(at_zero, evaluated))


def _bounded(batch: CleanBatch, rows: Tensor, config: TrainConfig) -> Tensor | None:
    """`rows`, (n,), or None for all samples where leaving out the others is not worth it.

    Those would be at radius 0, where only the regularisers distinguish points from balls. Methods
    with attacks have much more arithmetic than a pass.
    """
    outside = len(batch.labels) - len(rows)
    attacked = config.method not in IBP_ALONE
    if attacked or batch.relu_inputs is not None:
        return rows
    return rows if worth_leaving_out(batch.network, batch.images, outside) else None


def _doubt(at: Tensor, deviation: Tensor | float) -> Tensor:
    """(B,) how far the deviation of the slopes makes positions doubtful, NaN where unknown.

    A position is not doubted if it would exceed 1, epsilon, even with a steeper slope. One near 0
    is doubted more: slopes there say little about larger radii.

    Args:
        at: (B,) where the margins reach 0 with the slopes, as shares of epsilon.
        deviation: of the logarithms of the slopes, a scalar.
    """
    error = torch.add(at, ONE, alpha=FLOOR) * (DEVIATIONS * deviation)
    return torch.minimum(error, torch.sub(error, at).add_(ONE).clamp_min_(0))
