"""ACERT (arXiv 2307.13078): every sample at its own certified radius."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.margins import clean_margins
from ibpcore.methods.base import CleanBatch, MethodLoss, loss_at_radii
from ibpcore.radius import solve_radii


def acert(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """IBP cross-entropy at E_cert(x), capped at the scheduled epsilon (eq. 9).

    With `max_iterations` 0 this is ACERT-fast: no root is sought, the radius is 0 where
    the sample is misclassified and epsilon elsewhere.
    """
    return loss_at_radii(batch, _radii(batch, epsilon, config), config)


@torch.no_grad()
def _radii(batch: CleanBatch, epsilon: float, config: TrainConfig) -> Tensor:
    """(B,) radii to train at; the solver's estimate, which need not be certified."""
    if config.max_iterations == 0:
        correct = clean_margins(batch.logits, batch.labels) < 0
        return correct.to(batch.images.dtype) * epsilon
    radii = solve_radii(
        batch.network,
        batch.logits,
        batch.images,
        batch.labels,
        epsilon,
        config.root_options(),
        elide=config.elide,
        clip=config.clip_range,
    )
    return radii.root
