"""CROWN-IBP training (Zhang et al. 2020): from CROWN-IBP's bounds to IBP's as epsilon grows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.crown_ibp import crown_logits, fused_cross_entropy
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.base import (
    CleanBatch,
    MethodLoss,
    observed,
    on_rows,
    secants,
    total_loss,
)
from ibpcore.training.methods.ibp import ibp_loss_at


def crown_ibp_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """Cross-entropy of beta CROWN-IBP + (1 - beta) IBP, beta from 1 to 0 over the warm-up.

    With `loss_fusion` the two losses are mixed instead of the bounds.
    """
    at = step_radii(batch, epsilon, config)
    beta = 1 - epsilon / config.train_epsilon
    if beta <= 0:
        return ibp_loss_at(batch, at, epsilon, config)
    activations = observed(batch, at)
    images, labels, radii = (at.of(x) for x in (batch.images, batch.labels, at.radii))
    arguments = (batch.network, images, labels, radii)
    options = config.bound_options

    def mixed() -> Tensor:
        crown, ibp = crown_logits(*arguments, options, activations)
        return beta * crown + (1 - beta) * ibp

    def fused() -> Tensor:
        crown, ibp = fused_cross_entropy(*arguments, options, activations)
        return beta * crown + (1 - beta) * F.cross_entropy(ibp, labels, reduction="none")

    def clean() -> Tensor:
        return F.cross_entropy(batch.logits, batch.labels, reduction="none")

    if config.loss_fusion:
        robust = on_rows(at, clean, fused).mean()
    else:
        robust = F.cross_entropy(on_rows(at, batch.differences, mixed), batch.labels)
    # The mixed bounds are not those of the search for radii, so they give no slope for it.
    loss = total_loss(batch, robust, epsilon, config)
    return MethodLoss(loss, at.radii, secants(batch, at), activations)
