"""An adversarial execution of a stored network in float32.

It may do whatever the claim `float32` allows (docs/soundness.md): sum in any order, with or
without fused multiply-add, normalise by any of the usual formulas, flush subnormal results to
zero. Of all results of a layer that it can think of, it takes those that favour the violation,
number by number. Only the parameters of the layers are used, no bounds. Arrays are numpy's, of
type float32, without a batch dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ibpcore.nn import (
    IntervalAbs,
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDivide,
    IntervalFlatten,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalIndexSelect,
    IntervalLayer,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaximum,
    IntervalMaxPool2d,
    IntervalMinimum,
    IntervalNormalize,
    IntervalPermute,
    IntervalPReLU,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSlice,
    IntervalSoftsign,
    IntervalSubtract,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.constants import Constants

Array: TypeAlias = Any
After = Callable[[Tensor], Tensor]
"""What follows a layer, in float64: from its output to what the adversary wants to be large."""
SMALLEST = np.float32(2.0**-126)


class Unit(NamedTuple):
    """The operations of a processor, which may flush subnormal results to zero."""

    flushes: bool

    def rounded(self, x: Array) -> Array:
        """`x` in float32."""
        y = np.asarray(x, dtype=np.float32)
        return np.where(np.abs(y) < SMALLEST, np.float32(0), y) if self.flushes else y

    def fused(self, a: Array, b: Array, c: Array) -> Array:
        """a b + c, rounded once.

        The product is exact in float64. The sum is rounded to odd there, after which rounding it
        to float32 gives the nearest float32 of the exact sum.
        """
        a, b, c = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (a, b, c)))
        exact = a * b
        total = exact + c
        part = total - exact
        lost = (exact - (total - part)) + (c - part)
        even = np.ascontiguousarray(total).view(np.int64) % 2 == 0
        odd = np.nextafter(total, np.copysign(np.inf, lost))
        return self.rounded(np.where((lost != 0) & even, odd, total))

    def multiplied_and_added(self, a: Array, b: Array, c: Array) -> list[Array]:
        """a b + c with one rounding, and with two."""
        return [self.fused(a, b, c), self.rounded(self.rounded(a * b) + c)]


UNITS = (Unit(flushes=False), Unit(flushes=True))


def executed(
    model: IntervalSequential, image: Array, favoured: int, label: int, unit: Unit
) -> Array:
    """Logits (classes,) of `image` (C, H, W), with f_favoured - f_label as large as it can get."""
    exact = copy.deepcopy(model).double()
    with np.errstate(over="ignore", invalid="ignore"):
        return execute(exact, image, lambda logits: logits[0, favoured] - logits[0, label], unit)


def execute(layer: Any, x: Array, after: After, unit: Unit) -> Array:
    """The output of `layer` that makes `after` large."""
    if isinstance(layer, IntervalSequential):
        for place, part in enumerate(layer):
            rest = layer[place + 1 :]
            x = execute(part, x, lambda y, rest=rest: after(rest(y)), unit)  # type: ignore[misc]
        return x
    if isinstance(layer, IntervalResidual):
        shortcut = layer.shortcut(_tensor(x))
        branch = execute(layer.branch, x, lambda y: after(y + shortcut), unit)
        known = _tensor(branch)
        return unit.rounded(branch + execute(layer.shortcut, x, lambda y: after(known + y), unit))
    if isinstance(layer, IntervalProduct):
        second = layer.second(_tensor(x))
        first = execute(layer.first, x, lambda y: after(y * second), unit)
        factor = _tensor(first)
        return unit.rounded(first * execute(layer.second, x, lambda y: after(factor * y), unit))
    if isinstance(layer, IntervalConcat):
        return _concatenated(layer, x, after, unit)
    results = np.stack(list(EXECUTED[type(layer)](layer, x, unit)))
    wanted = _wanted(after, results[0])
    return np.where(wanted, results.max(0), results.min(0))


def _concatenated(layer: IntervalConcat, x: Array, after: After, unit: Unit) -> Array:
    parts = [branch(_tensor(x)) for branch in layer.branches]
    for place, branch in enumerate(layer.branches):
        before, behind = parts[:place], parts[place + 1 :]

        def onwards(y: Tensor, before: Any = before, behind: Any = behind) -> Tensor:
            return after(torch.cat([*before, y, *behind], layer.dim))

        parts[place] = _tensor(execute(branch, x, onwards, unit))
    return _array(torch.cat(parts, layer.dim))


def _wanted(after: After, y: Array) -> Array:
    """Where a larger number makes `after` larger."""
    point = _tensor(y).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(after(point), point)
    return gradient[0].numpy() >= 0


def _tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))[None]


def _array(x: Tensor) -> Array:
    return x[0].detach().numpy().astype(np.float32)


# Sums of products


def _sums(layer: nn.Module, x: Array, unit: Unit) -> Iterable[Array]:
    """W x + b in many orders; W and b are read off the layer's own output."""
    zero = torch.zeros(1, *x.shape, dtype=torch.float64)
    bias = _array(layer(zero))
    matrix = torch.autograd.functional.jacobian(layer, zero).reshape(bias.size, x.size)
    weight = matrix.numpy().astype(np.float32)
    totals = _orders(weight, np.broadcast_to(x.reshape(-1), weight.shape), bias.reshape(-1), unit)
    return (total.reshape(bias.shape) for total in totals)


def _averages(layer: IntervalAvgPool2d, x: Array, unit: Unit) -> Iterable[Array]:
    """Sums of the same in many orders, divided by their number."""
    zero = torch.zeros(1, *x.shape, dtype=torch.float64)
    shape = layer(zero).shape[1:]
    matrix = torch.autograd.functional.jacobian(layer, zero).reshape(shape.numel(), x.size).numpy()
    count = np.round(1 / matrix.max(1)).astype(np.float32)
    ones = (matrix > 0).astype(np.float32)
    totals = _orders(ones, np.broadcast_to(x.reshape(-1), ones.shape), np.zeros_like(count), unit)
    return (unit.rounded(total / count).reshape(tuple(shape)) for total in totals)


def _orders(weight: Array, x: Array, bias: Array, unit: Unit) -> list[Array]:
    """sum_j weight[:, j] x[:, j] + bias, (rows,), in each of many orders.

    One after the other as stored, reversed, by value and by size, in both directions, with the
    bias first or last; and pairwise, each with and without fused multiply-add.
    """
    products = weight.astype(np.float64) * x
    stored = np.broadcast_to(np.arange(weight.shape[1]), weight.shape)
    keys = (stored, -stored, products, -products, np.abs(products), -np.abs(products))
    orders = [np.argsort(key, axis=1, kind="stable") for key in keys]
    results = []
    for order in orders:
        w, v = (np.take_along_axis(part, order, 1) for part in (weight, x))
        for fused, first in product((False, True), repeat=2):
            total = bias if first else np.zeros_like(bias)
            for a, b in zip(w.T, v.T, strict=True):
                total = unit.multiplied_and_added(a, b, total)[0 if fused else 1]
            results.append(total if first else unit.rounded(total + bias))
        results.append(unit.rounded(_pairwise(unit.rounded(w * v), unit) + bias))
    return results


def _pairwise(terms: Array, unit: Unit) -> Array:
    """Sums (rows,) of the columns by halves, as vector units and reductions do it."""
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[:, :1])], axis=1)
        terms = unit.rounded(terms[:, 0::2] + terms[:, 1::2])
    return terms[:, 0]


# Batch norm, normalisation, constants


def _batch_norm(layer: Any, x: Array, unit: Unit) -> list[Array]:
    mean, variance, weight, bias = (
        _along(part, x)
        for part in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    variance = unit.rounded(variance + np.float32(layer.eps))
    root = unit.rounded(np.sqrt(variance))
    # A reciprocal square root may err by two units in the last place; rounding takes half a one.
    inverse = 1 / np.sqrt(variance.astype(np.float64))
    place = np.spacing(inverse.astype(np.float32))
    inverses = [unit.rounded(1 / root), *(unit.rounded(inverse + n * place) for n in (-1.5, 1.5))]
    centred = unit.rounded(x - mean)
    results = [
        y
        for quotient in (unit.rounded(centred / root), *(centred * r for r in inverses))
        for y in unit.multiplied_and_added(unit.rounded(quotient), weight, bias)
    ]
    results += [unit.rounded(unit.rounded(unit.rounded(weight * centred) / root) + bias)]
    for scale in (unit.rounded(weight / root), *(unit.rounded(weight * r) for r in inverses)):
        results += unit.multiplied_and_added(centred, scale, bias)
        for shift in unit.multiplied_and_added(-mean, scale, bias):
            results += unit.multiplied_and_added(x, scale, shift)
    return results


def _normalize(layer: IntervalNormalize, x: Array, unit: Unit) -> list[Array]:
    mean, std = _along(layer.mean, x), _along(layer.std, x)
    centred, inverse = unit.rounded(x - mean), unit.rounded(1 / std)
    shifts = [unit.rounded(-mean * inverse), unit.rounded(-mean / std)]
    results = [unit.rounded(centred / std), unit.rounded(centred * inverse)]
    return results + [y for b in shifts for y in unit.multiplied_and_added(x, inverse, b)]


def _scale(layer: IntervalScale, x: Array, unit: Unit) -> list[Array]:
    return unit.multiplied_and_added(x, _along(layer.scale, x), _along(layer.shift, x))


def _prelu(layer: IntervalPReLU, x: Array, unit: Unit) -> list[Array]:
    return [np.where(x > 0, x, unit.rounded(x * _along(layer.weight, x)))]


def _hardsigmoid(layer: nn.Module, x: Array, unit: Unit) -> list[Array]:
    inner = np.clip(unit.rounded(x + np.float32(3)), np.float32(0), np.float32(6))
    return [unit.rounded(inner / np.float32(6)), unit.rounded(inner * np.float32(1 / 6))]


def _hardswish(layer: nn.Module, x: Array, unit: Unit) -> list[Array]:
    inner = np.clip(unit.rounded(x + np.float32(3)), np.float32(0), np.float32(6))
    product = unit.rounded(x * inner)
    after = [unit.rounded(x * gate) for gate in _hardsigmoid(layer, x, unit)]
    return [
        *after,
        unit.rounded(product / np.float32(6)),
        unit.rounded(product * np.float32(1 / 6)),
    ]


def _softsign(layer: nn.Module, x: Array, unit: Unit) -> list[Array]:
    return [unit.rounded(x / unit.rounded(1 + np.abs(x)))]


def _subtract(layer: IntervalSubtract, x: Array, unit: Unit) -> list[Array]:
    return [unit.rounded(x - _placed(layer, layer.constant, x))]


def _divide(layer: IntervalDivide, x: Array, unit: Unit) -> list[Array]:
    divisor = _placed(layer, layer.divisor, x)
    return [unit.rounded(x / divisor), unit.rounded(x * unit.rounded(1 / divisor))]


def _placed(layer: Constants, constant: Tensor, x: Array) -> Array:
    """A constant, per channel or in the shape of an image, as factors of `x`."""
    (spread,) = layer.spread(constant)
    if spread.dim() == 1:
        return _along(spread, x)
    return spread.expand(1, *x.shape)[0].detach().numpy().astype(np.float32)


def _along(parameter: Tensor, x: Array) -> Array:
    """A float32 number for each channel, or one for all, as factors of `x`."""
    values = parameter.detach().numpy().astype(np.float32)
    return values.reshape(-1, *[1] * (x.ndim - 1))


# Functions of single numbers, and what only moves and compares numbers


def _leaky_relu(layer: Any, x: Array, unit: Unit) -> list[Array]:
    return [np.where(x > 0, x, unit.rounded(np.float32(layer.negative_slope) * x))]


def _itself(layer: nn.Module, x: Array, unit: Unit) -> list[Array]:
    return [_array(layer(_tensor(x)))]


EXECUTED: dict[type[IntervalLayer], Callable[[Any, Array, Unit], Iterable[Array]]] = {
    IntervalConv1d: _sums,
    IntervalConv2d: _sums,
    IntervalConvTranspose2d: _sums,
    IntervalMatMul: _sums,
    IntervalLinear: _sums,
    IntervalAvgPool2d: _averages,
    IntervalBatchNorm: _batch_norm,
    IntervalNormalize: _normalize,
    IntervalScale: _scale,
    IntervalSubtract: _subtract,
    IntervalDivide: _divide,
    IntervalLeakyReLU: _leaky_relu,
    IntervalPReLU: _prelu,
    IntervalHardsigmoid: _hardsigmoid,
    IntervalHardswish: _hardswish,
    IntervalSoftsign: _softsign,
    **dict.fromkeys(
        (
            IntervalReLU,
            IntervalAbs,
            IntervalHardtanh,
            IntervalMaximum,
            IntervalMinimum,
            IntervalMaxPool2d,
            IntervalUpsample,
            IntervalFlatten,
            IntervalReshape,
            IntervalPermute,
            IntervalZeroPad,
            IntervalSlice,
            IntervalIndexSelect,
        ),
        _itself,
    ),
}
"""All results that an execution of a layer may have, for those that hold no others."""
COMPOSED = frozenset({IntervalResidual, IntervalProduct, IntervalConcat})
"""Layers that hold others: each sum, product or concatenation has one result for given parts."""
