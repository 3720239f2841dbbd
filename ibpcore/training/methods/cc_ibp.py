"""CC-IBP (De Palma et al. 2024): the loss of a weighted mean of adversarial and IBP logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adversarial import expressive_loss
from ibpcore.training.methods.base import CleanBatch, MethodLoss


def cc_ibp_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """L((1 - alpha) z_adv + alpha z_IBP), where z are differences f_i - f_y or their bounds."""
    return expressive_loss(batch, epsilon, config, _loss_of_mean)


def _loss_of_mean(attacked: Tensor, bounds: Tensor, labels: Tensor, alpha: float) -> Tensor:
    return F.cross_entropy((1 - alpha) * attacked + alpha * bounds, labels)
