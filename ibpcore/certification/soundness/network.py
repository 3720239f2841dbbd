"""From the layers of a model to the rules of soundness, with exact parameters.

The rules are built from the stored layers, not from the operators of `ibpcore.nn.folding`, whose
merged weights are already rounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore import nn as il
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import NonnegativeLinear
from ibpcore.certification.soundness import rules
from ibpcore.certification.soundness.arithmetic import FLOAT32, REALS, Arithmetic
from ibpcore.certification.soundness.rules import ProductRule, Rule
from ibpcore.errors import UserError
from ibpcore.nn.affine import exchanged
from ibpcore.nn.folding import fold
from ibpcore.nn.layers import check_supported, kind_of

CLAIMS: dict[str, Arithmetic] = {"real": REALS, "float32": FLOAT32}
"""The arithmetic of each claim: of the real-valued network, or of every float32 execution."""
SAFE = (2.0**-100, 2.0**100)
"""Variances, deviations and slopes in it make no float32 operation overflow or underflow."""

POSITIONS = 2**24
"""The most positions of a feature map in which a pixel may be used at every one."""


@dataclass(frozen=True, eq=False)
class SoundNetwork:
    """The rules of a model for one claim; `sound_margins` bounds margins with it.

    Attributes:
        rules: in order of execution, from an interval of images to one of logits.
        arithmetic: that of the claim.
        folded: the model for unchecked bounds, with which the slopes for a proof are searched.
    """

    rules: tuple[Rule, ...]
    arithmetic: Arithmetic
    folded: FoldedNetwork


def sound_network(model: nn.Module, claim: str) -> SoundNetwork:
    """The rules of `model` in evaluation mode, with its parameters in float64.

    Raises:
        UserError: `claim` is not in `CLAIMS`, no proof covers one of the layers, batch norm is in
            training mode, or the claim does not apply to the type of the weights.
    """
    if claim not in [*CLAIMS]:  # a list, since a claim may be unhashable
        raise UserError(f"claim {claim!r} is not one of {', '.join(CLAIMS)}")
    check_supported(model)
    types = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} - {torch.int64}
    if claim == "float32" and not types <= {torch.float32}:
        raise UserError("claim 'float32' is about float32 networks, but the weights are not")
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        raise UserError("the weights must be float32 or float64, all of one type")
    arithmetic = CLAIMS[claim]._replace(constants=next(iter(types), torch.float32))
    rules = _rules(model, arithmetic)
    return SoundNetwork(rules, arithmetic, fold(model))


def _rules(module: nn.Module, arithmetic: Arithmetic) -> tuple[Rule, ...]:
    if isinstance(module, il.IntervalSequential):
        if type(module).forward is il.IntervalSequential.forward:
            return tuple(rule for layer in module for rule in _rules(layer, arithmetic))
    elif type(module) in DROPOUTS:
        return ()  # the identity in evaluation mode
    elif type(module) in RULES:
        return (RULES[type(module)](module, arithmetic),)
    raise UserError(
        f"no proof covers rounding in {kind_of(module)}: --claim unchecked needs no proof"
    )


def _linear_rule(module: nn.Linear, arithmetic: Arithmetic) -> Rule:
    return matrix_rule(module.weight, module.bias, arithmetic)


def matrix_rule(weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic) -> Rule:
    """Products with a weight (out, in)."""

    def pick(places: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        rows = weight.new_zeros(len(places), shape[1:-1].numel(), shape[-1])
        lanes = torch.arange(len(places), device=places.device)
        rows[lanes, places // len(weight)] = weight[places % len(weight)]
        return rows.view(shape)

    return ProductRule(
        weight=_exact(weight),
        bias=_bias(bias, weight),
        multiply=F.linear,
        transpose=lambda rows, weight, shape: rows @ weight,
        pick=pick,
        uses=len(weight),
        patches=1,
        arithmetic=arithmetic,
    )


def _convolution_rule(module: Any, arithmetic: Arithmetic) -> Rule:
    amounts: list[int] = module._reversed_padding_repeated_twice
    pad: Callable[[Tensor], Tensor]
    if module.padding_mode != "zeros":
        pad = partial(F.pad, pad=amounts, mode=module.padding_mode)
    elif amounts[::2] == amounts[1::2]:
        cut = _Cut(module, module.stride, amounts[::-2])
        return _convolution(module, module.weight, None, cut, arithmetic)
    else:
        pad = partial(F.pad, pad=amounts)
    return _convolution(module, module.weight, pad, _Cut(module, module.stride), arithmetic)


def _transposed_rule(module: nn.ConvTranspose2d, arithmetic: Arithmetic) -> Rule:
    """A convolution of the input with zeros between its pixels, by the kernel turned round."""
    weight = exchanged(module.weight, module.groups).flip(2, 3)
    return _convolution(module, weight, partial(_spread, module), _Cut(module, (1, 1)), arithmetic)


class _Cut:
    """How images (B, channels, H, W), or (B, channels, L) as of height 1, are cut into patches."""

    def __init__(self, module: Any, stride: Sequence[int], padding: Sequence[int] = (0,)) -> None:
        hole = _sides(module.dilation, 1)
        self.kernel, self.stride = _sides(module.kernel_size, 1), _sides(stride, 1)
        self.hole, self.padding = hole, _sides(padding, 0)
        self.reach = [step * (width - 1) for step, width in zip(hole, self.kernel, strict=True)]

    def positions(self, shape: torch.Size) -> list[int]:
        """The number of patches along each side of an image."""
        sides = zip(_sides(shape[2:], 1), self.reach, self.padding, self.stride, strict=True)
        sizes = [(side + 2 * pad - reach - 1) // step + 1 for side, reach, pad, step in sides]
        return sizes[4 - len(shape) :]

    def patches(self, x: Tensor) -> Tensor:
        """(B, channels * kernel, positions): `F.unfold`, which takes one image after the other."""
        x = x if x.dim() == 4 else x[:, :, None]
        (down, across), (height, width) = self.padding, self.reach
        x = F.pad(x, (across, across, down, down))
        x = x.unfold(2, height + 1, self.stride[0]).unfold(3, width + 1, self.stride[1])
        x = x[..., :: self.hole[0], :: self.hole[1]].permute(0, 1, 4, 5, 2, 3)
        return x.flatten(1, 3).flatten(2)

    def joined(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `patches`, to images of `shape`."""
        how = (self.kernel, self.hole, self.padding, self.stride)
        return F.fold(columns, _sides(shape[2:], 1), *how).view(shape)


def _convolution(
    module: Any,
    weight: Tensor,
    before: Callable[[Tensor], Tensor] | None,
    cut: _Cut,
    arithmetic: Arithmetic,
) -> Rule:
    """Matrix products of patches, since sums of Winograd and Fourier have other errors.

    Args:
        weight: output channels first.
        before: what is done to an input (B, channels, ...) before it is cut: it moves and
            repeats numbers, and inserts zeros.
        cut: into patches.
    """
    groups, kernel = module.groups, math.prod(module.kernel_size)
    weight = _exact(weight).reshape(groups, module.out_channels // groups, -1)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        x = x if before is None else before(x)
        size = cut.positions(x.shape)
        if math.prod(size) > POSITIONS and module.padding_mode != "zeros":
            raise UserError(f"no proof covers {module.padding_mode} padding in images so large")
        columns = cut.patches(x).view(len(x) * groups, -1, math.prod(size))
        kernels = weight.expand(len(x), -1, -1, -1).flatten(0, 1)
        return torch.bmm(kernels, columns).view(len(x), -1, *size)

    def transpose(rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        kernels = weight.mT.expand(len(rows), -1, -1, -1).flatten(0, 1)
        columns = torch.bmm(kernels, rows.reshape(len(kernels), weight.shape[1], -1))
        columns = columns.view(len(rows), -1, columns.shape[2])
        if before is None:
            return cut.joined(columns, shape)
        found = torch.func.vjp(before, rows.new_zeros(shape))
        return cast(Tensor, found[1](cut.joined(columns, found[0].shape))[0])

    def pick(places: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Kernels at the places of their patches, which are cut of the numbers of the pixels."""
        numbers = torch.arange(1, shape[1:].numel() + 1, device=places.device).double()
        image = numbers.view(1, *shape[1:])
        table = cut.patches(image if before is None else before(image)).long() - 1
        table = table.view(groups, -1, table.shape[-1]).mT
        channel, position = places // table.shape[1], places % table.shape[1]
        pixels = table[channel // weight.shape[1], position]
        kernels = weight.flatten(0, 1)[channel] * (pixels >= 0)
        rows = weight.new_zeros(len(places), len(numbers))
        return rows.scatter_add_(1, pixels.clamp(min=0), kernels).view(shape)

    # With other padding a pixel may contribute to every output.
    often = kernel if module.padding_mode == "zeros" else POSITIONS
    bias = torch.zeros_like(weight[..., 0]) if module.bias is None else _exact(module.bias)
    return ProductRule(
        weight=weight,
        bias=bias.view(-1, *[1] * len(module.kernel_size)),
        multiply=multiply,
        transpose=transpose,
        pick=pick if module.padding_mode == "zeros" else None,
        uses=module.out_channels // groups * often,
        patches=kernel,
        arithmetic=arithmetic,
    )


def _sides(sides: Sequence[int], height: int) -> tuple[int, int]:
    """Numbers for both sides of an image, with `height` if those are only for its width."""
    return (sides[0], sides[1]) if len(sides) == 2 else (height, sides[0])


def _spread(module: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """What a transposed convolution cuts into patches, from x (B, channels, H, W)."""
    (down, right), (height, width) = module.stride, x.shape[2:]
    x = F.pad(x[:, :, :, None, :, None], (0, right - 1, 0, 0, 0, down - 1))
    x = x.reshape(*x.shape[:2], height * down, width * right)
    how: Any = module.padding, module.output_padding
    sides = zip(module.kernel_size, module.dilation, module.stride, *how, strict=True)
    amounts: list[int] = []
    for kernel, hole, step, padding, more in sides:
        reach = hole * (kernel - 1) - padding
        # Below 0 they crop, for one the zeros behind the last pixel.
        amounts = [reach, reach + more - (step - 1), *amounts]
    return F.pad(x, amounts)


def _average_pool_rule(module: nn.AvgPool2d, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses what is not an average
    size: Any = module.kernel_size
    sides = (size,) if isinstance(size, int) else tuple(size)
    kernel = math.prod(sides * (2 // len(sides)))  # torch takes (2,) for (2, 2)
    return _averages(partial(nn.AvgPool2d.forward, module), kernel, kernel, arithmetic)


def _averages(
    pool: Callable[[Tensor], Tensor], terms: int, uses: int, arithmetic: Arithmetic
) -> Rule:
    """Averages of at most `terms` numbers; each number contributes to at most `uses` of them."""

    def transpose(rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return cast(Tensor, torch.func.vjp(pool, rows.new_zeros(shape))[1](rows)[0])

    # The terms of the sum have weight 1; it is divided afterwards.
    ones, nothing = torch.ones(terms).double(), torch.zeros(()).double()
    return ProductRule(ones, nothing, lambda x, _: pool(x), transpose, None, uses, 1, arithmetic)


def _batch_norm_rule(module: Any, arithmetic: Arithmetic) -> Rule:
    module.operators()  # refuses training mode
    stored = _exact(module.running_var)
    # A sum of opposite signs may cancel, and its relative error be anything.
    eps = arithmetic.stored(module.eps)
    variance = torch.where((stored >= 0) & (eps >= 0), stored + eps, torch.nan)
    inverse = 1 / _in_range(variance).sqrt()
    weight = torch.ones_like(inverse) if module.weight is None else _exact(module.weight)
    return _channel_scale(weight, inverse, _exact(module.running_mean), module.bias, arithmetic)


def _normalize_rule(module: il.IntervalNormalize, arithmetic: Arithmetic) -> Rule:
    inverse = 1 / _in_range(_exact(module.std))
    ones = torch.ones_like(inverse)
    return _channel_scale(ones, inverse, _exact(module.mean), None, arithmetic)


def _upsample_rule(module: il.IntervalUpsample, arithmetic: Arithmetic) -> Rule:
    return _averages(_function(module), 1, math.prod(module.factors), arithmetic)


def _scale_rule(module: il.IntervalScale, arithmetic: Arithmetic) -> Rule:
    weight, shift = map(_exact, module.spread(module.scale, module.shift))
    return _channel_scale(
        weight, torch.ones_like(weight), torch.zeros_like(weight), shift, arithmetic
    )


def _subtract_rule(module: il.IntervalSubtract, arithmetic: Arithmetic) -> Rule:
    mean = _exact(*module.spread(module.constant))
    ones = torch.ones_like(mean)
    return _channel_scale(ones, ones, mean, None, arithmetic)


def _divide_rule(module: il.IntervalDivide, arithmetic: Arithmetic) -> Rule:
    divisor = _exact(*module.spread(module.divisor))
    inverse = 1 / _in_range(divisor.abs())
    return _channel_scale(divisor.sign(), inverse, torch.zeros_like(divisor), None, arithmetic)


def _channel_scale(
    weight: Tensor, inverse: Tensor, mean: Tensor, bias: Tensor | None, arithmetic: Arithmetic
) -> Rule:
    scale = weight * inverse
    bias = torch.zeros_like(scale) if bias is None else _exact(bias)
    shift, shift_size = bias - mean * scale, (mean * scale).abs() + bias.abs()
    reach = (weight.abs() + 1) * (inverse + 1)
    return rules.ScaleRule(scale, shift, shift_size, mean.abs(), reach, arithmetic)


def _in_range(x: Tensor) -> Tensor:
    """`x`, but NaN where a float32 operation may underflow or overflow: nothing is proved there."""
    low, high = SAFE
    return torch.where((x >= low) & (x <= high), x, torch.nan)


def _leaky_relu_rule(module: nn.LeakyReLU, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses slopes below 0
    slope, (low, high) = arithmetic.stored(module.negative_slope), SAFE
    if module.negative_slope != 0 and not low <= slope <= high:
        given = module.negative_slope
        raise UserError(f"no proof covers rounding in LeakyReLU of slope {given:g}")
    return rules.PReluRule(torch.tensor(slope, dtype=torch.float64), arithmetic)


def _prelu_rule(module: nn.PReLU, arithmetic: Arithmetic) -> Rule:
    return rules.PReluRule(_exact(module.weight), arithmetic)


def _hardtanh_rule(module: nn.Hardtanh, arithmetic: Arithmetic) -> Rule:
    low, high = (arithmetic.stored(limit) for limit in (module.min_val, module.max_val))
    return rules.ClampRule(low, high)


def _maximum_rule(module: il.IntervalMaximum, arithmetic: Arithmetic) -> Rule:
    return rules.ClampRule(_exact(*module.spread(module.constant)), math.inf)


def _minimum_rule(module: il.IntervalMinimum, arithmetic: Arithmetic) -> Rule:
    return rules.ClampRule(-math.inf, _exact(*module.spread(module.constant)))


def _abs_rule(module: il.IntervalAbs, arithmetic: Arithmetic) -> Rule:
    return rules.PReluRule(torch.tensor(-1.0).double(), REALS)  # it is exact


def _softsign_rule(module: nn.Softsign, arithmetic: Arithmetic) -> Rule:
    return rules.EndpointRule(F.softsign, 2, arithmetic)


def _hardsigmoid_rule(module: nn.Hardsigmoid, arithmetic: Arithmetic) -> Rule:
    # Of infinity the sum is NaN, so that an overflow is not hidden.
    return rules.EndpointRule(lambda x: F.hardsigmoid(x) + 0 * x, 3, arithmetic)


def _hardswish_rule(module: nn.Hardswish, arithmetic: Arithmetic) -> Rule:
    return rules.EndpointRule(F.hardswish, 4, arithmetic, least=-1.5)


def _max_pool_rule(module: nn.MaxPool2d, arithmetic: Arithmetic) -> Rule:
    module.operators()  # type: ignore[operator]  # refuses to return indices
    return rules.EndpointRule(partial(nn.MaxPool2d.forward, module), 0, arithmetic)


def _reshape_rule(module: il.IntervalLayer, arithmetic: Arithmetic) -> Rule:
    return rules.ReshapeRule(_function(module))


def _rearrange_rule(module: il.IntervalLayer, arithmetic: Arithmetic) -> Rule:
    return rules.RearrangeRule(_function(module))


def _function(module: il.IntervalLayer) -> Callable[[Tensor], Tensor]:
    """The function of the only operator of a layer."""
    (operator,) = module.operators()
    return cast(NonnegativeLinear, operator).function


def _index_select_rule(module: il.IntervalIndexSelect, arithmetic: Arithmetic) -> Rule:
    most = max(Counter(module.indices).values())
    if most == 1:
        return _rearrange_rule(module, arithmetic)
    return _averages(_function(module), 1, most, arithmetic)


def _residual_rule(module: il.IntervalResidual, arithmetic: Arithmetic) -> Rule:
    branch, shortcut = _rules(module.branch, arithmetic), _rules(module.shortcut, arithmetic)
    return rules.SumRule(branch, shortcut, arithmetic)


def _product_rule(module: il.IntervalProduct, arithmetic: Arithmetic) -> Rule:
    first, second = _rules(module.first, arithmetic), _rules(module.second, arithmetic)
    return rules.FactorsRule(first, second, arithmetic)


def _concatenation_rule(module: il.IntervalConcat, arithmetic: Arithmetic) -> Rule:
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
    il.IntervalConv1d: _convolution_rule,
    il.IntervalConv2d: _convolution_rule,
    il.IntervalConvTranspose2d: _transposed_rule,
    il.IntervalLinear: _linear_rule,
    il.IntervalMatMul: lambda m, arithmetic: matrix_rule(m.weight.T, m.bias, arithmetic),
    il.IntervalBatchNorm: _batch_norm_rule,
    il.IntervalNormalize: _normalize_rule,
    il.IntervalReLU: lambda module, arithmetic: rules.ReluRule(),
    il.IntervalLeakyReLU: _leaky_relu_rule,
    il.IntervalPReLU: _prelu_rule,
    il.IntervalHardtanh: _hardtanh_rule,
    il.IntervalMaximum: _maximum_rule,
    il.IntervalMinimum: _minimum_rule,
    il.IntervalAbs: _abs_rule,
    il.IntervalSoftsign: _softsign_rule,
    il.IntervalHardsigmoid: _hardsigmoid_rule,
    il.IntervalHardswish: _hardswish_rule,
    il.IntervalAvgPool2d: _average_pool_rule,
    il.IntervalUpsample: _upsample_rule,
    il.IntervalMaxPool2d: _max_pool_rule,
    il.IntervalScale: _scale_rule,
    il.IntervalSubtract: _subtract_rule,
    il.IntervalDivide: _divide_rule,
    il.IntervalFlatten: _reshape_rule,
    il.IntervalReshape: _reshape_rule,
    il.IntervalPermute: _rearrange_rule,
    il.IntervalZeroPad: _rearrange_rule,
    il.IntervalSlice: _rearrange_rule,
    il.IntervalIndexSelect: _index_select_rule,
    il.IntervalResidual: _residual_rule,
    il.IntervalProduct: _product_rule,
    il.IntervalConcat: _concatenation_rule,
}
"""By exact type, since a subclass may compute anything. exp, erf and tanh have no proved error."""
DROPOUTS = (
    *(il.IntervalDropout, il.IntervalDropout1d, il.IntervalDropout2d, il.IntervalDropout3d),
    *(il.IntervalAlphaDropout, il.IntervalFeatureAlphaDropout),
)
