"""From the layers of a model to the rules of soundness, with exact parameters.

The rules are built from the stored layers, not from the operators of `ibpcore.nn.folding`, whose
merged weights are already rounded.
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
from ibpcore.certification.soundness import rules
from ibpcore.certification.soundness.arithmetic import FLOAT32, REALS, Arithmetic
from ibpcore.certification.soundness.rules import ProductRule, Rule
from ibpcore.errors import UserError
from ibpcore.nn import layers
from ibpcore.nn.layers import check_supported

CLAIMS: dict[str, Arithmetic] = {"real": REALS, "float32": FLOAT32}
"""The arithmetic of each claim: of the real-valued network, or of every float32 execution."""
SAFE = (2.0**-100, 2.0**100)
"""Variances, deviations and slopes in it make no float32 operation overflow or underflow."""


@dataclass(frozen=True, eq=False)
class SoundNetwork:
    """The rules of a model for one claim; `sound_margins` bounds margins with it.

    The rules stand in order of execution, from an interval of images to one of logits.
    """

    rules: tuple[Rule, ...]
    arithmetic: Arithmetic


def sound_network(model: nn.Module, claim: str) -> SoundNetwork:
    """The rules of `model` in evaluation mode, with its parameters in float64.

    Raises:
        UserError: `claim` is not in `CLAIMS`, no proof covers one of the layers, batch norm is in
            training mode, or the claim does not apply to the type of the weights.
    """
    if claim not in [*CLAIMS]:  # a list, since a claim may be unhashable
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
            return tuple(rule for layer in module for rule in _rules(layer, arithmetic))
    elif type(module) is layers.IntervalDropout:
        return ()  # the identity in evaluation mode
    elif type(module) in RULES:
        return (RULES[type(module)](module, arithmetic),)
    raise UserError(
        f"no proof covers rounding in {type(module).__name__}: --claim unchecked needs no proof"
    )


def _linear_rule(module: nn.Linear, arithmetic: Arithmetic) -> Rule:
    return ProductRule(
        weight=_exact(module.weight),
        bias=_bias(module.bias, module.weight),
        multiply=F.linear,
        transpose=lambda rows, weight, shape: rows @ weight,
        uses=module.out_features,
        patches=1,
        arithmetic=arithmetic,
    )


def _convolution_rule(module: nn.Conv2d, arithmetic: Arithmetic) -> Rule:
    """Matrix products of patches, since sums of Winograd and Fourier have other errors."""
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

    # With other padding a pixel may contribute to every output.
    often = kernel if module.padding_mode == "zeros" else 2**24
    return ProductRule(
        weight=weight,
        bias=_bias(module.bias, module.weight).view(-1, 1, 1),
        multiply=multiply,
        transpose=transpose,
        uses=module.out_channels // groups * often,
        patches=kernel,
        arithmetic=arithmetic,
    )


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches (B, channels * kernel, positions) of images (B, channels, H, W)."""
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)


def _output_size(module: nn.Conv2d, shape: torch.Size) -> list[int]:
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sizes = shape[-2] + top + bottom, shape[-1] + left + right
    sides = zip(sizes, module.dilation, module.kernel_size, module.stride, strict=True)
    return [(size - hole * (kernel - 1) - 1) // step + 1 for size, hole, kernel, step in sides]


def _average_pool_rule(module: nn.AvgPool2d, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses what is not an average
    size = module.kernel_size
    kernel = size * size if isinstance(size, int) else math.prod(size)
    return _averages(partial(nn.AvgPool2d.forward, module), kernel, kernel, arithmetic)


def _averages(
    pool: Callable[[Tensor], Tensor], terms: int, uses: int, arithmetic: Arithmetic
) -> Rule:
    """Averages of at most `terms` numbers; each number contributes to at most `uses` of them."""

    def transpose(rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return cast(Tensor, torch.func.vjp(pool, rows.new_zeros(shape))[1](rows)[0])

    # The terms of the sum have weight 1; it is divided afterwards.
    ones, nothing = torch.ones(terms).double(), torch.zeros(()).double()
    return ProductRule(ones, nothing, lambda x, _: pool(x), transpose, uses, 1, arithmetic)


def _batch_norm_rule(module: Any, arithmetic: Arithmetic) -> Rule:
    module.operators()  # refuses training mode
    stored = _exact(module.running_var)
    # A sum of opposite signs may cancel, and its relative error be anything.
    variance = torch.where((stored >= 0) & (module.eps >= 0), stored + module.eps, torch.nan)
    inverse = 1 / _in_range(variance).sqrt()
    weight = torch.ones_like(inverse) if module.weight is None else _exact(module.weight)
    return _channel_scale(weight, inverse, _exact(module.running_mean), module.bias, arithmetic)


def _normalize_rule(module: layers.IntervalNormalize, arithmetic: Arithmetic) -> Rule:
    inverse = 1 / _in_range(_exact(module.std))
    ones = torch.ones_like(inverse)
    return _channel_scale(ones, inverse, _exact(module.mean), None, arithmetic)


def _upsample_rule(module: layers.IntervalUpsample, arithmetic: Arithmetic) -> Rule:
    return _averages(_function(module), 1, math.prod(module.factors), arithmetic)


def _scale_rule(module: layers.IntervalScale, arithmetic: Arithmetic) -> Rule:
    (operator,) = module.operators()  # whose numbers are expanded to (channels,), unchanged
    scale, shift = (cast(Tensor, getattr(operator, name)) for name in ("scale", "shift"))
    weight = _exact(scale)
    ones, none = torch.ones_like(weight), torch.zeros_like(weight)
    return _channel_scale(weight, ones, none, shift, arithmetic)


def _channel_scale(
    weight: Tensor, inverse: Tensor, mean: Tensor, bias: Tensor | None, arithmetic: Arithmetic
) -> Rule:
    scale, bias = weight * inverse, _bias(bias, weight)
    shift, shift_size = bias - mean * scale, (mean * scale).abs() + bias.abs()
    reach = (weight.abs() + 1) * (inverse + 1)
    return rules.ScaleRule(scale, shift, shift_size, mean.abs(), reach, arithmetic)


def _in_range(x: Tensor) -> Tensor:
    """`x`, but NaN where a float32 operation may underflow or overflow: nothing is proved there."""
    low, high = SAFE
    return torch.where((x >= low) & (x <= high), x, torch.nan)


def _leaky_relu_rule(module: nn.LeakyReLU, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses slopes below 0
    slope, (low, high) = module.negative_slope, SAFE
    if slope != 0 and not low <= slope <= high:
        raise UserError(f"no proof covers rounding in IntervalLeakyReLU of slope {slope:g}")
    return rules.EndpointRule(partial(F.leaky_relu, negative_slope=slope), 2, arithmetic)


def _max_pool_rule(module: nn.MaxPool2d, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses to return indices
    return rules.EndpointRule(partial(nn.MaxPool2d.forward, module), 0, arithmetic)


def _reshape_rule(module: layers.IntervalLayer, arithmetic: Arithmetic) -> Rule:
    return rules.ReshapeRule(_function(module))


def _rearrange_rule(module: layers.IntervalLayer, arithmetic: Arithmetic) -> Rule:
    return rules.RearrangeRule(_function(module))


def _function(module: layers.IntervalLayer) -> Callable[[Tensor], Tensor]:
    """The function of the only operator of a layer."""
    (operator,) = module.operators()
    return cast(NonnegativeLinear, operator).function


def _residual_rule(module: layers.IntervalResidual, arithmetic: Arithmetic) -> Rule:
    branch, shortcut = _rules(module.branch, arithmetic), _rules(module.shortcut, arithmetic)
    return rules.SumRule(branch, shortcut, arithmetic)


def _concatenation_rule(module: layers.IntervalConcat, arithmetic: Arithmetic) -> Rule:
    branches = tuple(_rules(branch, arithmetic) for branch in module.branches)
    return rules.ConcatenationRule(branches, module.dim)


def _exact(parameter: Tensor) -> Tensor:
    """A copy in float64, which a later optimiser step cannot change."""
    return parameter.detach().to(torch.float64, copy=True)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    return _exact(bias)


RULES: dict[type, Callable[[Any, Arithmetic], Rule]] = {
    layers.IntervalConv2d: _convolution_rule,
    layers.IntervalLinear: _linear_rule,
    layers.IntervalBatchNorm: _batch_norm_rule,
    layers.IntervalNormalize: _normalize_rule,
    layers.IntervalReLU: lambda module, arithmetic: rules.ReluRule(),
    layers.IntervalLeakyReLU: _leaky_relu_rule,
    layers.IntervalAvgPool2d: _average_pool_rule,
    layers.IntervalUpsample: _upsample_rule,
    layers.IntervalMaxPool2d: _max_pool_rule,
    layers.IntervalScale: _scale_rule,
    layers.IntervalFlatten: _reshape_rule,
    layers.IntervalReshape: _reshape_rule,
    layers.IntervalPermute: _rearrange_rule,
    layers.IntervalZeroPad: _rearrange_rule,
    layers.IntervalSlice: _rearrange_rule,
    layers.IntervalResidual: _residual_rule,
    layers.IntervalConcat: _concatenation_rule,
}
"""By exact type, since a subclass may compute anything. Sigmoid and tanh have no proved error."""
