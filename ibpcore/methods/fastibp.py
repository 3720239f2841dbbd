"""FastIBP (Shi et al. 2021): every sample at the scheduled epsilon."""

from __future__ import annotations

import torch

from ibpcore.config import TrainConfig
from ibpcore.methods.base import CleanBatch, MethodLoss, loss_at_radii


def fastibp(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """IBP cross-entropy at one radius for all (eq. 5)."""
    radii = torch.full_like(batch.images[:, 0, 0, 0], epsilon)
    return loss_at_radii(batch, radii, None if epsilon > 0 else batch.labels[:0], config)
