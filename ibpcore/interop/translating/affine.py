"""Translation of functions with weights."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Constant, Layers, Site, Translation, twin
from ibpcore.nn.layers import IntervalLayer


def _translate_linear(site: Site, input: TracedSignal, weight: Any, bias: Any = None) -> Layers:
    return _translate_product(site, _turned(weight), bias)


def _translate_convolution(
    kind: type[il.IntervalConv1d | il.IntervalConv2d],
    site: Site,
    input: TracedSignal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layers:
    out, inner, *kernel = weight.value.shape
    with torch.device("meta"):
        geometry: Any = tuple(kernel), stride, padding, dilation, groups, bias is not None
        layer = kind(inner * groups, out, *geometry)
    return [_with_weights(site, layer, weight, bias)]


def _translate_conv_transpose2d(
    site: Site,
    input: TracedSignal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Layers:
    inner, out, *kernel = weight.value.shape
    with torch.device("meta"):
        geometry: Any = tuple(kernel), stride, padding, output_padding, groups, bias is not None
        layer = il.IntervalConvTranspose2d(*(inner, out * groups, *geometry, dilation))
    return [_with_weights(site, layer, weight, bias)]


def _translate_transposed_layer(site: Site, module: nn.ConvTranspose2d) -> Layers:
    """With the output padding that the size of its output needs, which a call may ask for."""
    layer: Any = twin(il.IntervalConvTranspose2d, module)
    how = module.stride, module.padding, module.dilation, module.kernel_size
    sides = zip(site.given[2:], site.shape[2:], *how, strict=True)
    layer.output_padding = tuple(
        out - ((size - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in sides
    )
    return [layer]


def _translate_matmul(site: Site, input: Any, other: Any) -> Layers:
    if isinstance(input, TracedSignal):
        return _translate_product(site, other)
    # W @ x is the transpose of x.T @ W.T.
    dims = len(site.given)
    if dims < 3 or not isinstance(input, Constant):
        raise site.unsupported("it mixes the images of a batch")
    swapped = il.IntervalPermute((*range(dims - 2), dims - 1, dims - 2))
    return [swapped, *_translate_product(site, _turned(input)), swapped]


def _turned(matrix: Constant) -> Constant:
    return matrix.formed(lambda value: value.t())


def _translate_addmm(site: Site, input: Any, mat1: Any, mat2: Any) -> Layers:
    if not isinstance(mat1, TracedSignal) or not isinstance(input, Constant):
        raise site.unsupported("only x @ W + b with constants W and b has an interval rule")
    return _translate_product(site, mat2, input)


def _translate_product(site: Site, matrix: Any, bias: Any = None) -> Layers:
    """x @ matrix + bias."""
    if not isinstance(matrix, Constant) or matrix.value.dim() != 2:
        raise site.unsupported("only products with a constant matrix have an interval rule")
    # A matrix of the module is used as the module stores it.
    turned = site.trace.owner(matrix.node, matrix.value) is None
    kind = il.IntervalLinear if turned else il.IntervalMatMul
    with torch.device("meta"):
        layer = kind(matrix.value.shape[0], matrix.value.shape[1], bias is not None)
    return [_with_weights(site, layer, _turned(matrix) if turned else matrix, bias)]


def _with_weights(site: Site, layer: Any, weight: Any, bias: Any) -> IntervalLayer:
    for name, constant in (("weight", weight), ("bias", bias)):
        if constant is None:
            continue
        if constant.value.dtype != site.trace.like.dtype:
            raise site.unsupported(f"its {name} has another type than its input")
        site.tied(layer, **{name: constant})
    return cast(IntervalLayer, layer)


MODULES: dict[type[nn.Module], Translation] = {
    nn.ConvTranspose2d: _translate_transposed_layer,
}
OPERATIONS: dict[str, Translation] = {
    "linear": _translate_linear,
    "conv1d": partial(_translate_convolution, il.IntervalConv1d),
    "conv2d": partial(_translate_convolution, il.IntervalConv2d),
    "conv_transpose2d": _translate_conv_transpose2d,
    **dict.fromkeys(("matmul", "mm", "bmm"), _translate_matmul),
    "addmm": _translate_addmm,
}
