"""Products with the weights of linear layers, with hand-written gradients.

In a small network the number of operators matters. The chains that autograd would build take
twice as many, of which half only transpose. `t` takes one operator more than `transpose`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.bounds.kernels import differentiated
from ibpcore.precision import autocast_devices, without_autocast


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x (B, in)."""
    columns = weight.transpose(0, 1)
    return x.mm(columns) if bias is None else torch.addmm(bias, x, columns)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            grad.mm(weight) if need_x else None,
            grad.transpose(0, 1).mm(x) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x (B, in), weight (out, in) and bias (out,); gradients of first order only."""
    # Under autocast the gradient would need what was cast.
    if x.dim() == 2 and differentiated(x, weight, bias) and not autocast_devices():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _IntervalLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mid: Tensor,
        rad: Tensor,
        weight: Tensor,
        weight_abs: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mid, rad, weight, weight_abs)
        return _interval_linear(mid, rad, weight, weight_abs, bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_mid: Tensor, grad_rad: Tensor) -> tuple[Tensor | None, ...]:
        mid, rad, weight, weight_abs = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = grad_mid.mm(weight)
        if ctx.needs_input_grad[1]:
            grads[1] = grad_rad.mm(weight_abs)
        if ctx.needs_input_grad[2]:
            through_abs = grad_rad.transpose(0, 1).mm(rad).mul_(weight.sign())
            grads[2] = through_abs.addmm_(grad_mid.transpose(0, 1), mid)
        if ctx.needs_input_grad[4]:
            grads[4] = grad_mid.sum(0)
        return tuple(grads)


def _interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, weight_abs: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _product(mid, weight, bias), rad.mm(weight_abs.transpose(0, 1))


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, weight_abs: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W mid + b and |W| rad (eq. 16-17).

    Args:
        mid, rad: (B, in).
        weight, weight_abs: (out, in), W and |W|. The gradient of both goes to `weight`.
        bias: (out,) or None.
    """
    if differentiated(mid, rad, weight, bias):
        return _IntervalLinear.apply(mid, rad, weight, weight_abs.detach(), bias)
    return _interval_linear(mid, rad, weight, weight_abs, bias)


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        center, width, *parts = _differences(mid, rad, weight, bias, labels)
        ctx.save_for_backward(mid, weight, labels, *parts)
        return center, width

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_center: Tensor, grad_width: Tensor) -> tuple[Tensor | None, ...]:
        mid, weight, labels, own, rad, rows = ctx.saved_tensors
        need_mid, need_rad, need_weight, need_bias, _ = ctx.needs_input_grad
        # f_y occurs in all differences, with the other sign.
        grad_logits = grad_center.scatter_add(1, own, grad_center.sum(1, keepdim=True).neg_())
        by_sample = _by_sample(grad_width, len(labels))
        sign = rows.sign()
        grads: list[Tensor | None] = [None] * 5
        if need_mid:
            grads[0] = grad_logits.mm(weight)
        if need_rad:
            grads[1] = torch.bmm(by_sample, rows * sign).transpose(0, 1).reshape(mid.shape)
        if need_weight:
            grad_rows = torch.bmm(by_sample.transpose(1, 2), rad).mul_(sign)
            grad_weight = grad_rows.sum(0).addmm_(grad_logits.transpose(0, 1), mid)
            grads[2] = grad_weight.index_add_(0, labels, grad_rows.sum(1), alpha=-1)
        if need_bias:
            grads[3] = grad_logits.sum(0)
        return tuple(grads)


def _differences(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, ...]:
    """The results of `differences`, and what their gradient needs.

    That is (K * B, 1) the labels, (B, K, H) the radii, and (B, classes, H) all W_i - W_y. Those of
    a sample are used for all of its K radii.
    """
    logits, own = _product(mid, weight, bias), repeated(labels, len(mid)).unsqueeze(1)
    center = logits - logits.gather(1, own)
    rad = _by_sample(rad, len(labels))
    rows = weight - weight[labels, None]
    width = torch.bmm(rad, rows.abs().transpose(1, 2)).transpose(0, 1).reshape(center.shape)
    return center, width, own, rad, rows


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """(K * B, n) as (B, K, n)."""
    return x.view(-1, samples, x.shape[1]).transpose(0, 1)


def repeated(labels: Tensor, lanes: int) -> Tensor:
    """(K * B,) the labels (B,), K times one after the other."""
    return labels if len(labels) == lanes else labels.repeat(lanes // len(labels))


def differences(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Midpoint and radius of (W_i - W_y) h + b_i - b_y for all h with |h - mid| <= rad.

    Args:
        mid, rad: (K * B, H), K groups of B samples.
        weight, bias: (classes, H), and (classes,) or None.
        labels: (B,).

    Returns:
        (K * B, classes) each.
    """
    if differentiated(mid, rad, weight, bias):
        return _Differences.apply(mid, rad, weight, bias, labels)
    center, width, *_ = _differences(mid, rad, weight, bias, labels)
    return center, width
