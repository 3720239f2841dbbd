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
    """
    mean, variance = x.new_zeros(2, x.shape[1]).unbind()
    # With momentum 1 the running statistics become those of the batch.
    output = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
    count = x.numel() // x.shape[1]
    variance = variance * ((count - 1) / count)
    mean, variance = _BatchStatistics.apply(x, mean, variance)
    return output, mean, variance
