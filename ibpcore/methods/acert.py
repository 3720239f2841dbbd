"""ACERT (arXiv 2307.13078): every sample at its own certified radius."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.folding import in_bfloat16
from ibpcore.margins import clean_margins, differences, largest_difference
from ibpcore.methods.base import CleanBatch, MethodLoss, bounded, loss_at_radii, method_loss
from ibpcore.radius import certifiable, solve_radii


def acert(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """IBP cross-entropy at E_cert(x), capped at the scheduled epsilon (eq. 9).

    With `max_iterations` 0 this is ACERT-fast: no root is sought, the radius is 0 where
    the sample is misclassified and epsilon elsewhere; with the solver `tracked` it is
    what the sample's last visit suggests.
    """
    options = config.root_options()
    at_zero = clean_margins(batch.logits.detach(), batch.labels)
    rows = certifiable(at_zero) if epsilon > 0 else batch.labels[:0]
    if options.solver != "tracked" and options.max_iterations == 0:
        radii = torch.zeros_like(batch.images[:, 0, 0, 0]).index_fill(0, rows, epsilon)
        return loss_at_radii(batch, radii, rows, config)
    # The secant of the last visit; a sample that had none starts from what is usual.
    slopes = torch.where(batch.slopes.isnan(), batch.slopes.nanmedian(), batch.slopes)
    guess = -at_zero / slopes
    # Regularisers want every sample in one pass; and on CUDA the host would have to wait.
    if (
        options.solver == "tracked"
        and options.max_iterations > 1
        and batch.relu_inputs is None
        and not batch.images.is_cuda
    ):
        return _at_their_word(batch, at_zero, rows, guess, epsilon, config)
    radii = _radii(batch, at_zero, rows, guess, None, epsilon, config)
    return loss_at_radii(batch, radii, rows, config)


def _radii(
    batch: CleanBatch,
    at_zero: Tensor,
    rows: Tensor,
    guess: Tensor,
    at_max: Tensor | None,
    epsilon: float,
    config: TrainConfig,
) -> Tensor:
    """(B,) radii to train at, 0 outside `rows`; estimates, which need not be certified."""
    return solve_radii(
        in_bfloat16(batch.network) if config.bfloat16 else batch.network,
        at_zero,
        batch.images,
        batch.labels,
        epsilon,
        config.root_options(),
        rows=rows,
        guess=guess,
        at_max=at_max,
        elide=config.elide,
        clip=config.clip_range,
    ).root


def _at_their_word(
    batch: CleanBatch,
    at_zero: Tensor,
    rows: Tensor,
    guess: Tensor,
    epsilon: float,
    config: TrainConfig,
) -> MethodLoss:
    """The loss, spending no pass on R(epsilon) where it is probably negative.

    Samples whose guess is at least epsilon are bounded there for the loss at once. That
    pass tells R(epsilon) too: those that fail join the others, whose roots are sought.
    """
    sure = rows[guess[rows] >= epsilon]
    radii = torch.zeros_like(batch.images[:, 0, 0, 0]).index_fill(0, sure, epsilon)
    robust = bounded(batch, differences(batch.logits, batch.labels), radii, sure, config)
    at_max = torch.full_like(at_zero, torch.nan)
    at_max[sure] = largest_difference(robust.detach(), batch.labels)[sure]
    rest = rows[~(at_max[rows] < 0)]
    # Where R(epsilon) is known, the secant that it gives.
    secant = -at_zero * epsilon / (at_max - at_zero)
    guess = torch.where(at_max.isnan(), guess, secant)
    found = _radii(batch, at_zero, rest, guess, at_max, epsilon, config)
    radii = radii.index_copy(0, rest, found[rest])
    return method_loss(batch, bounded(batch, robust, radii, rest, config), radii, config)
