"""PGD attacks: gradient ascent to the points of a box where a classifier does worst.

The radius of a successful attack is an upper bound on the image's certified radius. Several
training methods use attacks for the adversarial part of their loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.checks import check_label_shape
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork, detached
from ibpcore.errors import UserError

ATTACK_BATCH = 128
"""Points, one for each sample and restart, that `pgd_attacker` moves at a time."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, classes), labels (N,)) -> (N,), to be maximised."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample, (B,), from logits (B, classes) and labels (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


class Attack(NamedTuple):
    """The worst points found, one per sample.

    Attributes:
        images: (B, C, H, W) in the box.
        values: (B,) the objective at these.
    """

    images: Tensor
    values: Tensor


Attacker = Callable[[Interval, Tensor], Attack]
"""(box (B, C, H, W), labels (B,)) -> the worst points of it; a margin of 0 or more is a success."""


def constant_steps(steps: int, size: float) -> tuple[float, ...]:
    """`steps` steps of the same size."""
    return (size,) * steps


def decaying_steps(steps: int, size: float) -> tuple[float, ...]:
    """Step sizes divided by 10 after 50 %, 80 % and 90 % of the steps (Müller et al. 2023)."""
    # In integers, since 0.8 * 10 need not be 8 in floating point.
    milestones = [-(-tenths * steps // 10) for tenths in (5, 8, 9)]
    return tuple(size * 0.1 ** sum(step >= m for m in milestones) for step in range(steps))


def pgd(
    network: Callable[[Tensor], Tensor],
    box: Interval,
    labels: Tensor,
    step_sizes: Sequence[float],
    *,
    restarts: int = 1,
    objective: Objective = clean_margins,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Attack:
    """Projected gradient ascent (Madry et al. 2018) from random points of a box.

    It returns the worst of all points visited, including the centre of the box. With the
    objective `clean_margins`, R(0) at that point, a value of 0 or more is a success. All restarts
    go through the network as one batch.

    Args:
        network: maps images to logits, the same function at every call.
        box: (B, C, H, W), such as `Interval.ball`; starts are uniform in all of it.
        labels: (B,).
        step_sizes: of each step along the sign of the gradient, as fractions of the
            half width of the box, pixel by pixel.
        restarts: number of random starts.
        generator: for the random starts; None for torch's global one.
        start: a point (B, C, H, W) of the box to start from each time, instead of random ones.

    Raises:
        UserError: `box` is no Interval, or the labels are not one integer for each image.
    """
    if not isinstance(box, Interval):
        raise UserError(f"an attack takes an Interval, not {type(box).__name__}")
    check_label_shape(labels, box.mid)
    with torch.no_grad():
        worst = Attack(box.mid, objective(network(box.mid), labels))
    if restarts == 0:
        return worst
    points = [_random(box, generator) if start is None else start for _ in range(restarts)]
    mid, rad, goals, values = (_repeated(x, restarts) for x in (box.mid, box.rad, labels, worst[1]))
    lower, upper, found = mid - rad, mid + rad, Attack(mid, values)
    # Rounding must not move a start out of the box.
    x = torch.clamp(torch.cat(points), lower, upper)
    for size in step_sizes:
        gradient, values = _gradient(network, x, goals, objective)
        found = _worse(found, x, values)
        x = torch.clamp(torch.addcmul(x, rad, gradient.sign(), value=size), lower, upper)
    with torch.no_grad():
        found = _worse(found, x, objective(network(x), goals))
    for images, values in zip(*(part.chunk(restarts) for part in found), strict=True):
        worst = _worse(worst, images, values)
    return worst


def _repeated(x: Tensor, times: int) -> Tensor:
    """x, (B, ...), so many times, (times * B, ...)."""
    return x.expand(times, *x.shape).flatten(0, 1)


def _random(box: Interval, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(box.rad).uniform_(-1, 1, generator=generator)
    return box.mid + noise * box.rad


def pgd_attacker(
    network: FoldedNetwork, steps: int, restarts: int, generator: torch.Generator
) -> Attacker:
    """`pgd` on the margin, batch by batch, with steps that decay from half the radius."""
    network, sizes = detached(network), decaying_steps(steps, 0.5)

    def attack(box: Interval, labels: Tensor) -> Attack:
        samples = max(1, ATTACK_BATCH // max(1, restarts))
        batches = zip(*(t.split(samples) for t in (box.mid, box.rad, labels)), strict=True)
        parts = [
            pgd(
                network,
                Interval(mid=mid, rad=rad),
                some,
                sizes,
                restarts=restarts,
                generator=generator,
            )
            for mid, rad, some in batches
        ]
        return Attack(*(torch.cat(column) for column in zip(*parts, strict=True)))

    return attack


def _gradient(
    network: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The gradient of the objective with respect to the images, and its values, (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = objective(network(x), labels)
        (gradient,) = torch.autograd.grad(values, x, torch.ones_like(values))
    return gradient, values.detach()


def _worse(worst: Attack, x: Tensor, values: Tensor) -> Attack:
    better = values > worst.values
    where = better.view(-1, *[1] * (x.dim() - 1))
    return Attack(torch.where(where, x, worst.images), torch.where(better, values, worst.values))
