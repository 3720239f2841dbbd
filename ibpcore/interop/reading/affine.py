"""Rules of convolutions, products with matrices and batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.arithmetic import plus, scaled
from ibpcore.interop.reading.building import Signal, Value
from ibpcore.interop.reading.folding import exact
from ibpcore.interop.reading.operations import Operation, Rule
from ibpcore.interop.reading.rearrangements import transposed
from ibpcore.interop.reading.windows import (
    in_images,
    of_rows_or_images,
    transposed_windows,
    windows_of,
)

AXES = {3: il.IntervalConv1d, 4: il.IntervalConv2d}
"""Convolutions by the number of dimensions of their weights."""


def with_tensors(layer: Any, **tensors: Tensor | None) -> Any:
    """`layer` with these parameters."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.contiguous()))
    return layer


def _read_convolution(of: Operation) -> Value:
    x, weight = of.signal(), of.tensor(of.constant(1, "weight"))
    if weight.ndim not in AXES:
        raise UserError(f"convolutions in {weight.ndim - 2} dimensions have no interval rule")
    node = of.image(x, [weight.ndim])
    how = windows_of(of, x.shape[2:], weight.shape[2:])
    if not how.is_symmetric:
        node = of.layer(il.IntervalZeroPad(how.padding), node)
    groups = int(of.attributes.get("group", 1))
    out, inner, *kernel = weight.shape
    bias = None if of.input(2) is None else of.tensor(of.constant(2, "bias"))
    padding = how.starts if how.is_symmetric else (0,) * len(kernel)
    with torch.device("meta"):
        geometry: Any = kernel, how.strides, padding, how.dilations, groups, bias is not None
        layer = AXES[weight.ndim](inner * groups, out, *geometry)
    node = of.layer(with_tensors(layer, weight=weight, bias=bias), node)
    return Signal(node, (1, *of.builder.shape(node)))


def _read_transposed_convolution(of: Operation) -> Value:
    """For rows as for images of height 1."""
    x, weight = of.signal(), of.tensor(of.constant(1, "weight"))
    if weight.ndim not in AXES:
        raise UserError(f"convolutions in {weight.ndim - 2} dimensions have no interval rule")
    node = of.image(x, [weight.ndim])
    windows, extra = transposed_windows(of, x.shape[2:], weight.shape[2:])
    if weight.ndim == 3:
        weight, windows, extra = weight[:, :, None], in_images(windows), (0, *extra)
        channels, length = of.builder.shape(node)
        node = of.builder.formed(node, (channels, 1, length), of.place)
    groups = int(of.attributes.get("group", 1))
    bias = None if of.input(2) is None else of.tensor(of.constant(2, "bias"))
    # What is cut off at the end may be more or less than at the start.
    cut = [end - more for end, more in zip(windows.ends, extra, strict=True)]
    plain = windows.is_symmetric and all(
        more < max(stride, hole)
        for more, stride, hole in zip(extra, windows.strides, windows.dilations, strict=True)
    )
    padding = windows.starts if plain else (0, 0)
    added = extra if plain else tuple(max(-end, 0) for end in cut)
    with torch.device("meta"):
        sizes: Any = weight.shape[0], weight.shape[1] * groups, windows.kernel, windows.strides
        how: Any = padding, added, groups, bias is not None, windows.dilations
        layer = il.IntervalConvTranspose2d(*sizes, *how)
    node = of.layer(with_tensors(layer, weight=weight, bias=bias), node)
    if not plain:
        channels, *lengths = of.builder.shape(node)
        sides = zip(windows.starts, lengths, cut, strict=True)
        ranges = [[start, size - max(end, 0), 1] for start, size, end in sides]
        node = of.layer(il.IntervalSlice([[0, channels, 1], *ranges]), node)
    return of_rows_or_images(of, x, node)


def product(of: Operation, a: Value | None, b: Value | None) -> Signal:
    """The matrix product of a signal and a constant, in either order."""
    if isinstance(a, Signal) and isinstance(b, np.ndarray):
        found, x, constant = _right_product(of, a, _matrix(b)), a, b
    elif isinstance(a, np.ndarray) and isinstance(b, Signal):
        found, x, constant = _left_product(of, _matrix(a), b), b, a
    else:
        raise UserError("only products with a constant matrix have an interval rule")
    more = (constant.ndim - 2) - max(len(x.shape) - 2, 0)
    return Signal(found.node, (1,) * max(more, 0) + found.shape)


def _matrix(constant: np.ndarray) -> np.ndarray:
    """A constant without leading dimensions of size 1."""
    if constant.ndim == 0 or any(size != 1 for size in constant.shape[:-2]):
        raise UserError("products with more than one matrix have no interval rule")
    return constant.reshape(constant.shape[-2:])


def _right_product(of: Operation, x: Signal, matrix: np.ndarray) -> Signal:
    """x @ matrix."""
    columns = matrix if matrix.ndim == 2 else matrix[:, None]
    if not x.shape or x.shape[-1] != len(matrix):
        raise UserError(f"shapes {x.shape} and {matrix.shape} do not fit each other")
    shape = (*x.shape[:-1], *matrix.shape[1:])
    rows = x.shape[1:] if len(x.shape) > 1 and x.shape[0] == 1 else x.shape
    return Signal(of.layer(_linear(of, columns.T), of.formed(x, rows)), shape)


def _left_product(of: Operation, matrix: np.ndarray, x: Signal) -> Signal:
    """matrix @ x."""
    rows = matrix if matrix.ndim == 2 else matrix[None]
    inner = x.shape[-2:][:1]
    if inner != rows.shape[1:]:
        raise UserError(f"shapes {matrix.shape} and {x.shape} do not fit each other")
    shape = (*x.shape[:-2], *matrix.shape[:-1], *x.shape[-2:][1:])
    if np.prod(x.shape) == rows.shape[1]:  # one column
        return Signal(of.layer(_linear(of, rows), of.formed(x, inner)), shape)
    last = len(x.shape)
    swap = il.IntervalPermute((*range(last - 1), last, last - 1))
    node = of.layer(swap, of.formed(x, x.shape))
    return Signal(of.layer(swap, of.layer(_linear(of, rows), node)), shape)


def _linear(of: Operation, weight: np.ndarray) -> il.IntervalLinear:
    """A layer with this weight, (out, in)."""
    numbers = of.tensor(weight)
    out, features = numbers.shape
    with torch.device("meta"):
        layer = il.IntervalLinear(features, out, bias=False)
    return with_tensors(layer, weight=numbers)


def _read_gemm(of: Operation) -> Value:
    """alpha A' B' + beta C, in which A' and B' may be transposed."""
    factors: list[Value] = []
    for at, name in enumerate(("transA", "transB")):
        value = of.signal(at) if isinstance(of.input(at), Signal) else of.constant(at, "matrix")
        if len(value.shape) != 2:
            raise UserError(f"it takes matrices, not shape {tuple(value.shape)}")
        turned = of.attributes.get(name, 0)
        factors.append(transposed(of, value, (1, 0)) if turned else value)
    found = scaled(of, product(of, *factors), of.attributes.get("alpha", 1.0))
    beta = of.attributes.get("beta", 1.0)
    if of.input(2) is None or beta == 0:
        return found
    bias = of.constant(2, "bias")
    return plus(of, found, bias if beta == 1 else exact("Mul", bias, np.float32(beta)))


def _read_batch_norm(of: Operation) -> Value:
    if of.attributes.get("training_mode", 0) or not of.attributes.get("spatial", 1):
        raise UserError("only batch norm in inference mode, per channel, has an interval rule")
    x = of.signal()
    node = of.image(x)
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [of.tensor(of.constant(at, name)) for at, name in enumerate(names, 1)]
    epsilon = of.attributes.get("epsilon", float(np.float32(1e-5)))
    layer = il.IntervalBatchNorm(len(tensors[0]), eps=epsilon, dtype=of.builder.dtype)
    with_tensors(layer, weight=tensors[0], bias=tensors[1])
    layer.running_mean, layer.running_var = tensors[2:]
    if not bool((layer.running_var + epsilon > 0).all()):
        raise UserError("a variance is not above 0")
    return Signal(of.layer(layer, node), x.shape)


RULES: dict[str, Rule] = {
    "Conv": _read_convolution,
    "ConvTranspose": _read_transposed_convolution,
    "MatMul": lambda of: product(of, of.input(0), of.input(1)),
    "Gemm": _read_gemm,
    "BatchNormalization": _read_batch_norm,
}
