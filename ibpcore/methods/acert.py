"""ACERT (arXiv 2307.13078): every sample at its own certified radius."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.folding import in_bfloat16
from ibpcore.margins import clean_margins
from ibpcore.methods.base import CleanBatch, MethodLoss, loss_at_radii
from ibpcore.radius import certifiable, solve_radii


def acert(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """IBP cross-entropy at E_cert(x), capped at the scheduled epsilon (eq. 9).

    With `max_iterations` 0 this is ACERT-fast: no root is sought, the radius is 0 where
    the sample is misclassified and epsilon elsewhere; with the solver `tracked` it is
    what the sample's last visit suggests.
    """
    with torch.no_grad():
        at_zero = clean_margins(batch.logits, batch.labels)
        rows = certifiable(at_zero) if epsilon > 0 else batch.labels[:0]
        radii = _radii(batch, at_zero, rows, epsilon, config)
    return loss_at_radii(batch, radii, rows, config)


def _radii(
    batch: CleanBatch, at_zero: Tensor, rows: Tensor, epsilon: float, config: TrainConfig
) -> Tensor:
    """(B,) radii to train at; the solver's estimate, which need not be certified."""
    options = config.root_options()
    if options.max_iterations == 0 and options.solver != "tracked":
        return torch.zeros_like(batch.images[:, 0, 0, 0]).index_fill(0, rows, epsilon)
    # A sample that was never visited starts from what is usual.
    slopes = torch.where(batch.slopes.isnan(), batch.slopes.nanmedian(), batch.slopes)
    return solve_radii(
        in_bfloat16(batch.network) if config.bfloat16 else batch.network,
        at_zero,
        batch.images,
        batch.labels,
        epsilon,
        options,
        rows=rows,
        guess=-at_zero / slopes,
        elide=config.elide,
        clip=config.clip_range,
    ).root
