"""Exp-IBP (De Palma et al. 2024): a geometric mean of the adversarial and the IBP loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.methods.adversarial import expressive_loss
from ibpcore.methods.base import CleanBatch, MethodLoss


def exp_ibp(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """L_adv^(1 - alpha) L_IBP^alpha."""
    return expressive_loss(batch, epsilon, config, _combined)


def _combined(attacked: Tensor, bounds: Tensor, labels: Tensor, alpha: float) -> Tensor:
    adversarial = _power(F.cross_entropy(attacked, labels), 1 - alpha)
    return adversarial * _power(F.cross_entropy(bounds, labels), alpha)


def _power(loss: Tensor, exponent: float) -> Tensor:
    """loss ** exponent, at 0 with gradient 0: autograd would make NaN of 0 * infinity there."""
    zero = loss == 0
    return torch.where(zero, 0.0**exponent, torch.where(zero, 1, loss) ** exponent)
