"""Rewrites of a trace, after which fewer kinds of operations are left to translate."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ibpcore.interop.tracing import FITTINGS, Trace, TracedSignal, operation

CONCATENATIONS = ("cat", "concat", "concatenate")
PARTED = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
"""Operations that return several parts of a tensor."""
MATRIX_PRODUCTS = ("matmul", "mm")
SUMS = ("add", "iadd", "add_")


def rewritten(trace: Trace) -> Trace:
    """An equivalent trace; the graph of `trace` is changed."""
    for node in trace.values:
        if operation(node) in FITTINGS and len(trace.signals(node)) > 1:
            node.args = node.args[:1]
    trace = _with_slices(trace)
    _merge_biases(trace)
    _nest_concatenations(trace)
    return trace


def _with_slices(trace: Trace) -> Trace:
    """The trace with parts of a tensor taken by slices, in place of `chunk`, `split`, ..."""
    values: dict[fx.Node, Any] = {}
    parts: dict[fx.Node, list[fx.Node]] = {}
    known = replace(trace, values=dict(trace.values))
    for node, value in trace.values.items():
        values[node] = value
        if operation(node) in PARTED and known.signals(node):
            sliced = _slices(known, node)
            parts[node] = [*sliced]
            values |= sliced
            known.values.update(sliced)
        elif operation(node) == "getitem" and node.args[0] in parts:
            chosen = parts[cast(fx.Node, node.args[0])][cast(Any, node.args[1])]
            if isinstance(chosen, list):
                parts[node] = chosen
            else:
                node.replace_all_uses_with(chosen)
        elif any(other in parts for other in node.all_input_nodes):
            node.args = cast(Any, fx.map_arg(node.args, lambda n: parts.get(n, n)))
            node.kwargs = cast(Any, fx.map_arg(node.kwargs, lambda n: parts.get(n, n)))
    return replace(trace, values=values)


def _slices(trace: Trace, node: fx.Node) -> dict[fx.Node, TracedSignal]:
    """A new node for each part that `node` returns, after it and in order, with its value."""
    (source,) = trace.signals(node)
    signal = cast(TracedSignal, trace.values[source])
    # A part is where its numbers come from.
    places = torch.arange(math.prod(signal.shape)).view(signal.shape)
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: places if n is source else trace.values[n]
    )
    method = node.op == "call_method"
    function: Any = getattr(torch.Tensor, operation(node)) if method else node.target
    found: Sequence[Tensor] = function(*args, **kwargs)
    made: dict[fx.Node, TracedSignal] = {}
    for part in reversed(found):
        with trace.graph.inserting_after(node):
            new = trace.graph.call_function(operator.getitem, (source, _index(part, signal.shape)))
        new.meta = node.meta
        made[new] = replace(signal, shape=tuple(part.shape))
    return dict(reversed(made.items()))


def _index(part: Tensor, shape: Sequence[int]) -> tuple[slice, ...]:
    """Slices of a tensor of this shape that give the numbers at `part`, flat indices."""
    if part.numel() == 0:
        return (slice(0, 0),) * len(shape)
    first, last = (torch.unravel_index(part.flatten()[at], tuple(shape)) for at in (0, -1))
    pairs = zip(first, last, shape, strict=True)
    return tuple(
        slice(None) if int(low) == 0 and int(high) == size - 1 else slice(int(low), int(high) + 1)
        for low, high, size in pairs
    )


def _merge_biases(trace: Trace) -> None:
    """Rewrites x @ W + b as one operation, so that it becomes one layer, which elision merges."""
    for node in trace.values:
        if operation(node) not in SUMS or node.kwargs or len(trace.signals(node)) != 1:
            continue
        (product,) = trace.signals(node)
        (bias,) = (other for other in node.args if other is not product)
        if operation(product) not in MATRIX_PRODUCTS or len(product.users) > 1 or product.kwargs:
            continue
        left, right = product.args
        width = cast(TracedSignal, trace.values[product]).shape[-1:]
        if [left] != trace.signals(product) or not _is_vector(trace, bias, width):
            continue
        node.op, node.target, node.args = "call_function", torch.addmm, (bias, left, right)


def _is_vector(trace: Trace, bias: Any, shape: tuple[int, ...]) -> bool:
    """Whether it reads a parameter of the module of this shape."""
    return (
        isinstance(bias, fx.Node)
        and bias.op == "get_attr"
        and isinstance(trace.values[bias], nn.Parameter)
        and tuple(trace.values[bias].shape) == shape
    )


def _nest_concatenations(trace: Trace) -> None:
    """Rewrites concatenations that start with the parts of an earlier one to extend that one.

    In a DenseNet they would otherwise not be nested.
    """
    made: dict[tuple[fx.Node, ...], fx.Node] = {}
    for node in trace.values:
        if operation(node) not in CONCATENATIONS or not isinstance(node.args[0], list | tuple):
            continue
        parts = cast(tuple[fx.Node, ...], tuple(node.args[0]))
        for size in range(len(parts) - 1, 0, -1):
            first = made.get(parts[:size])
            if first is not None and (first.args[1:], first.kwargs) == (node.args[1:], node.kwargs):
                node.update_arg(0, [first, *parts[size:]])
                break
        made[parts] = node
