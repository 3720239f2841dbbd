"""Estimates of the largest differences of logits over latent boxes, by attacks (Mao et al. 2023).

They are no bounds: an attack may miss the worst point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.attacks.pgd import pgd
from ibpcore.bounds.chunking import default_budget
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork, detached
from ibpcore.training.config import TrainConfig

COPIES = 12
"""Numbers that an attack keeps for each number of a point, about."""


def estimated_differences(
    classifier: FoldedNetwork, box: Interval, labels: Tensor, classes: int, config: TrainConfig
) -> Tensor:
    """(n, classes) f_i - f_y at the worst point of `box` that an attack finds for each i; 0 at y.

    This is the multi-estimator loss of TAPS. The gradient reaches the box through `connected`.

    Args:
        classifier: from latent points to logits.
        box: (n, ...) latent, with gradient.
        labels: (n,).
    """
    others = (labels[:, None] + torch.arange(1, classes, device=labels.device)) % classes
    points = connected(box, worst_points(classifier, box, labels, others, config))
    own = labels.repeat_interleave(classes - 1)
    found = _difference(classifier(points.flatten(0, 1)), others.flatten(), own)
    return found.new_zeros(len(labels), classes).scatter(1, others, found.view_as(others))


@torch.no_grad()
def worst_points(
    classifier: FoldedNetwork, box: Interval, labels: Tensor, others: Tensor, config: TrainConfig
) -> Tensor:
    """(n, m, ...) points of `box`, (n, ...), where PGD finds f_i - f_y largest.

    Args:
        labels: (n,) y.
        others: (n, m) the classes i.
    """
    network, restarts = detached(classifier), config.attack_restarts
    sizes = latent_steps(config.attack_steps, config.attack_step_size)
    each = others.shape[1]
    targets, own = others.flatten(), labels.repeat_interleave(each)
    numbers = COPIES * restarts * each * box.mid[0].numel()
    samples = max(1, default_budget(box.mid.device) // box.mid.element_size() // numbers)

    # The attack numbers its points, n * m in all, instead of knowing their labels.
    def objective(logits: Tensor, index: Tensor) -> Tensor:
        return _difference(logits, targets[index], own[index])

    found = []
    for index in torch.arange(len(targets), device=labels.device).split(samples * each):
        some = Interval(mid=box.mid[index // each], rad=box.rad[index // each])
        worst = pgd(network, some, index, sizes, restarts=restarts, objective=objective)
        found.append(worst.images)
    return torch.cat(found).unflatten(0, others.shape)


def _difference(logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
    """(N,) f_i - f_y for logits (N, classes), i in `targets` and y in `own`, (N,) each."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, own[:, None])).squeeze(1)


def latent_steps(steps: int, size: float) -> tuple[float, ...]:
    """Steps of `size`, and of a fifth of it after 70 % of 10 or more, as published."""
    large = 7 * steps // 10 if steps >= 10 else steps
    return (size,) * large + (size / 5,) * (steps - large)


class _Connector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(mid, rad, points)
        return points.view_as(points)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        mid, rad, points = ctx.saved_tensors
        mid, rad = mid[:, None], rad[:, None]
        place = ((points - mid) / rad).clamp_(-1, 1)
        wide = rad > 0
        both = torch.where(wide, place.abs(), 1)
        return (gradient * both).sum(1), (gradient * torch.where(wide, place, 0)).sum(1), None


def connected(box: Interval, points: Tensor) -> Tensor:
    """`points` of `box`, with a gradient that reaches its ends: the rectified linear connector.

    It goes to the end that is nearer, in full at that end and falling linearly to nothing at the
    middle (the paper's c = 1/2, which all published commands use). Where the box has no width
    there is but one end.

    Args:
        box: (n, ...).
        points: (n, m, ...), without gradient.
    """
    # An end is mid - rad or mid + rad, so what both get goes to mid, and their difference to rad.
    return _Connector.apply(box.mid, box.rad, points)
