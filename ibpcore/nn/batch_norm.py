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


class _BatchNorm(torch.autograd.Function):
    """y = scale * x + shift, whose scale and shift depend on x too.

    A single function, since the gradients of all three outputs have parts in common.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        former_mean, former_variance, momentum = running or (None, None, 0.0)
        # Unlike `F.batch_norm` it returns the statistics.
        output, mean, inverse = torch.native_batch_norm(
            x, weight, bias, former_mean, former_variance, True, momentum, eps
        )
        scale = inverse.clone() if weight is None else inverse * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        ctx.save_for_backward(x, weight, mean, inverse, scale)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return output, scale, shift

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_scale: Tensor | None, grad_shift: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, scale = ctx.saved_tensors
        affine = weight is not None
        grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            torch.zeros_like(x) if grad_output is None else grad_output,
            *(x, weight, None, None, mean, inverse, True, ctx.eps, [True, affine, affine]),
        )
        if grad_scale is not None or grad_shift is not None:
            grad_scale = torch.zeros_like(scale) if grad_scale is None else grad_scale
            grad_shift = torch.zeros_like(scale) if grad_shift is None else grad_shift
            # shift depends on scale, which is weight * inverse, and on the mean. With n values,
            # d mean / dx = 1 / n, and d inverse / dx = -inverse^3 (x - mean) / n.
            grad_scale = torch.addcmul(grad_scale, mean, grad_shift, value=-1)
            slope = (grad_scale * scale).mul_(inverse).mul_(inverse)
            offset = torch.addcmul(grad_shift * scale, slope, mean, value=-1)
            along = (-1, *[1] * (x.dim() - 2))
            both = torch.addcmul(offset.view(along), x, slope.view(along))
            grad.add_(both, alpha=-x.shape[1] / x.numel())
            if affine:
                grad_weight.addcmul_(grad_scale, inverse)
                grad_bias.add_(grad_shift)
        return grad, grad_weight, grad_bias, None, None


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
    if x.numel() == x.shape[1]:
        raise UserError("batch norm in training mode needs two images or more")
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
