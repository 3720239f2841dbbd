"""Standard training without bounds; certificates are not to be expected."""

from __future__ import annotations

import torch.nn.functional as F

from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.base import CleanBatch, MethodLoss


def standard_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """Cross-entropy of the clean logits (eq. 10)."""
    radii = batch.logits.new_zeros(len(batch.logits))
    return MethodLoss(F.cross_entropy(batch.logits, batch.labels), radii, batch.slopes)
