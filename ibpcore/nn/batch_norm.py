"""Batch norm that returns its statistics with gradient, and statistics over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.distributed import Ranks, gathered
from ibpcore.errors import UserError


class _BatchStatistics(torch.autograd.Function):
    """Returns mean and variance unchanged, and passes the gradient of both to `x`.

    d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        return mean.clone(), variance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2 / count * grad_variance
        shift = grad_mean / count - slope * mean
        along = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(along), x, slope.view(along)), None, None


def batch_normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of `x`, and these statistics.

    Args:
        x: (B, channels, ...).
        weight, bias: (channels,) or None.
        eps: added to the variance.

    Returns:
        The output, the mean and the (biased) variance, (channels,), all differentiable.

    Raises:
        UserError: there is a single value per channel, which has no variance.
    """
    count = x.numel() // x.shape[1]
    if count == 1:
        raise UserError("batch norm in training mode needs two images or more")
    mean, variance = x.new_zeros(2, x.shape[1]).unbind()
    # With momentum 1 the running statistics become those of the batch.
    output = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
    variance = variance * ((count - 1) / count)
    mean, variance = _BatchStatistics.apply(x, mean, variance)
    return output, mean, variance


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
