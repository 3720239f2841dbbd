"""From a model's layers to the `rules` of soundness, its parameters exact.

From the layers as they are stored and not from the operators of `ibpcore.nn.folding`, whose merged
weights are rounded already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds.operators import NonnegativeLinear
from ibpcore.certification.soundness.arithmetic import FLOAT32, REALS, Arithmetic
from ibpcore.certification.soundness.rules import (
    Concatenation,
    Ends,
    Product,
    Rearrange,
    Relu,
    Reshape,
    Rule,
    Scale,
    Sum,
)
from ibpcore.errors import UserError
from ibpcore.nn import layers
from ibpcore.nn.layers import check_supported

CLAIMS: dict[str, Arithmetic] = {"real": REALS, "float32": FLOAT32}
"""What is proved by which arithmetic: of the real-valued network, or of every execution."""
SAFE = (2.0**-100, 2.0**100)
"""Variances, deviations and slopes that no float32 operation takes out of range."""


@dataclass(frozen=True, eq=False)
class SoundNetwork:
    """The rules of a model in order of execution, for one claim.

    Attributes:
        rules: that take an interval of images to one of logits.
        arithmetic: of the execution that the claim is about.
    """

    rules: tuple[Rule, ...]
    arithmetic: Arithmetic


def sound_network(model: nn.Module, claim: str) -> SoundNetwork:
    """`model` in evaluation, in float64, for a claim in `CLAIMS`.

    Raises:
        UserError: there is no such claim, a layer has no rule that a proof is known for,
            batch norm is in training mode, or the claim is not about such weights.
    """
    if claim not in CLAIMS:
        raise UserError(f"claim {claim!r} is not one of {', '.join(CLAIMS)}")
    check_supported(model)
    arithmetic = CLAIMS[claim]
    types = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} - {torch.int64}
    if arithmetic is FLOAT32 and types != {torch.float32}:
        raise UserError("claim 'float32' is about float32 networks, but the weights are not")
    if not types <= {torch.float32, torch.float64}:
        raise UserError("the weights must be float32 or float64")
    return SoundNetwork(_rules(model, arithmetic), arithmetic)


def _rules(module: nn.Module, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    if isinstance(module, layers.IntervalSequential):
        if type(module).forward is layers.IntervalSequential.forward:
            return tuple(rule for child in module for rule in _rules(child, arithmetic))
    elif type(module) in RULES:
        return RULES[type(module)](module, arithmetic)
    raise UserError(
        f"no proof covers rounding in {type(module).__name__}: --claim unchecked bounds it"
        " without one"
    )


def _linear(module: nn.Linear, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    return (
        Product(
            weight=_exact(module.weight),
            bias=_bias(module.bias, module.weight),
            multiply=F.linear,
            transpose=lambda rows, weight, shape: rows @ weight,
            uses=module.out_features,
            patches=1,
            arithmetic=arithmetic,
        ),
    )


def _convolution(module: nn.Conv2d, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    """As matrix products of patches: no Winograd, no Fourier transform."""
    patches = partial(_patches, module)
    groups, kernel = module.groups, math.prod(module.kernel_size)
    weight = _exact(module.weight).reshape(groups, module.out_channels // groups, -1)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        columns = patches(x)
        columns = columns.view(len(x), groups, -1, columns.shape[-1])
        size = _output_size(module, x.shape)
        return (weight @ columns).view(len(x), -1, *size)

    def transpose(rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        columns = weight.mT @ rows.reshape(len(rows), groups, weight.shape[1], -1)
        back = torch.func.vjp(patches, rows.new_zeros(shape))[1]
        return cast(Tensor, back(columns.flatten(1, 2))[0])

    # Padding by other values may read a pixel for every output.
    often = kernel if module.padding_mode == "zeros" else 2**24
    return (
        Product(
            weight=weight,
            bias=_bias(module.bias, module.weight).view(-1, 1, 1),
            multiply=multiply,
            transpose=transpose,
            uses=module.out_channels // groups * often,
            patches=kernel,
            arithmetic=arithmetic,
        ),
    )


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, channels * kernel, places)."""
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)


def _output_size(module: nn.Conv2d, shape: torch.Size) -> list[int]:
    pads = module._reversed_padding_repeated_twice
    return [
        (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
        for size, before, after, dilation, kernel, stride in zip(
            shape[-2:],
            reversed(pads[0::2]),
            reversed(pads[1::2]),
            module.dilation,
            module.kernel_size,
            module.stride,
            strict=True,
        )
    ]


def _average(module: nn.AvgPool2d, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    module.operators()  # type: ignore[operator]  # refuses what is not an average
    size = module.kernel_size
    kernel = size * size if isinstance(size, int) else math.prod(size)
    return (_mean(partial(nn.AvgPool2d.forward, module), kernel, kernel, arithmetic),)


def _mean(
    pool: Callable[[Tensor], Tensor], terms: int, uses: int, arithmetic: Arithmetic
) -> Product:
    """Averages of at most `terms` numbers, each of them part of at most `uses`."""

    def transpose(rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return cast(Tensor, torch.func.vjp(pool, rows.new_zeros(shape))[1](rows)[0])

    # Weights of 1 stand for the terms of the sum, which is divided after it.
    ones, nothing = torch.ones(terms).double(), torch.zeros(()).double()
    return Product(ones, nothing, lambda x, _: pool(x), transpose, uses, 1, arithmetic)


def _batch_norm(module: Any, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    module.operators()  # refuses training mode
    stored = _exact(module.running_var)
    # Of a sum of opposite signs nothing but the rounding of its terms may be left.
    variance = torch.where((stored >= 0) & (module.eps >= 0), stored + module.eps, torch.nan)
    inverse = 1 / _in_range(variance).sqrt()
    weight = torch.ones_like(inverse) if module.weight is None else _exact(module.weight)
    return (_scale(weight, inverse, _exact(module.running_mean), module.bias, arithmetic),)


def _normalize(module: layers.IntervalNormalize, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    inverse = 1 / _in_range(_exact(module.std))
    return (_scale(torch.ones_like(inverse), inverse, _exact(module.mean), None, arithmetic),)


def _upsample(module: layers.IntervalUpsample, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    return (_mean(_function(module), 1, math.prod(module.factors), arithmetic),)


def _affine(module: layers.IntervalScale, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    (operator,) = module.operators()  # each channel has its own numbers there, unchanged
    scale, shift = (cast(Tensor, getattr(operator, name)) for name in ("scale", "shift"))
    weight = _exact(scale)
    ones, none = torch.ones_like(weight), torch.zeros_like(weight)
    return (_scale(weight, ones, none, shift, arithmetic),)


def _scale(
    weight: Tensor, inverse: Tensor, mean: Tensor, bias: Tensor | None, arithmetic: Arithmetic
) -> Scale:
    scale, bias = weight * inverse, _bias(bias, weight)
    shift, shift_size = bias - mean * scale, (mean * scale).abs() + bias.abs()
    reach = (weight.abs() + 1) * (inverse + 1)
    return Scale(scale, shift, shift_size, mean.abs(), reach, arithmetic)


def _in_range(x: Tensor) -> Tensor:
    """NaN where a float32 operation might underflow or overflow, so that nothing is proved."""
    low, high = SAFE
    return torch.where((x >= low) & (x <= high), x, torch.nan)


def _leaky(module: nn.LeakyReLU, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    module.operators()  # type: ignore[operator]  # refuses slopes below 0
    slope, (low, high) = module.negative_slope, SAFE
    if slope != 0 and not low <= slope <= high:
        raise UserError(f"no proof covers rounding in IntervalLeakyReLU of slope {slope:g}")
    return (Ends(partial(F.leaky_relu, negative_slope=slope), 2, arithmetic),)


def _max_pool(module: nn.MaxPool2d, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    module.operators()  # type: ignore[operator]  # refuses to return indices
    return (Ends(partial(nn.MaxPool2d.forward, module), 0, arithmetic),)


def _reshaped(module: layers.IntervalLayer, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    return (Reshape(_function(module)),)


def _rearranged(module: layers.IntervalLayer, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    return (Rearrange(_function(module)),)


def _function(module: layers.IntervalLayer) -> Callable[[Tensor], Tensor]:
    """Of a layer of a single operator."""
    (operator,) = module.operators()
    return cast(NonnegativeLinear, operator).function


def _residual(module: layers.IntervalResidual, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    return (
        Sum(_rules(module.branch, arithmetic), _rules(module.shortcut, arithmetic), arithmetic),
    )


def _concatenation(module: layers.IntervalConcat, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    branches = tuple(_rules(branch, arithmetic) for branch in module.branches)
    return (Concatenation(branches, module.dim),)


def _exact(parameter: Tensor) -> Tensor:
    """A copy, so that no later optimiser step can reach it."""
    return parameter.detach().to(torch.float64, copy=True)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    return _exact(bias)


RULES: dict[type, Callable[[Any, Arithmetic], tuple[Rule, ...]]] = {
    layers.IntervalConv2d: _convolution,
    layers.IntervalLinear: _linear,
    layers.IntervalBatchNorm: _batch_norm,
    layers.IntervalNormalize: _normalize,
    layers.IntervalReLU: lambda module, arithmetic: (Relu(),),
    layers.IntervalLeakyReLU: _leaky,
    layers.IntervalAvgPool2d: _average,
    layers.IntervalUpsample: _upsample,
    layers.IntervalMaxPool2d: _max_pool,
    layers.IntervalScale: _affine,
    layers.IntervalFlatten: _reshaped,
    layers.IntervalReshape: _reshaped,
    layers.IntervalPermute: _rearranged,
    layers.IntervalZeroPad: _rearranged,
    layers.IntervalSlice: _rearranged,
    layers.IntervalDropout: lambda module, arithmetic: (),
    layers.IntervalResidual: _residual,
    layers.IntervalConcat: _concatenation,
}
"""By exact type: a subclass may do anything. Sigmoid and tanh have no proved error bound."""
