"""The warm-up regularisers of FastIBP (Shi et al. 2021, section 3.3), and L1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import Affine, Operator, Relu

TAU = 0.5
"""Tolerance of all three terms."""


class Activations:
    """An observer of one interval pass: what the regularisers need of it.

    Attributes:
        first: the interval that the first affine layer reads, i.e. normalised images.
        relu_inputs: the intervals that the ReLU layers read, in order.
        points: the same of the samples that were not bounded, each (n, ...): their
            intervals are points.
    """

    def __init__(self) -> None:
        self.first: Interval | None = None
        self.relu_inputs: list[Interval] = []
        self.points: list[Tensor] = []

    def __call__(self, operator: Operator, x: Interval) -> None:
        if self.first is None and isinstance(operator, Affine):
            self.first = x
        if isinstance(operator, Relu):
            self.relu_inputs.append(x)


class Sums(NamedTuple):
    """What some samples contribute to the regularisers of a layer, sums over their neurons.

    They add up, whatever parts a batch is cut into.

    Attributes:
        samples: how many.
        width: their mean radii before the first affine layer.
        neurons: how many.
        mid, rad: their centres, their radii.
        actives, inactives: how many neurons always are.
        active, inactive: |centre| of those.
        active_square, inactive_square: (centre - shift)^2 of those.
        shift: a number near the mean of the centres; constant.
    """

    samples: Tensor
    width: Tensor
    neurons: Tensor
    mid: Tensor
    rad: Tensor
    actives: Tensor
    inactives: Tensor
    active: Tensor
    inactive: Tensor
    active_square: Tensor
    inactive_square: Tensor
    shift: Tensor


def activation_sums(activations: Activations) -> Tensor:
    """(2, layers, 12): the `Sums` of the samples that were bounded, and of those that were not."""
    first, points = activations.first, activations.points
    width = None if first is None else first.rad.flatten(1).mean(1).sum()
    parts = (
        [layer_sums(x, width) for x in activations.relu_inputs],
        [layer_sums(Interval(x, torch.zeros_like(x))) for x in points],
    )
    rows = [torch.stack(part) for part in parts if part]
    if not rows:
        return torch.zeros(2, 0, len(Sums._fields))
    return torch.stack(rows if len(rows) == 2 else [*rows, torch.zeros_like(rows[0])])


def layer_sums(x: Interval, width: Tensor | None = None) -> Tensor:
    """(12,) the `Sums` of one ReLU layer's input, (n, ...)."""
    mid, rad = x.mid, x.rad
    active, inactive = mid > rad, mid < -rad
    shift = mid.detach().sum() / max(mid.numel(), 1)
    size, square = mid.abs(), (mid - shift).square()
    sums = Sums(
        mid.new_full((), len(mid)),
        mid.new_zeros(()) if width is None else width,
        mid.new_full((), mid.numel()),
        mid.sum(),
        rad.sum(),
        active.sum().to(mid),
        inactive.sum().to(mid),
        (size * active).sum(),
        (size * inactive).sum(),
        (square * active).sum(),
        (square * inactive).sum(),
        shift,
    )
    return torch.stack(sums)


def warmup_regularizer(sums: Tensor) -> Tensor:
    """Tightness plus ReLU balance, averaged over the ReLU layers; a scalar.

    Both compare sums over the whole batch, bounded samples or not.

    Args:
        sums: (parts, layers, 12), `activation_sums` of all parts of the batch.
    """
    if sums.shape[1] == 0:
        return sums.new_zeros(())
    return (tightness(sums) + relu_balance(sums)).mean()


def tightness(sums: Tensor) -> Tensor:
    """relu(tau - mean(rad_0) / mean(rad_l)) / tau, (layers,): bounds shall not widen on the way."""
    whole = Sums(*sums.sum(0).unbind(-1))
    return _shortfall(whole.width / whole.samples, whole.rad / whole.neurons)


def relu_balance(sums: Tensor) -> Tensor:
    """(relu(tau - q_mean) + relu(tau - q_var)) / tau for each ReLU layer, (layers,).

    q_mean and q_var compare what always-active and always-inactive neurons contribute:
    the sum of |centre|, and of the squared deviation of the centre from its mean, the
    smaller over the larger.
    """
    parts, whole = Sums(*sums.unbind(-1)), Sums(*sums.sum(0).unbind(-1))
    # From the shift of each part to the mean of all: sum (m - mean)^2 in terms of m - shift.
    off = parts.shift - whole.mid / whole.neurons
    active = parts.active_square + off * (
        2 * (parts.active - parts.shift * parts.actives) + off * parts.actives
    )
    inactive = parts.inactive_square + off * (
        off * parts.inactives - 2 * (parts.inactive + parts.shift * parts.inactives)
    )
    return _imbalance(whole.active, whole.inactive) + _imbalance(active.sum(0), inactive.sum(0))


def _imbalance(a: Tensor, b: Tensor) -> Tensor:
    return _shortfall(torch.minimum(a, b), torch.maximum(a, b))


def _shortfall(numerator: Tensor, denominator: Tensor) -> Tensor:
    """relu(tau - numerator / denominator) / tau; 0 where that is not finite."""
    finite = numerator.isfinite() & denominator.isfinite()
    short = finite & (numerator < TAU * denominator)
    # Divide by 1 where nothing is short: `where` alone would pass back a NaN gradient of a
    # quotient by nearly 0.
    ratio = numerator / torch.where(short, denominator, 1)
    return torch.where(short, (TAU - ratio) / TAU, 0)


def l1_norm(model: nn.Module) -> Tensor:
    """Sum of |w| over the weights of the affine layers; a scalar."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return torch.stack([weight.abs().sum() for weight in weights]).sum()
