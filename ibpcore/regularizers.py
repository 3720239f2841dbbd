"""The warm-up regularisers of FastIBP (Shi et al. 2021, section 3.3), and L1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ibpcore.interval import Interval
from ibpcore.steps import Affine, Relu, Step

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

    def __call__(self, step: Step, x: Interval) -> None:
        if self.first is None and isinstance(step, Affine):
            self.first = x
        if isinstance(step, Relu):
            self.relu_inputs.append(x)


def warmup_regularizer(activations: Activations) -> Tensor:
    """Tightness plus ReLU balance, averaged over the ReLU layers; a scalar.

    Both compare sums over the whole batch, bounded samples or not.
    """
    inputs = activations.relu_inputs
    points = [Interval(x, torch.zeros_like(x)) for x in activations.points]
    if inputs and points:
        inputs = [_both(x, y) for x, y in zip(inputs, points, strict=True)]
    inputs = inputs or points
    if not inputs:
        return torch.zeros(())
    total = torch.stack([relu_balance(x) for x in inputs]).sum()
    if activations.first is not None:
        rad, samples = activations.first.rad, len(inputs[0].mid)
        width = rad.mean() * (len(rad) / samples)
        total = total + torch.stack([tightness(width, x) for x in inputs]).sum()
    return total / len(inputs)


def _both(x: Interval, y: Interval) -> Interval:
    return Interval(torch.cat([x.mid, y.mid]), torch.cat([x.rad, y.rad]))


def tightness(first: Tensor, x: Interval) -> Tensor:
    """relu(tau - mean(rad_0) / mean(rad_l)) / tau: bounds shall not widen on the way.

    Args:
        first: mean(rad_0), a scalar.
        x: one ReLU layer's input.
    """
    return _shortfall(first, x.rad.mean())


def relu_balance(x: Interval) -> Tensor:
    """(relu(tau - q_mean) + relu(tau - q_var)) / tau for one ReLU layer's input.

    q_mean and q_var compare what always-active and always-inactive neurons contribute:
    the sum of |centre|, and of the squared deviation of the centre from its mean, the
    smaller over the larger.
    """
    active, inactive = x.lower > 0, x.upper < 0
    deviation = (x.mid - x.mid.mean()).square()
    terms = []
    for value in (x.mid.abs(), deviation):
        a, b = (value * active).sum(), (value * inactive).sum()
        terms.append(_shortfall(torch.minimum(a, b), torch.maximum(a, b)))
    return terms[0] + terms[1]


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
