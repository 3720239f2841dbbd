"""Batch norm that returns its scale and shift with gradient, and statistics over all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.distributed import Ranks, gathered
from ibpcore.errors import UserError


class Running(NamedTuple):
    """The running statistics of a layer, each (channels,), and the weight of a new batch."""

    mean: Tensor
    variance: Tensor
    momentum: float


class Normalized(NamedTuple):
    """What batch norm with the statistics of `x` computes, and its gradient needs.

    Attributes:
        x: (B, channels, ...), its input.
        weight: (channels,) or None.
        mean, inverse: (channels,) mean of x, and 1 / sqrt(variance + eps).
        scale: (channels,) weight * inverse.
    """

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    inverse: Tensor
    scale: Tensor


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None,
) -> tuple[Tensor, Normalized]:
    """The output of batch norm, and what `norm_gradients` needs. Arguments: `batch_normalized`."""
    if x.numel() == x.shape[1]:
        raise UserError("batch norm in training mode needs two images or more")
    former_mean, former_variance, momentum = running or (None, None, 0.0)
    # Unlike `F.batch_norm` it returns the statistics.
    output, mean, inverse = torch.native_batch_norm(
        x, weight, bias, former_mean, former_variance, True, momentum, eps
    )
    scale = inverse.clone() if weight is None else inverse * weight
    return output, Normalized(x, weight, mean, inverse, scale)


def norm_gradients(
    at: Normalized, eps: float, output: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, from those of the output, the scale and the shift.

    Args:
        output: (B, channels, ...), or None for 0.
        scale, shift: (channels,) each, or both None for 0. The shift is bias - mean * scale plus
            a multiple of the scale; its dependence on the scale is part of the gradient `scale`.
    """
    affine = at.weight is not None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if output is None:
        grad = torch.zeros_like(at.x)
    else:
        grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *(output, at.x, at.weight, None, None, at.mean, at.inverse),
            *(True, eps, [True, affine, affine]),
        )
    if scale is None or shift is None:
        return grad, grad_weight, grad_bias
    # With n values, d mean / dx = 1 / n, and d inverse / dx = -inverse^3 (x - mean) / n.
    slope = (scale * at.scale).mul_(at.inverse).mul_(at.inverse)
    offset = torch.addcmul(shift * at.scale, slope, at.mean, value=-1)
    along = (-1, *[1] * (at.x.dim() - 2))
    both = torch.addcmul(offset.view(along), at.x, slope.view(along))
    grad.add_(both, alpha=-at.x.shape[1] / at.x.numel())
    if grad_weight is not None and grad_bias is not None:
        return grad, grad_weight.addcmul_(scale, at.inverse), grad_bias.add_(shift)
    return (grad, scale * at.inverse, shift) if affine else (grad, None, None)


class _BatchNorm(torch.autograd.Function):
    """y = scale * x + shift, whose scale and shift depend on x too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, at = normalized(x, weight, bias, eps, running)
        ctx.save_for_backward(*at)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        if bias is None:
            return output, at.scale, -at.mean * at.scale
        return output, at.scale, torch.addcmul(bias, at.mean, at.scale, value=-1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, output: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        at = Normalized(*ctx.saved_tensors)
        if shift is not None:
            scale = torch.zeros_like(shift) if scale is None else scale
            scale = torch.addcmul(scale, at.mean, shift, value=-1)
        elif scale is not None:
            shift = torch.zeros_like(scale)
        return *norm_gradients(at, ctx.eps, output, scale, shift), None, None


def batch_normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of `x`, and the affine map of each channel that it is.

    Args:
        x: (B, channels, ...).
        weight, bias: (channels,) each, or both None.
        eps: added to the variance.
        running: statistics to update, as `nn.BatchNorm2d` does, with the unbiased variance.

    Returns:
        The output, and scale and shift with output = scale * x + shift, (channels,); all
        differentiable.

    Raises:
        UserError: there is a single value per channel, which has no variance.
    """
    return _BatchNorm.apply(x, weight, bias, eps, running)


def shared_statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean and biased variance (channels,) of the combined batches of all ranks.

    Args:
        x: (B, channels, ...) this rank's share, with at least one value per channel.
        ranks: all of them must call this.
    """
    others = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x, others, correction=0)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    counts, means, variances = gathered(torch.stack([count, mean, variance]), ranks).unbind(1)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    # Chan et al.: avoids the difference of large squares.
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return counts.sum(0)[0], mean, variance
