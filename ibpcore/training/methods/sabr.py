"""SABR (Müller et al. 2023): bounds over a small box around an adversarial point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.attacks.pgd import decaying_steps
from ibpcore.bounds.ibp import box_logits
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import Operator, Relu, Signal, mapped
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.adversarial import attack_batch, attacked_balls
from ibpcore.training.methods.base import (
    CleanBatch,
    MethodLoss,
    StepRadii,
    observed,
    on_rows,
    secants,
    total_loss,
)

Boxes = Callable[[CleanBatch, StepRadii, TrainConfig], Interval]
"""-> the boxes of images to bound, (n, C, H, W), those of the samples `StepRadii.rows`."""


def sabr_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> MethodLoss:
    """Cross-entropy of the IBP bounds over the small boxes (arXiv 2210.04871)."""
    return box_loss(batch, step_radii(batch, epsilon, config), epsilon, config, small_boxes)


def box_loss(
    batch: CleanBatch, at: StepRadii, epsilon: float, config: TrainConfig, boxes: Boxes
) -> MethodLoss:
    """Cross-entropy of the IBP bounds over `boxes`, with shrinking ReLUs."""
    activations = observed(batch, at)
    network = shrinking(batch.network, config.relu_shrinkage)

    def logits() -> Tensor:
        box, labels = boxes(batch, at, config), at.of(batch.labels)
        return box_logits(network, box, labels, config.bound_options, activations)

    robust = F.cross_entropy(on_rows(at, batch.differences, logits), batch.labels)
    # Bounds over a part of the ball give no slope of R up to its radius.
    loss = total_loss(batch, robust, epsilon, config)
    return MethodLoss(loss, at.radii, secants(batch, at), activations)


def small_boxes(batch: CleanBatch, at: StepRadii, config: TrainConfig) -> Interval:
    """A small box around an adversarial point of each ball."""
    whole = attacked_balls(batch, at, config)
    center = attack_batch(batch, at, whole, decaying_steps, config).images
    return small_box(whole, center, config.box_size)


def small_box(whole: Interval, center: Tensor, size: float) -> Interval:
    """The box of relative `size` around `center`, moved just enough to lie within `whole`.

    Args:
        whole: the ball, (B, C, H, W), intersected with the pixel range. Where that cuts a
            pixel's interval, the box is narrower too.
        center: (B, C, H, W) in `whole`.
    """
    rad = size * whole.rad
    slack = whole.rad - rad
    return Interval(mid=torch.clamp(center, whole.mid - slack, whole.mid + slack), rad=rad)


@dataclass(frozen=True)
class ShrinkingRelu(Relu):
    """relu with the upper end lowered by the fraction `shrinkage` where the neuron is unstable.

    This is not sound and is used in a loss only.
    """

    shrinkage: float = 0.0

    def __call__(self, x: Signal) -> Signal:
        y = super().__call__(x)
        if not isinstance(y, Interval):
            return y
        # The lower end becomes 0; if the upper end does too, the factor does not matter.
        factor = torch.where(x.mid < x.rad, 1 - self.shrinkage, 1.0)
        return Interval(mid=y.mid * factor, rad=y.rad * factor)


def shrinking(network: FoldedNetwork, shrinkage: float) -> FoldedNetwork:
    """The network with shrinking ReLUs; the published factor c_s = 0.8 is `shrinkage` 0.2."""

    def shrunk(layer: Operator) -> Operator:
        return ShrinkingRelu(shrinkage) if isinstance(layer, Relu) else layer

    if shrinkage == 0:
        return network
    return replace(network, operators=mapped(network.operators, shrunk))
