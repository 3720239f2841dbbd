"""Exp-IBP (De Palma et al. 2024): a geometric mean of the adversarial and the IBP loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adversarial import expressive_loss
from ibpcore.training.methods.base import CleanBatch, MethodLoss


def exp_ibp_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """L_adv^(1 - alpha) L_IBP^alpha, of mean losses over the batch."""

    def combined(attacked: Tensor, bounds: Tensor, labels: Tensor, alpha: float) -> Tensor:
        # Not a mean over samples, so the other ranks' must be included before the powers.
        losses = [batch.mean_of_all(F.cross_entropy(x, labels)) for x in (attacked, bounds)]
        return _power(losses[0], 1 - alpha) * _power(losses[1], alpha)

    return expressive_loss(batch, epsilon, config, combined)


def _power(loss: Tensor, exponent: float) -> Tensor:
    """loss ** exponent with gradient 0 at 0, where autograd would give 0 * infinity = NaN."""
    zero = loss == 0
    return torch.where(zero, 0.0**exponent, torch.where(zero, 1, loss) ** exponent)
