"""Losses between the adversarial and the IBP loss, from attacks and from bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ibpcore.attacks.pgd import Attack, constant_steps, cross_entropy, pgd
from ibpcore.bounds.ibp import differences
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import detached
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods import base
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.base import CleanBatch, MethodLoss, StepRadii

StepSizes = Callable[[int, float], Sequence[float]]
"""(number of steps, size of the first as a share of the radius) -> the sizes of all."""
Combination = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(adversarial differences, their IBP bounds, both (B, classes), labels (B,), alpha) -> scalar."""


def attacked_balls(
    batch: CleanBatch, at: StepRadii, config: TrainConfig, scale: float = 1.0
) -> Interval:
    """The balls of the samples `at.rows`, (n, C, H, W), with radii scaled by `scale`."""
    radii = scale * at.of(at.radii)
    return Interval.ball(at.of(batch.images), radii, config.bound_options.clip, check=False)


def attack_batch(
    batch: CleanBatch, at: StepRadii, box: Interval, schedule: StepSizes, config: TrainConfig
) -> Attack:
    """Points of `box`, (n, C, H, W) for `at.rows`, with the largest cross-entropy found.

    The attack uses the network with the clean batch's statistics, like the bounds: points
    that are adversarial for other statistics need not be adversarial for these.
    """
    network, labels = detached(batch.network), at.of(batch.labels)
    sizes, restarts = schedule(config.attack_steps, config.attack_step_size), config.attack_restarts
    return pgd(network, box, labels, sizes, restarts=restarts, objective=cross_entropy)


def adversarial_logits(batch: CleanBatch, at: StepRadii, config: TrainConfig) -> Tensor:
    """(B, classes) differences f_i - f_y at adversarial points, with gradient."""

    def logits() -> Tensor:
        balls = attacked_balls(batch, at, config, config.attack_scale)
        worst = attack_batch(batch, at, balls, constant_steps, config)
        return differences(batch.network(worst.images), at.of(batch.labels))

    return base.on_rows(at, batch.differences, logits)


def expressive_loss(
    batch: CleanBatch, epsilon: float, config: TrainConfig, combine: Combination
) -> MethodLoss:
    """A mix of adversarial and IBP loss by `combine` (De Palma et al. 2024, arXiv 2305.13991)."""
    at = step_radii(batch, epsilon, config)
    activations = base.observed(batch, at)
    bounds = base.bounded_logits(batch, at, config, activations)
    attacked = adversarial_logits(batch, at, config)
    robust = combine(attacked, bounds, batch.labels, config.ibp_weight)
    loss = base.total_loss(batch, robust, epsilon, config)
    return MethodLoss(loss, at.radii, base.slopes_to(batch, bounds, at), activations)
