"""A convolution and the batch norm after it as one layer, for clean passes in training.

The clean pass convolves and normalises, and the interval passes use both, merged into one
convolution. One function computes all of that: its gradient takes half as many operators as the
sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.bounds import operators as ops
from ibpcore.bounds.convolutions import TransposedConvolution
from ibpcore.nn.affine import Convolution, IntervalBatchNorm
from ibpcore.nn.batch_norm import Normalized, Running, norm_gradients, normalized
from ibpcore.nn.layers import Clean, IntervalLayer, Operators
from ibpcore.precision import autocast_devices


class NormalizedConvolution(NamedTuple):
    """A convolution and the batch norm after it."""

    convolution: Convolution
    norm: IntervalBatchNorm

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        """See `IntervalLayer.clean`: one merged operator, if the statistics are those of `x`."""
        affine, norm = self.convolution.affine(), self.norm
        kind = affine.transpose
        # Under autocast the gradient would need what was cast.
        own = how.ranks.size == 1 and norm.uses_batch and not autocast_devices()
        if not own or not isinstance(kind, TransposedConvolution):
            x, first = self.convolution.clean(x, how)
            x, second = norm.clean(x, how)
            return x, (*first, *second)
        running = norm.running() if how.track else None
        parameters = (affine.weight, affine.bias, norm.weight, norm.bias)
        output, *merged = _NormalizedConvolution.apply(
            x, *parameters, kind, norm.eps, running, how.bounds
        )
        if not how.bounds:
            return output, ()
        weight, absolute, bias = merged
        operator = ops.Affine(weight, bias, affine.operation, kind, absolute)
        if how.observe is not None:
            how.observe(operator, x)
        return output, (operator,)


def paired(layers: Sequence[IntervalLayer]) -> Iterator[IntervalLayer | NormalizedConvolution]:
    """The layers in order, each convolution together with a batch norm after it."""
    waiting: Convolution | None = None
    for layer in layers:
        if waiting is not None and isinstance(layer, IntervalBatchNorm):
            yield NormalizedConvolution(waiting, layer)
            waiting = None
            continue
        if waiting is not None:
            yield waiting
        waiting = layer if isinstance(layer, Convolution) else None
        if waiting is None:
            yield layer
    if waiting is not None:
        yield waiting


class _NormalizedConvolution(torch.autograd.Function):
    """The normalised output, and weight, |weight| and bias of the merged convolution.

    With z = W x + b of mean m, the output is scale * (z - m) + c, and merged the weight is
    scale * W and the bias scale * (b - m) + c. Since m contains b, the gradient of b is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        kind: TransposedConvolution,
        eps: float,
        running: Running | None,
        bounds: bool,
    ) -> tuple[Tensor, ...]:
        output, at = normalized(kind.forward(x, weight, bias), norm_weight, norm_bias, eps, running)
        ctx.kind, ctx.eps = kind, eps
        ctx.set_materialize_grads(False)
        if not bounds:
            ctx.save_for_backward(x, weight, *at)
            return (output,)
        by_row = at.scale.view(-1, *[1] * (weight.dim() - 1))
        merged = weight * by_row
        sign = merged.sign()
        centre = -at.mean if bias is None else bias - at.mean
        ctx.save_for_backward(x, weight, *at, by_row, sign, centre)
        absolute = ops.with_strides_of(merged, merged * sign)
        if norm_bias is None:
            return output, merged, absolute, centre * at.scale
        return output, merged, absolute, torch.addcmul(norm_bias, centre, at.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor | None, *merged: Tensor | None) -> tuple[Any, ...]:
        (x, weight), saved = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        at = Normalized(*saved[:5])
        scale = shift = None
        if any(grad is not None for grad in merged):
            by_row, sign, centre = saved[5:]
            pairs = zip(merged, (sign, sign, centre), strict=True)
            plain, absolute, shift = (
                torch.zeros_like(like) if g is None else g for g, like in pairs
            )
            both = torch.addcmul(plain, absolute, sign)
            scale = (both * weight).sum([*range(1, weight.dim())]).addcmul_(shift, centre)
        z, norm_weight, norm_bias = norm_gradients(at, ctx.eps, output, scale, shift)
        x_grad, weight_grad = ctx.kind.gradients(z, x, weight, ctx.needs_input_grad[0])
        if scale is not None:
            weight_grad.addcmul_(both, by_row)
        # Zeros in one operator, and not None: each rank expects a gradient of every parameter.
        bias = at.mean - at.mean if ctx.needs_input_grad[2] else None
        return x_grad, weight_grad, bias, norm_weight, norm_bias, None, None, None, None
