"""The warm-up regularisers of FastIBP (Shi et al. 2021, section 3.3), and L1."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import above
from ibpcore.bounds.operators import Affine, Operator, Relu
from ibpcore.nn.initialization import affine_layers

TAU = 0.5
"""Tolerance of all three terms."""


class Activations:
    """An observer of an interval pass, which computes what the regularisers need of it.

    It keeps no interval, so that those between layers are freed while the pass goes on.

    Attributes:
        first: input of the first affine layer, i.e. normalised images.
        bounded: `layer_sums` of the inputs of the ReLU layers, in order.
        points: the same for the samples that are not bounded, whose intervals are points.
    """

    def __init__(self) -> None:
        self.first: Interval | None = None
        self.bounded: list[Tensor] = []
        self.points: list[Tensor] = []

    def __call__(self, operator: Operator, x: Interval) -> None:
        if self.first is None and isinstance(operator, Affine):
            self.first = x
        if isinstance(operator, Relu):
            self.bounded.append(layer_sums(x, self._width()))

    def _width(self) -> Tensor | None:
        """Sum of the samples' mean radii before the first affine layer, if there was one."""
        return None if self.first is None else self.first.rad.flatten(1).mean(1).sum()


class Sums(NamedTuple):
    """Sums over samples and neurons from which the regularisers of a layer are computed.

    They are additive: the parts of a batch have the same sums as the batch.

    Attributes:
        samples: number of samples.
        width: sum of the samples' mean radii before the first affine layer.
        neurons: number of neurons of all samples.
        mid, rad: sums of their centres and radii.
        actives, inactives: numbers of always-active and always-inactive neurons.
        active, inactive: sums of their |centre|.
        active_square, inactive_square: sums of their (centre - shift)^2.
        shift: a constant near the mean of the centres.
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
    """(2, layers, 12) the `Sums` of the bounded samples, and of the others."""
    parts = activations.bounded, activations.points
    rows = [torch.stack(part) for part in parts if part]
    if not rows:
        return torch.zeros(2, 0, len(Sums._fields))
    return torch.stack(rows if len(rows) == 2 else [*rows, torch.zeros_like(rows[0])])


def point_sums(x: Tensor) -> Tensor:
    """(12,) the `Sums` of the input of a ReLU layer, (n, ...), for intervals that are points."""
    return _LayerSums.apply(x, None, x.new_zeros(()))


def layer_sums(x: Interval, width: Tensor | None = None) -> Tensor:
    """(12,) the `Sums` of the input of a ReLU layer, (n, ...)."""
    return _LayerSums.apply(x.mid, x.rad, x.mid.new_zeros(()) if width is None else width)


class _LayerSums(torch.autograd.Function):
    """Keeps one tensor of the layer's size for its gradient, where autograd would keep four.

    Masks are applied by `above`: products and `where` of booleans take ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor | None, width: Tensor) -> Tensor:
        shift = mid.sum() / max(mid.numel(), 1)
        # Positive where active, negative where inactive, and 0 in between.
        stable = mid if rad is None else above(mid, mid.abs().sub_(rad))
        ctx.save_for_backward(stable, shift)
        active, inactive = stable.clamp_min(0), stable.clamp_max(0).neg_()
        from_shift = mid - shift
        sums = Sums(
            mid.new_full((), len(mid)),
            width,
            mid.new_full((), mid.numel()),
            mid.sum(),
            mid.new_zeros(()) if rad is None else rad.sum(),
            active.sign().sum(),
            inactive.sign().sum(),
            active.sum(),
            inactive.sum(),
            above(from_shift, active).square_().sum(),
            above(from_shift, inactive).square_().sum(),
            shift,
        )
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        stable, shift = ctx.saved_tensors
        to = Sums(*grad.unbind())
        from_shift = stable - shift
        active = from_shift.mul(2 * to.active_square).add_(to.active)
        inactive = from_shift.mul_(2 * to.inactive_square).sub_(to.inactive)
        grad_mid = above(active, stable).add_(above(inactive, stable.neg())).add_(to.mid)
        grad_rad = to.rad.expand_as(stable) if ctx.needs_input_grad[1] else None
        return grad_mid, grad_rad, to.width


def warmup_regularizer(sums: Tensor) -> Tensor:
    """Tightness plus ReLU balance, averaged over the ReLU layers; a scalar.

    Both compare sums over the whole batch, including samples that are not bounded.

    Args:
        sums: (parts, layers, 12), `activation_sums` of all parts of the batch.
    """
    if sums.shape[1] == 0:
        return sums.new_zeros(())
    return (tightness_regularizer(sums) + balance_regularizer(sums)).mean()


def tightness_regularizer(sums: Tensor) -> Tensor:
    """relu(tau - mean(rad_0) / mean(rad_l)) / tau, (layers,): penalises bounds that widen."""
    whole = Sums(*sums.sum(0).unbind(-1))
    return _shortfall(whole.width / whole.samples, whole.rad / whole.neurons)


def balance_regularizer(sums: Tensor) -> Tensor:
    """(relu(tau - q_mean) + relu(tau - q_var)) / tau for each ReLU layer, (layers,).

    q_mean and q_var compare always-active and always-inactive neurons: their sums of
    |centre|, and of squared deviations of the centre from its mean, the smaller sum divided
    by the larger.
    """
    parts, whole = Sums(*sums.unbind(-1)), Sums(*sums.sum(0).unbind(-1))
    # Shifts each part's sums to the common mean: sum (m - mean)^2 in terms of m - shift.
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
    # Divides by 1 elsewhere: `where` alone would propagate the NaN gradient of a division by
    # nearly 0.
    ratio = numerator / torch.where(short, denominator, 1)
    return torch.where(short, (TAU - ratio) / TAU, 0)


def l1_norm(model: nn.Module) -> Tensor:
    """Sum of |w| over the weights of the affine layers; a scalar."""
    weights = [layer.weight for layer in affine_layers(model)]
    return torch.stack([weight.abs().sum() for weight in weights]).sum()
