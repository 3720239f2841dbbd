"""TAPS and STAPS (Mao et al. 2023): IBP up to a latent layer, attacks on the layers after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.ibp import box_logits
from ibpcore.bounds.network import split
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.adversarial import attacked_balls
from ibpcore.training.methods.base import (
    CleanBatch,
    MethodLoss,
    observed,
    on_rows,
    secants,
    total_loss,
)
from ibpcore.training.methods.estimators import estimated_differences
from ibpcore.training.methods.sabr import Boxes, box_loss, shrinking, small_boxes


def taps_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """TAPS's loss of the balls times their IBP loss (arXiv 2305.04574)."""
    return _connected_loss(batch, epsilon, config, attacked_balls)


def staps_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """TAPS's loss of the small boxes of SABR times their IBP loss."""
    return _connected_loss(batch, epsilon, config, small_boxes)


def _connected_loss(
    batch: CleanBatch, epsilon: float, config: TrainConfig, boxes: Boxes
) -> MethodLoss:
    """As published, it is the IBP loss alone until epsilon has its final value."""
    at = step_radii(batch, epsilon, config)
    if epsilon < config.train_epsilon:
        return box_loss(batch, at, epsilon, config, boxes)
    activations = observed(batch, at)
    network = shrinking(batch.network, config.relu_shrinkage)
    features, classifier = split(network, config.classifier_size)
    classes = batch.logits.shape[1]

    def logits() -> Tensor:
        labels = at.of(batch.labels)
        latent = features(boxes(batch, at, config), activations)
        estimates = estimated_differences(classifier, latent, labels, classes, config)
        bounds = box_logits(classifier, latent, labels, config.bound_options, activations)
        return torch.stack([estimates, bounds], 1)

    def clean() -> Tensor:
        return torch.stack([batch.differences()] * 2, 1)

    estimates, bounds = on_rows(at, clean, logits).unbind(1)
    # Not a mean over samples, so the other ranks' must be included before the product.
    taps, ibp = (batch.mean_of_all(F.cross_entropy(x, batch.labels)) for x in (estimates, bounds))
    robust = _with_gradient(taps, config.taps_weight) * ibp
    loss = total_loss(batch, robust, epsilon, config)
    return MethodLoss(loss, at.radii, secants(batch, at), activations)


def _with_gradient(loss: Tensor, weight: float) -> Tensor:
    """`loss`, a scalar, with `weight` times its gradient."""
    constant = loss.detach()
    return constant + weight * (loss - constant)
