"""Exp-IBP (De Palma et al. 2024): a geometric mean of the adversarial and the IBP loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.methods.adversarial import expressive_loss
from ibpcore.methods.base import CleanBatch, MethodLoss


def exp_ibp(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """L_adv^(1 - alpha) L_IBP^alpha."""
    return expressive_loss(batch, epsilon, config, _combined)


def _combined(attacked: Tensor, bounds: Tensor, labels: Tensor, alpha: float) -> Tensor:
    adversarial = F.cross_entropy(attacked, labels)
    return adversarial ** (1 - alpha) * F.cross_entropy(bounds, labels) ** alpha
