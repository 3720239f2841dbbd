"""Fused elementwise operations between affine layers, with few passes over memory.

In a narrow network the activations take at least as long as the convolutions, so they have
hand-written derivatives instead of the chains that autograd would build.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def sums_from(dim: int, x: Tensor) -> Tensor:
    """Sums over the dimensions from `dim` on; flattening first would copy channels-last tensors."""
    return x.sum(tuple(range(dim, x.dim())))


def halved_(x: Tensor) -> Tensor:
    """x / 2 in place of `x`, (...), exactly; NaN where x is infinite.

    A product with a Python number is five operators: it is converted to a tensor first.
    """
    return x.sub_(x, alpha=0.5)


def above(x: Tensor, where: Tensor) -> Tensor:
    """`x` where `where` is positive or NaN, 0 elsewhere, each (...): one pass, without a mask."""
    return torch.ops.aten.threshold_backward(x, where, 0)


def _forward(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    # Not `lerp`: its subtraction may overflow even if the upper end is finite. Otherwise both
    # results are NaN, so that no overflow is lost: relu(-inf) would be 0.
    half = halved_(torch.add(mid, rad))
    relu_rad = torch.minimum(half, rad, out=half).clamp_min_(0)
    return torch.maximum(mid, relu_rad), relu_rad


def _backward(
    grad_mid: Tensor, grad_rad: Tensor, relu_mid: Tensor, relu_rad: Tensor
) -> tuple[Tensor, Tensor]:
    # Twice the gradients of the upper and the lower end; mid = rad where the lower end is 0.
    upper = above(grad_mid + grad_rad, relu_mid)
    lower = above(grad_mid - grad_rad, relu_mid - relu_rad)
    both = torch.lerp(lower, upper, 0.5)
    return both, upper.sub_(both)


class _IntervalReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
        relu_mid, relu_rad = _forward(mid, rad)
        # The next affine layer saves both anyway, for the gradient of its weight.
        ctx.save_for_backward(relu_mid, relu_rad)
        return relu_mid, relu_rad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mid: Tensor, grad_rad: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(grad_mid, grad_rad, *ctx.saved_tensors)


def interval_relu(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoint and radius of relu over [mid - rad, mid + rad] (eq. 18-19).

    An always active interval is returned bit for bit, one that crosses 0 becomes
    [0, mid + rad], and an inactive one becomes 0:
    rad' = clamp((mid + rad) / 2, 0, rad) and mid' = max(mid, rad').

    Where the upper end is not finite, both are NaN.

    Args:
        mid, rad: (...), the same shape, rad >= 0.
    """
    if differentiated(mid, rad):
        return _IntervalReLU.apply(mid, rad)
    return _forward(mid, rad)


class _ReLULines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mid, rad)
        # For an interval of a single point any slope is valid; `clamp` avoids dividing by 0.
        share = (mid / rad.clamp(min=torch.finfo(rad.dtype).tiny)).clamp_(-1, 1)
        gap = torch.sub(rad, mid.abs()).clamp_(min=0).mul_(0.5)
        lower = (mid > 0).to(mid)
        ctx.mark_non_differentiable(lower)
        return lower, share.add_(1).mul_(0.5), gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_upper: Tensor, grad_gap: Tensor) -> tuple[Tensor, ...]:
        mid, rad = ctx.saved_tensors
        # The lines of stable neurons are constant, and these divisions might overflow.
        stable = rad <= mid.abs()
        rise = (grad_upper / rad).masked_fill_(stable, 0)
        grad_gap = grad_gap.masked_fill(stable, 0)
        grad_mid = torch.addcmul(rise, grad_gap, mid.sign(), value=-1)
        grad_rad = torch.addcmul(grad_gap, rise, (mid / rad).masked_fill_(stable, 0), value=-1)
        return grad_mid.mul_(0.5), grad_rad.mul_(0.5)


def relu_lines(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of the lower and the upper line of relu, and the gap of the lower one, each (...).

    They are [mid > 0], clamp((mid + rad) / (2 rad), 0, 1) and max(rad - |mid|, 0) / 2,
    see `ibpcore.bounds.relaxations.relu`. The first has no gradient.
    """
    return _ReLULines.apply(mid, rad)


def _by_row(line: Tensor, rows: Tensor) -> Tensor:
    """A slope or gap, (B, ...) or (B, R, ...), in a shape that broadcasts against (B, R, ...)."""
    return line if line.dim() == rows.dim() else line[:, None]


def _like(grad: Tensor, line: Tensor) -> Tensor:
    """The gradient (B, R, ...) of each row, summed to the shape of a slope or gap."""
    return grad.sum(1) if line.dim() < grad.dim() else grad.sum_to_size(line.shape)


class _Relaxed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, lower: Tensor, upper: Tensor, below: Tensor, above: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, lower, upper, below, above)
        value = sums_from(2, rows.clamp(max=0).mul_(_by_row(below, rows))).neg_()
        if above is not None:
            value += sums_from(2, rows.clamp(min=0).mul_(_by_row(above, rows)))
        # `where` takes ten times as long as `clamp`: signs are hard to foresee.
        found = rows.clamp(max=0).mul_(_by_row(lower, rows))
        return found.addcmul_(rows.clamp(min=0), _by_row(upper, rows)), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        rows, lower, upper, below, above = ctx.saved_tensors
        grad_value = grad_value.view(*grad_value.shape, *[1] * (rows.dim() - 2))
        rising, falling = rows.clamp(min=0), rows.clamp(max=0)
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            over = torch.zeros_like(below) if above is None else above
            share = (rows > 0).to(rows)
            gap = torch.lerp(-_by_row(below, rows), _by_row(over, rows), share)
            slope = torch.lerp(_by_row(lower, rows), _by_row(upper, rows), share)
            grads[0] = slope.mul_(grad_rows).add_(gap.mul_(grad_value))
        if ctx.needs_input_grad[1]:
            grads[1] = _like(grad_rows * falling, lower)
        if ctx.needs_input_grad[2]:
            grads[2] = _like(grad_rows * rising, upper)
        if ctx.needs_input_grad[3]:
            grads[3] = _like(falling.mul_(grad_value).neg_(), below)
        if ctx.needs_input_grad[4]:
            grads[4] = _like(rising.mul_(grad_value), above)
        return tuple(grads)


def relaxed(
    rows: Tensor, lower: Tensor, upper: Tensor, below: Tensor, above: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows propagated through an activation's lines: upper for positive coefficients, else lower.

    Args:
        rows: (B, R, ...) coefficients of the activation's output.
        lower, upper, below, above: (B, ...), or (B, R, ...) or (B, 1, ...) if they differ from row
            to row; see `ibpcore.bounds.relaxations.Lines`.

    Returns:
        (B, R, ...) coefficients of its input, and (B, R), the sums of the gaps to add.
    """
    return _Relaxed.apply(rows, lower, upper, below, above)
