"""The elementwise work between two affine layers, in few passes over memory.

Convolutions of a narrow network take no longer than the activations between them, so
these have derivatives of their own instead of those that autograd would chain.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.errors import UserError
from ibpcore.ranks import Ranks, gathered


def _forward(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    # Not `lerp`: it subtracts, and so may overflow where the upper end is finite.
    half = torch.add(mid, rad).mul_(0.5)
    relu_rad = torch.clamp(half, mid.new_zeros(()), rad, out=half)
    return torch.maximum(mid, relu_rad), relu_rad


def _backward(
    grad_mid: Tensor, grad_rad: Tensor, relu_mid: Tensor, relu_rad: Tensor
) -> tuple[Tensor, Tensor]:
    # Gradients of the upper and the lower end, twice; mid = rad where the lower end is 0.
    upper = (grad_mid + grad_rad).mul_(relu_mid.sign())
    lower = (grad_mid - grad_rad).mul_((relu_mid - relu_rad).sign_())
    both = torch.lerp(lower, upper, 0.5)
    return both, upper.sub_(both)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    made = torch.compile(kernel, dynamic=True)
    # Detached, since the compiler looks at the gradients of what it is given.
    return lambda *tensors: made(*(tensor.detach() for tensor in tensors))


@cache
def compiled_pass(function: Callable[..., Tensor], cuda_graphs: bool) -> Callable[..., Tensor]:
    """`function`, which makes a tensor by way of a whole network, compiled.

    First for the batch size at hand; once another one is met, for any.

    Args:
        cuda_graphs: run it as CUDA graphs, one a batch size. It must have no gradient then.
    """
    made = torch.compile(function, mode="reduce-overhead" if cuda_graphs else None)

    def run(*args: Any) -> Tensor:
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with warnings.catch_warnings():
            # The compiler looks at the gradients of what it is given, weights or not.
            warnings.filterwarnings("ignore", message="The .grad attribute")
            result = made(*args)
        # The next run of a graph overwrites what this one gives.
        return result.clone() if cuda_graphs else result

    return run


def check_compiler(device: torch.device) -> None:
    """Raises UserError unless `compiled` kernels can be made for `device`."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("compiling for CUDA needs Triton, which is not installed")
        return
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in compilers):
        raise UserError("compiling needs a C++ compiler, and none was found: install g++")


class _IntervalReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
        relu_mid, relu_rad = (_compiled(_forward) if compiled else _forward)(mid, rad)
        # The next affine layer keeps both anyway, for the gradient of its weight.
        ctx.save_for_backward(relu_mid, relu_rad)
        ctx.compiled = compiled
        return relu_mid, relu_rad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mid: Tensor, grad_rad: Tensor) -> tuple[Tensor, Tensor, None]:
        kernel = _compiled(_backward) if ctx.compiled else _backward
        return *kernel(grad_mid, grad_rad, *ctx.saved_tensors), None


def interval_relu(mid: Tensor, rad: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Midpoint and radius of relu over [mid - rad, mid + rad] (eq. 18-19).

    An interval that is always active comes out as it went in, bit by bit; one that
    crosses 0 as [0, mid + rad]; an inactive one as 0. In formulas
    rad' = clamp((mid + rad) / 2, 0, rad) and mid' = max(mid, rad').

    Args:
        mid, rad: same shape, rad >= 0.
        compiled: have `torch.compile` make a single loop of it, which takes some seconds
            the first time and a C++ compiler (on CUDA, Triton).
    """
    compiled = compiled and not torch.compiler.is_compiling()
    if torch.is_grad_enabled() and (mid.requires_grad or rad.requires_grad):
        return _IntervalReLU.apply(mid, rad, compiled)
    return (_compiled(_forward) if compiled else _forward)(mid, rad)


class _BatchStatistics(torch.autograd.Function):
    """Hands on mean and variance, and to `x` the gradient of both.

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


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of `x`, and those statistics.

    Args:
        x: (B, channels, ...).
        weight, bias: (channels,) or None.
        eps: added to the variance.

    Returns:
        The output, the mean and the (biased) variance, (channels,), all differentiable.

    Raises:
        UserError: a single value a channel, which has no variance.
    """
    count = x.numel() // x.shape[1]
    if count == 1:
        raise UserError("batch norm in training needs two images or more: give them, or eval()")
    mean, variance = x.new_zeros(2, x.shape[1]).unbind()
    # With momentum 1 the running statistics become those of the batch.
    output = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
    variance = variance * ((count - 1) / count)
    mean, variance = _BatchStatistics.apply(x, mean, variance)
    return output, mean, variance


def shared_statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean and biased variance (channels,) of the batches of all ranks together.

    Args:
        x: (B, channels, ...) this rank's part, at least one value a channel.
        ranks: all must come here.
    """
    others = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x, others, correction=0)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    counts, means, variances = gathered(torch.stack([count, mean, variance]), ranks).unbind(1)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    # Chan et al.: no difference of large squares.
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return counts.sum(0)[0], mean, variance


class _ReLULines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mid, rad)
        # Of an interval of one point any slope will do, so that nothing is divided by 0.
        share = (mid / rad.clamp(min=torch.finfo(rad.dtype).tiny)).clamp_(-1, 1)
        gap = torch.sub(rad, mid.abs()).clamp_(min=0).mul_(0.5)
        lower = (mid > 0).to(mid)
        ctx.mark_non_differentiable(lower)
        return lower, share.add_(1).mul_(0.5), gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_upper: Tensor, grad_gap: Tensor) -> tuple[Tensor, ...]:
        mid, rad = ctx.saved_tensors
        # Elsewhere nothing depends on either, and a division might overflow.
        stable = rad <= mid.abs()
        rise = (grad_upper / rad).masked_fill_(stable, 0)
        grad_gap = grad_gap.masked_fill(stable, 0)
        grad_mid = torch.addcmul(rise, grad_gap, mid.sign(), value=-1)
        grad_rad = torch.addcmul(grad_gap, rise, (mid / rad).masked_fill_(stable, 0), value=-1)
        return grad_mid.mul_(0.5), grad_rad.mul_(0.5)


def relu_lines(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of the lower and of the upper line of relu, and how far the lower runs below.

    In formulas [mid > 0], clamp((mid + rad) / (2 rad), 0, 1) and max(rad - |mid|, 0) / 2,
    see `ibpcore.relaxations.relu`. The first has no gradient.
    """
    lines: tuple[Tensor, Tensor, Tensor] = _ReLULines.apply(mid, rad)
    return lines


class _Relaxed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, lower: Tensor, upper: Tensor, below: Tensor, above: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, lower, upper, below, above)
        value = _row_sums(rows.clamp(max=0).mul_(below[:, None])).neg_()
        if above is not None:
            value += _row_sums(rows.clamp(min=0).mul_(above[:, None]))
        return torch.where(rows > 0, upper[:, None], lower[:, None]).mul_(rows), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        rows, lower, upper, below, above = ctx.saved_tensors
        grad_value = grad_value.view(*grad_value.shape, *[1] * (rows.dim() - 2))
        rising, falling = rows.clamp(min=0), rows.clamp(max=0)
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            gap = torch.where(rows > 0, 0 if above is None else above[:, None], -below[:, None])
            slope = torch.where(rows > 0, upper[:, None], lower[:, None])
            grads[0] = slope.mul_(grad_rows).add_(gap.mul_(grad_value))
        if ctx.needs_input_grad[1]:
            grads[1] = (grad_rows * falling).sum(1)
        if ctx.needs_input_grad[2]:
            grads[2] = (grad_rows * rising).sum(1)
        if ctx.needs_input_grad[3]:
            grads[3] = falling.mul_(grad_value).sum(1).neg_()
        if ctx.needs_input_grad[4]:
            grads[4] = rising.mul_(grad_value).sum(1)
        return tuple(grads)


def _row_sums(rows: Tensor) -> Tensor:
    """(B, R, ...) to (B, R); flattening first would copy what lies channels last."""
    return rows.sum(tuple(range(2, rows.dim())))


def relaxed(
    rows: Tensor, lower: Tensor, upper: Tensor, below: Tensor, above: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows through two lines: the upper one where a coefficient is positive, else the lower.

    Args:
        rows: (B, R, ...) coefficients of what the lines bound.
        lower, upper, below, above: (B, ...), see `ibpcore.relaxations.Lines`.

    Returns:
        (B, R, ...) coefficients of what they are lines in, and (B, R), what their gaps add.
    """
    result: tuple[Tensor, Tensor] = _Relaxed.apply(rows, lower, upper, below, above)
    return result
