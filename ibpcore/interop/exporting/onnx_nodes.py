"""The ONNX nodes of each layer: one or two, with the stored parameters.

Nothing is folded, so that an ONNX file holds exactly the network of the certificates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.exporting.onnx_graph import Graph, Value
from ibpcore.nn import IntervalSequential
from ibpcore.nn.constants import Constants
from ibpcore.nn.layers import kind_of

Writer = Callable[[Graph, Any, Value], str]
"""Adds the nodes of a layer for an input to the graph; returns the name of the output."""


def add(graph: Graph, layer: nn.Module, x: Value) -> Value:
    """Adds `layer` with input `x` to the graph, and returns its output.

    Raises:
        UserError: the layer, or one of its settings, cannot be exported.
    """
    if isinstance(layer, IntervalSequential) and type(layer).forward is IntervalSequential.forward:
        for part in layer:
            x = add(graph, part, x)
        return x
    if type(layer) not in WRITERS:
        raise UserError(f"{kind_of(layer)} cannot be exported to ONNX")
    return Value(WRITERS[type(layer)](graph, layer, x), layer(x.example))


def _write_convolution(graph: Graph, layer: Any, x: Value) -> str:
    if layer.padding_mode != "zeros":
        kind = kind_of(layer)
        raise UserError(f"{kind} with {layer.padding_mode} padding cannot be exported")
    pads = layer._reversed_padding_repeated_twice
    return graph.node(
        "Conv",
        [x.name, *_weights(graph, layer)],
        kernel_shape=layer.kernel_size,
        strides=_repeated(layer.stride, len(layer.kernel_size)),
        dilations=_repeated(layer.dilation, len(layer.kernel_size)),
        group=layer.groups,
        pads=[*reversed(pads[0::2]), *reversed(pads[1::2])],
    )


def _write_transposed(graph: Graph, layer: nn.ConvTranspose2d, x: Value) -> str:
    return graph.node(
        "ConvTranspose",
        [x.name, *_weights(graph, layer)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        dilations=layer.dilation,
        group=layer.groups,
        pads=[*layer.padding] * 2,
        output_padding=layer.output_padding,
    )


def _weights(graph: Graph, layer: Any) -> list[str]:
    """The names of the weight and, if there is one, the bias."""
    given = {"weight": layer.weight, "bias": layer.bias}
    return [graph.constant(layer, name, t) for name, t in given.items() if t is not None]


def _write_linear(graph: Graph, layer: nn.Linear, x: Value) -> str:
    if x.example.dim() == 2:
        return graph.node("Gemm", [x.name, *_weights(graph, layer)], transB=1)
    turned = graph.constant(layer, "weight.T", layer.weight.T)
    return _matrix_product(graph, layer, x, turned)


def _matrix_product(graph: Graph, layer: Any, x: Value, weight: str) -> str:
    product = graph.node("MatMul", [x.name, weight])
    if layer.bias is None:
        return product
    return graph.node("Add", [product, graph.constant(layer, "bias", layer.bias)])


def _write_matmul(graph: Graph, layer: il.IntervalMatMul, x: Value) -> str:
    if x.example.dim() == 2:
        return graph.node("Gemm", [x.name, *_weights(graph, layer)])
    return _matrix_product(graph, layer, x, graph.constant(layer, "weight", layer.weight))


def _write_batch_norm(graph: Graph, layer: Any, x: Value) -> str:
    layer.operators()  # refuses training mode
    given = {
        "weight": torch.ones_like(layer.running_var) if layer.weight is None else layer.weight,
        "bias": torch.zeros_like(layer.running_mean) if layer.bias is None else layer.bias,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    names = [graph.constant(layer, name, tensor) for name, tensor in given.items()]
    return graph.node("BatchNormalization", [x.name, *names], epsilon=layer.eps)


def _write_normalize(graph: Graph, layer: il.IntervalNormalize, x: Value) -> str:
    along = (1, -1, *[1] * (x.example.dim() - 2))
    mean, std = (graph.constant(layer, n, getattr(layer, n).view(along)) for n in ("mean", "std"))
    return graph.node("Div", [graph.node("Sub", [x.name, mean]), std])


def _write_scale(graph: Graph, layer: il.IntervalScale, x: Value) -> str:
    scale, shift = (_along(graph, layer, name, x) for name in ("scale", "shift"))
    return graph.node("Add", [graph.node("Mul", [x.name, scale]), shift])


def _along(graph: Graph, layer: Constants, name: str, x: Value) -> str:
    """The constant of a layer with that name, in a shape that broadcasts against `x`."""
    value: Tensor = getattr(layer, name)
    if value.numel() in (1, layer.channels):
        value = value.reshape(1, -1, *[1] * (x.example.dim() - 2))
    return graph.constant(layer, name, value)


def _write_prelu(graph: Graph, layer: nn.PReLU, x: Value) -> str:
    along = (-1, *[1] * (x.example.dim() - 2))
    return graph.node("PRelu", [x.name, graph.constant(layer, "weight", layer.weight.view(along))])


def _write_hardtanh(graph: Graph, layer: nn.Hardtanh, x: Value) -> str:
    given = {"min_val": layer.min_val, "max_val": layer.max_val}
    limits = [graph.constant(layer, n, torch.tensor(float(v))) for n, v in given.items()]
    return graph.node("Clip", [x.name, *limits])


def _write_extremum(kind: str, graph: Graph, layer: Any, x: Value) -> str:
    along = (1, -1, *[1] * (x.example.dim() - 2))
    constant = graph.constant(layer, "constant", layer.constant.reshape(along))
    return graph.node(kind, [x.name, constant])


def _write_hardsigmoid(graph: Graph, layer: nn.Module, x: Value) -> str:
    """Not by HardSigmoid, whose factor 1/6 would be rounded."""
    three, zero, six = (_number(graph, layer, number) for number in (3.0, 0.0, 6.0))
    raised = graph.node("Add", [x.name, three])
    return graph.node("Div", [graph.node("Clip", [raised, zero, six]), six])


def _write_hardswish(graph: Graph, layer: nn.Module, x: Value) -> str:
    return graph.node("Mul", [x.name, _write_hardsigmoid(graph, layer, x)])


def _write_softplus(graph: Graph, layer: nn.Softplus, x: Value) -> str:
    beta = _number(graph, layer, float(layer.beta))
    return graph.node("Div", [graph.node("Softplus", [graph.node("Mul", [x.name, beta])]), beta])


def _write_logsigmoid(graph: Graph, layer: nn.Module, x: Value) -> str:
    return graph.node("Neg", [graph.node("Softplus", [graph.node("Neg", [x.name])])])


def _write_gelu(graph: Graph, layer: nn.GELU, x: Value) -> str:
    if layer.approximate == "tanh":
        cube = graph.node("Mul", [graph.node("Mul", [x.name, x.name]), x.name])
        cubic = graph.node("Mul", [cube, _number(graph, layer, 0.044715)])
        scale = _number(graph, layer, math.sqrt(2 / math.pi))
        inner = graph.node("Mul", [graph.node("Add", [x.name, cubic]), scale])
        gate = graph.node("Tanh", [inner])
    else:
        root = _number(graph, layer, math.sqrt(2))
        gate = graph.node("Erf", [graph.node("Div", [x.name, root])])
    whole = graph.node("Add", [gate, _number(graph, layer, 1.0)])
    half = graph.node("Mul", [x.name, _number(graph, layer, 0.5)])
    return graph.node("Mul", [half, whole])


def _write_silu(graph: Graph, layer: nn.Module, x: Value) -> str:
    return graph.node("Mul", [x.name, graph.node("Sigmoid", [x.name])])


def _write_mish(graph: Graph, layer: nn.Module, x: Value) -> str:
    return graph.node("Mul", [x.name, graph.node("Tanh", [graph.node("Softplus", [x.name])])])


def _number(graph: Graph, layer: nn.Module, value: float) -> str:
    """The name of a constant of a layer that is a single number."""
    return graph.constant(layer, f"{value:g}", torch.tensor(value))


def _write_same(graph: Graph, layer: nn.Module, x: Value) -> str:
    return x.name


def _write_reshape(graph: Graph, layer: nn.Module, x: Value) -> str:
    shape = layer(x.example).shape
    if len(shape) == 2:  # verifiers expect Flatten here, not Reshape
        return graph.node("Flatten", [x.name], axis=1)
    target = torch.tensor([-1, *shape[1:]])
    return graph.node("Reshape", [x.name, graph.constant(layer, "shape", target)])


def _write_zero_pad(graph: Graph, layer: il.IntervalZeroPad, x: Value) -> str:
    if min(layer.padding, default=0) < 0:
        raise UserError("IntervalZeroPad that crops cannot be exported")
    ends = [0] * (2 * x.example.dim() - len(layer.padding))
    pads = [*layer.padding, *ends]  # (start, end) of each dimension, the last one first
    amounts = torch.tensor([*reversed(pads[0::2]), *reversed(pads[1::2])])
    return graph.node("Pad", [x.name, graph.constant(layer, "pads", amounts)])


def _write_slice(graph: Graph, layer: il.IntervalSlice, x: Value) -> str:
    columns = torch.tensor(layer.ranges).T
    axes = torch.arange(1, len(layer.ranges) + 1)
    given = {"starts": columns[0], "ends": columns[1], "axes": axes, "steps": columns[2]}
    names = [graph.constant(layer, name, numbers) for name, numbers in given.items()]
    return graph.node("Slice", [x.name, *names])


def _write_index_select(graph: Graph, layer: il.IntervalIndexSelect, x: Value) -> str:
    indices = graph.constant(layer, "indices", torch.tensor(layer.indices))
    return graph.node("Gather", [x.name, indices], axis=layer.dim)


def _write_upsample(graph: Graph, layer: il.IntervalUpsample, x: Value) -> str:
    scales = graph.constant(layer, "scales", torch.tensor([1.0, 1.0, *layer.factors]))
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.node("Resize", [x.name, "", scales], mode="nearest", **how)


def _pair(value: int | Sequence[int]) -> list[int]:
    return _repeated(value, 2)


def _repeated(value: int | Sequence[int], count: int) -> list[int]:
    """`count` numbers, of which torch accepts a single one too."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * (count // len(numbers))


def _strides(pool: Any) -> list[int]:
    return _pair(pool.stride or pool.kernel_size)  # torch takes an empty list for the kernel's


def _write_pool(
    kind: str, graph: Graph, layer: Any, name: str, pads: Sequence[int], **attributes: Any
) -> str:
    attributes |= {"kernel_shape": _pair(layer.kernel_size), "strides": _strides(layer)}
    return graph.node(kind, [name], **attributes, pads=pads)


def _window_pads(layer: Any, x: Value) -> tuple[list[int], list[int]]:
    """Padding before and after, which holds exactly the windows that torch uses.

    With it ONNX's own `ceil_mode`, which keeps windows that torch drops, is not needed.
    """
    pads, strides = _pair(layer.padding), _strides(layer)
    spans = [
        hole * (kernel - 1) + 1
        for kernel, hole in zip(
            _pair(layer.kernel_size), _pair(getattr(layer, "dilation", 1)), strict=True
        )
    ]
    sizes, windows = x.example.shape[-2:], layer(x.example).shape[-2:]
    sides = zip(sizes, windows, pads, strides, spans, strict=True)
    ends = [
        max(pad, (count - 1) * stride + span - size - pad)
        for size, count, pad, stride, span in sides
    ]
    return pads, ends


def _padded(graph: Graph, layer: Any, x: Value, ends: Sequence[int], value: float) -> str:
    """`x` with `value` around it, `layer.padding` before it and `ends` after it."""
    pads = torch.tensor([0, 0, *_pair(layer.padding), 0, 0, *ends])
    given = {"pads": pads, "padding value": torch.tensor(value)}
    return graph.node("Pad", [x.name, *(graph.constant(layer, *item) for item in given.items())])


def _write_average_pool(graph: Graph, layer: nn.AvgPool2d, x: Value) -> str:
    starts, ends = _window_pads(layer, x)
    if layer.divisor_override is not None:
        total = _write_sums(graph, layer, x, [*starts, *ends])
        if layer.divisor_override == 1:
            return total
        divisor = graph.constant(layer, "divisor", torch.tensor(float(layer.divisor_override)))
        return graph.node("Div", [total, divisor])
    if not layer.count_include_pad or starts == ends:
        whole = int(layer.count_include_pad)
        return _write_pool(
            "AveragePool", graph, layer, x.name, [*starts, *ends], count_include_pad=whole
        )
    # Torch counts its padding, but not what windows cover beyond it.
    beyond = [end - start for start, end in zip(starts, ends, strict=True)]
    name = _padded(graph, layer, x, starts, 0.0) if any(starts) else x.name
    return _write_pool("AveragePool", graph, layer, name, [0, 0, *beyond], count_include_pad=0)


def _write_sums(graph: Graph, layer: nn.AvgPool2d, x: Value, pads: Sequence[int]) -> str:
    """As a convolution: an average times its number of terms would round once more."""
    channels, kernel = x.example.shape[1], _pair(layer.kernel_size)
    ones = graph.constant(layer, "ones", torch.ones(channels, 1, *kernel))
    how = {"strides": _pair(layer.stride), "pads": pads, "group": channels}
    return graph.node("Conv", [x.name, ones], kernel_shape=kernel, **how)


def _write_max_pool(graph: Graph, layer: nn.MaxPool2d, x: Value) -> str:
    starts, ends = _window_pads(layer, x)
    name, pads = x.name, [*starts, *ends]
    kernel = _pair(layer.kernel_size)
    if any(end >= size for end, size in zip(ends, kernel, strict=True)):  # onnxruntime's limit
        name, pads = _padded(graph, layer, x, ends, -torch.inf), [0] * 4
    return _write_pool("MaxPool", graph, layer, name, pads, dilations=_pair(layer.dilation))


def _write_pair(kind: str, graph: Graph, layer: Any, x: Value) -> str:
    return graph.node(kind, [add(graph, branch, x).name for branch in layer.branches])


def _write_concat(graph: Graph, layer: il.IntervalConcat, x: Value) -> str:
    parts = [add(graph, branch, x).name for branch in layer.branches]
    return graph.node("Concat", parts, axis=layer.dim)


WRITERS: dict[type, Writer] = {
    il.IntervalConv1d: _write_convolution,
    il.IntervalConv2d: _write_convolution,
    il.IntervalConvTranspose2d: _write_transposed,
    il.IntervalLinear: _write_linear,
    il.IntervalMatMul: _write_matmul,
    il.IntervalBatchNorm: _write_batch_norm,
    il.IntervalNormalize: _write_normalize,
    il.IntervalScale: _write_scale,
    il.IntervalSubtract: lambda graph, layer, x: graph.node(
        "Sub", [x.name, _along(graph, layer, "constant", x)]
    ),
    il.IntervalDivide: lambda graph, layer, x: graph.node(
        "Div", [x.name, _along(graph, layer, "divisor", x)]
    ),
    il.IntervalReLU: lambda graph, layer, x: graph.node("Relu", [x.name]),
    il.IntervalLeakyReLU: lambda graph, layer, x: graph.node(
        "LeakyRelu", [x.name], alpha=layer.negative_slope
    ),
    il.IntervalSigmoid: lambda graph, layer, x: graph.node("Sigmoid", [x.name]),
    il.IntervalTanh: lambda graph, layer, x: graph.node("Tanh", [x.name]),
    il.IntervalPReLU: _write_prelu,
    il.IntervalHardtanh: _write_hardtanh,
    il.IntervalMaximum: partial(_write_extremum, "Max"),
    il.IntervalMinimum: partial(_write_extremum, "Min"),
    il.IntervalAbs: lambda graph, layer, x: graph.node("Abs", [x.name]),
    il.IntervalHardsigmoid: _write_hardsigmoid,
    il.IntervalHardswish: _write_hardswish,
    il.IntervalELU: lambda graph, layer, x: graph.node("Elu", [x.name], alpha=float(layer.alpha)),
    il.IntervalCELU: lambda graph, layer, x: graph.node("Celu", [x.name], alpha=float(layer.alpha)),
    il.IntervalSELU: lambda graph, layer, x: graph.node("Selu", [x.name]),
    il.IntervalSoftplus: _write_softplus,
    il.IntervalSoftsign: lambda graph, layer, x: graph.node("Softsign", [x.name]),
    il.IntervalLogSigmoid: _write_logsigmoid,
    il.IntervalSiLU: _write_silu,
    il.IntervalGELU: _write_gelu,
    il.IntervalMish: _write_mish,
    il.IntervalFlatten: _write_reshape,
    il.IntervalReshape: _write_reshape,
    il.IntervalPermute: lambda graph, p, x: graph.node("Transpose", [x.name], perm=p.dims),
    il.IntervalZeroPad: _write_zero_pad,
    il.IntervalSlice: _write_slice,
    il.IntervalIndexSelect: _write_index_select,
    il.IntervalUpsample: _write_upsample,
    il.IntervalAvgPool2d: _write_average_pool,
    il.IntervalMaxPool2d: _write_max_pool,
    il.IntervalDropout: _write_same,
    il.IntervalDropout1d: _write_same,
    il.IntervalDropout2d: _write_same,
    il.IntervalDropout3d: _write_same,
    il.IntervalAlphaDropout: _write_same,
    il.IntervalFeatureAlphaDropout: _write_same,
    il.IntervalResidual: partial(_write_pair, "Add"),
    il.IntervalProduct: partial(_write_pair, "Mul"),
    il.IntervalConcat: _write_concat,
}
"""By exact type, since a subclass may compute anything."""
