"""IBP training: cross-entropy of the bounds over each sample's ball.

Four methods use this loss with different settings (`METHOD_PRESETS`):

- `ibp` (Gowal et al. 2018): kappa from 1 to 1/2 as epsilon grows linearly;
- `fastibp` (Shi et al. 2021): IBP initialisation and regularisers during the warm-up;
- `acert` (arXiv 2307.13078): as `fastibp`, but at adaptive radii;
- `random-ibp`: as `acert`, but at random radii.
"""

from __future__ import annotations

import torch.nn.functional as F

from ibpcore.training.config import TrainConfig
from ibpcore.training.methods import base
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.base import CleanBatch, MethodLoss, StepRadii


def ibp_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """Cross-entropy of the IBP robust logits (eq. 5, at adaptive radii eq. 9)."""
    return ibp_loss_at(batch, step_radii(batch, epsilon, config), epsilon, config)


def ibp_loss_at(
    batch: CleanBatch, at: StepRadii, epsilon: float, config: TrainConfig
) -> MethodLoss:
    """`ibp_loss` at given radii."""
    activations = base.observed(batch, at)
    robust = base.bounded_logits(batch, at, config, activations)
    loss = base.total_loss(batch, F.cross_entropy(robust, batch.labels), epsilon, config)
    return MethodLoss(loss, at.radii, base.slopes_to(batch, robust, at), activations)
