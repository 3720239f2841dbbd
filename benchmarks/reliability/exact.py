"""Exact interval bounds of small networks.

They are computed in rational numbers, without any rounding, from lower and upper ends and from
positive and negative weights; of `ibpcore` only the parameters of the layers are used. Arrays
are numpy's, with elements of type `fractions.Fraction`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from ibpcore import nn as il

ZERO: Any = Fraction(0)
DIGITS = 2**256
"""Square roots are precise to one part in this number."""


def fractions(tensor: Any) -> Any:
    """The elements of a tensor, exactly, in its shape."""
    values = [Fraction(value) for value in tensor.detach().double().flatten().tolist()]
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(tuple(tensor.shape))


def _stored(number: float) -> Fraction:
    """A number given in Python as the network stores it: in float32."""
    return Fraction(float(np.float32(number)))


def ball(image: torch.Tensor, epsilon: float | Fraction) -> tuple[Any, Any]:
    """Both ends of the ball around an image (C, H, W), intersected with [0, 1]."""
    x, radius = fractions(image), Fraction(epsilon)
    return np.maximum(x - radius, ZERO), np.minimum(x + radius, ZERO + 1)


def logits(model: nn.Sequential, image: Any) -> Any:
    """The logits (classes,) of an image (C, H, W)."""
    return _all(model, image, image)[0]


def margin(model: nn.Sequential, image: torch.Tensor, label: int, epsilon: float) -> Fraction:
    """The margin of eq. 3, the worst f_i - f_y, with the last layer merged."""
    lower, upper = ball(image, epsilon)
    *body, last = model
    for layer in body:
        lower, upper = _through(layer, lower, upper)
    weight, bias = fractions(last.weight), fractions(last.bias)
    rows = [i for i in range(len(weight)) if i != label]
    worst = []
    for i in rows:
        row = weight[i] - weight[label]
        worst.append(_largest(row, lower, upper) + bias[i] - bias[label])
    return max(worst)


def _largest(row: Any, lower: Any, upper: Any) -> Fraction:
    total: Fraction = sum(
        (w * (u if w > 0 else low) for w, low, u in zip(row, lower, upper, strict=True)),
        ZERO,
    )
    return total


def _through(layer: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """Both ends after `layer`, for one sample."""
    if isinstance(layer, nn.Sequential):
        return _all(layer, lower, upper)
    if isinstance(layer, il.IntervalResidual):
        parts = [_all(part, lower, upper) for part in (layer.branch, layer.shortcut)]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    if isinstance(layer, il.IntervalProduct):
        a, b = (_all(part, lower, upper) for part in layer.branches)
        corners = np.stack([x * y for x in a for y in b])
        return corners.min(0), corners.max(0)
    if isinstance(layer, il.IntervalConcat):
        parts = [_all(part, lower, upper) for part in layer.branches]
        ends = zip(*parts, strict=True)
        lower, upper = (np.concatenate(end, axis=layer.dim - 1) for end in ends)
        return lower, upper
    if isinstance(layer, AFFINE):
        weight, bias = fractions(layer.weight), getattr(layer, "bias", None)
        plus, minus = np.maximum(weight, ZERO), np.minimum(weight, ZERO)
        shift: Any = 0 if bias is None else fractions(bias)
        product = _product(layer)
        if isinstance(layer, nn.modules.conv._ConvNd) and bias is not None:
            shift = shift.reshape(-1, *[1] * (lower.ndim - 1))
        return (
            product(plus, lower) + product(minus, upper) + shift,
            product(plus, upper) + product(minus, lower) + shift,
        )
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        assert layer.running_var is not None
        assert layer.running_mean is not None
        variance = fractions(layer.running_var) + _stored(layer.eps)
        scale = fractions(layer.weight) / np.array([_root(v) for v in variance])
        return _scaled(
            scale, fractions(layer.bias) - scale * fractions(layer.running_mean), lower, upper
        )
    if isinstance(layer, il.IntervalNormalize):
        scale = 1 / fractions(layer.std)
        return _scaled(scale, -fractions(layer.mean) * scale, lower, upper)
    if isinstance(layer, il.IntervalScale):
        scale, shift = map(fractions, layer.spread(layer.scale, layer.shift))
        return _scaled(scale, shift, lower, upper)
    if isinstance(layer, il.IntervalSubtract):
        constant = fractions(layer.spread(layer.constant)[0])
        return _scaled(np.ones_like(constant), -constant, lower, upper)
    if isinstance(layer, il.IntervalDivide):
        divisor = fractions(layer.spread(layer.divisor)[0])
        return _scaled(1 / divisor, np.zeros_like(divisor), lower, upper)
    if isinstance(layer, REARRANGED):
        return _rearranged(layer, lower), _rearranged(layer, upper)
    if isinstance(layer, nn.ReLU):
        return np.maximum(lower, ZERO), np.maximum(upper, ZERO)
    if isinstance(layer, nn.LeakyReLU):
        slope = _stored(layer.negative_slope)
        return np.where(lower > 0, lower, slope * lower), np.where(upper > 0, upper, slope * upper)
    if isinstance(layer, nn.Hardtanh):
        limits: Any = [Fraction(float(np.float32(v))) for v in (layer.min_val, layer.max_val)]
        return np.clip(lower, *limits), np.clip(upper, *limits)
    if isinstance(layer, il.IntervalMaximum | il.IntervalMinimum):
        pick = np.maximum if isinstance(layer, il.IntervalMaximum) else np.minimum
        (spread,) = layer.spread(layer.constant)
        constant = fractions(spread).reshape(-1, *[1] * (lower.ndim - 1))
        return pick(lower, constant), pick(upper, constant)
    if isinstance(layer, nn.PReLU):
        slope = fractions(layer.weight).reshape(-1, *[1] * (lower.ndim - 1))
        return _turning(lambda x: np.where(x > 0, x, slope * x), 0, lower, upper)
    if isinstance(layer, il.IntervalAbs):
        return _turning(abs, 0, lower, upper)
    if isinstance(layer, nn.Hardsigmoid):
        return np.clip((lower + 3) / 6, ZERO, ZERO + 1), np.clip((upper + 3) / 6, ZERO, ZERO + 1)
    if isinstance(layer, nn.Hardswish):
        return _turning(
            lambda x: x * np.clip((x + 3) / 6, ZERO, ZERO + 1), Fraction(-3, 2), lower, upper
        )
    if isinstance(layer, nn.Softsign):
        return lower / (1 + abs(lower)), upper / (1 + abs(upper))
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return _pooled(layer, lower), _pooled(layer, upper)
    assert isinstance(layer, nn.Flatten), f"no exact rule for {layer}"
    kept = lower.shape[: layer.start_dim - 1]
    return lower.reshape(*kept, -1), upper.reshape(*kept, -1)


def _turning(function: Any, turn: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """Both ends of a function that is monotone up to `turn` and after it."""
    at = np.clip(ZERO + turn, lower, upper)
    values = [function(x) for x in (lower, upper, at)]
    return np.minimum.reduce(values), np.maximum.reduce(values)


AFFINE = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, il.IntervalMatMul)
REARRANGED = (
    il.IntervalIndexSelect,
    il.IntervalPermute,
    il.IntervalReshape,
    il.IntervalSlice,
    il.IntervalUpsample,
    il.IntervalZeroPad,
)


def _rearranged(layer: Any, x: Any) -> Any:
    if isinstance(layer, il.IntervalPermute):
        return x.transpose([dim - 1 for dim in layer.dims[1:]])
    if isinstance(layer, il.IntervalReshape):
        return x.reshape(layer.shape)
    if isinstance(layer, il.IntervalSlice):
        return x[tuple(slice(*numbers) for numbers in layer.ranges)]
    if isinstance(layer, il.IntervalIndexSelect):
        return x.take(layer.indices, layer.dim - 1)
    if isinstance(layer, il.IntervalUpsample):
        return x.repeat(layer.factors[0], 1).repeat(layer.factors[1], 2)
    left, right, top, bottom = layer.padding
    return np.pad(x, [(0, 0), (top, bottom), (left, right)], constant_values=ZERO)


def _all(layer: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    for child in layer if isinstance(layer, nn.Sequential) else [layer]:
        lower, upper = _through(child, lower, upper)
    return lower, upper


def _root(x: Fraction) -> Fraction:
    return Fraction(math.isqrt(x.numerator * DIGITS**2 // x.denominator), DIGITS)


def _scaled(scale: Any, shift: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    if scale.ndim == 1:  # one number per channel
        along = (-1, *[1] * (lower.ndim - 1))
        scale, shift = scale.reshape(along), shift.reshape(along)
    a, b = ((scale * end + shift).reshape(lower.shape) for end in (lower, upper))
    return np.minimum(a, b), np.maximum(a, b)


def _product(layer: Any) -> Any:
    """The product of the weight of `layer` and a sample."""
    if isinstance(layer, nn.Conv1d):
        return _convolved_rows(layer)
    if isinstance(layer, nn.Conv2d):
        return _convolved(layer)
    if isinstance(layer, nn.ConvTranspose2d):
        return _painted(layer)
    return np.dot if isinstance(layer, nn.Linear) else lambda weight, x: np.dot(x, weight)


def _convolved_rows(layer: nn.Conv1d) -> Any:
    pad, step, hole = int(layer.padding[0]), layer.stride[0], layer.dilation[0]
    each, out = layer.in_channels // layer.groups, layer.out_channels // layer.groups

    def product(weight: Any, x: Any) -> Any:
        x = np.pad(x, [(0, 0), (pad, pad)], constant_values=ZERO)
        reach = hole * (weight.shape[2] - 1) + 1
        y = np.empty((layer.out_channels, (x.shape[1] - reach) // step + 1), dtype=object)
        for channel, place in np.ndindex(*y.shape):
            group, left = channel // out, place * step
            window = x[group * each : (group + 1) * each, left : left + reach : hole]
            y[channel, place] = (weight[channel] * window).sum()
        return y

    return product


def _painted(layer: nn.ConvTranspose2d) -> Any:
    """Of a transposed convolution: each pixel adds its kernel to a canvas that is cropped."""
    pads, more = layer.padding, layer.output_padding
    each, out = layer.in_channels // layer.groups, layer.out_channels // layer.groups

    def product(weight: Any, x: Any) -> Any:
        sides = zip(x.shape[1:], layer.stride, layer.dilation, weight.shape[2:], more, strict=True)
        sizes = [(n - 1) * step + hole * (k - 1) + 1 + rest for n, step, hole, k, rest in sides]
        y = np.full((layer.out_channels, *sizes), ZERO, dtype=object)
        for channel, i, j in np.ndindex(*x.shape):
            group = channel // each
            for row, column in np.ndindex(*weight.shape[2:]):
                top = i * layer.stride[0] + row * layer.dilation[0]
                left = j * layer.stride[1] + column * layer.dilation[1]
                added = weight[channel, :, row, column] * x[channel, i, j]
                y[group * out : (group + 1) * out, top, left] += added
        return y[:, pads[0] : sizes[0] - pads[0], pads[1] : sizes[1] - pads[1]]

    return product


def _convolved(layer: nn.Conv2d) -> Any:
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    pad: Any = [(0, 0), *((p, p) for p in layer.padding)]
    step, each = layer.dilation, layer.in_channels // layer.groups

    def product(weight: Any, x: Any) -> Any:
        x = np.pad(x, pad, constant_values=ZERO)
        out = layer.out_channels // layer.groups
        height = (x.shape[1] - step[0] * (rows - 1) - 1) // down + 1
        width = (x.shape[2] - step[1] * (columns - 1) - 1) // right + 1
        y = np.empty((layer.out_channels, height, width), dtype=object)
        for place in np.ndindex(*y.shape):
            group, top, left = place[0] // out, place[1] * down, place[2] * right
            window = x[
                group * each : (group + 1) * each,
                top : top + step[0] * (rows - 1) + 1 : step[0],
                left : left + step[1] * (columns - 1) + 1 : step[1],
            ]
            y[place] = (weight[place[0]] * window).sum()
        return y

    return product


def _pooled(layer: Any, x: Any) -> Any:
    """Maximum or mean over square windows without padding."""
    size, stride = layer.kernel_size, layer.stride
    height, width = ((side - size) // stride + 1 for side in x.shape[1:])
    y = np.empty((len(x), height, width), dtype=object)
    for channel, i, j in np.ndindex(*y.shape):
        window = x[channel, i * stride : i * stride + size, j * stride : j * stride + size]
        mean = isinstance(layer, nn.AvgPool2d)
        y[channel, i, j] = window.sum() / size**2 if mean else window.max()
    return y
