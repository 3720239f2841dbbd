"""MTL-IBP (De Palma et al. 2024): a weighted mean of the adversarial and the IBP loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adversarial import expressive_loss
from ibpcore.training.methods.base import CleanBatch, MethodLoss


def mtl_ibp_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """(1 - alpha) L_adv + alpha L_IBP."""
    return expressive_loss(batch, epsilon, config, _mean_of_losses)


def _mean_of_losses(attacked: Tensor, bounds: Tensor, labels: Tensor, alpha: float) -> Tensor:
    adversarial = F.cross_entropy(attacked, labels)
    return (1 - alpha) * adversarial + alpha * F.cross_entropy(bounds, labels)
