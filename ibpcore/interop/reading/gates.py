"""Activations that files write as products, of which the whole has tighter bounds than its parts.

Their numbers, such as the root of 2 in GELU, are recognised as float32 has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from ibpcore import nn as il
from ibpcore.interop.reading.building import Builder
from ibpcore.interop.tracing import operation
from ibpcore.nn.layers import IntervalLayer, kind_of

DEPTH, MOST = 8, 12
"""The largest number of operations of a gate, within one another and together."""


def _number(value: float) -> str:
    return f"{np.float32(value):.9g}"


def _pair(word: str, a: str, b: str) -> str:
    return f"({min(a, b)} {word} {max(a, b)})"


CUBE = _pair("mul", _pair("mul", "x", "x"), "x")
CUBIC = _pair("add", "x", f"({CUBE} * {_number(0.044715)})")
TANH_GATE = f"(Tanh(({CUBIC} * {_number(math.sqrt(2 / math.pi))})) + 1)"
ERF_GATES = (
    f"(erf((x / {_number(math.sqrt(2))})) + 1)",
    f"(erf((x * {_number(math.sqrt(0.5))})) + 1)",
)


def _halved(gate: str) -> tuple[str, str, str]:
    """The ways to write x times half a gate."""
    late = f"({_pair('mul', 'x', gate)} * 0.5)"
    return _pair("mul", "(x * 0.5)", gate), _pair("mul", "x", f"({gate} * 0.5)"), late


GATES: dict[str, Callable[[], IntervalLayer]] = {
    _pair("mul", "x", "Sigmoid(x)"): il.IntervalSiLU,
    _pair("mul", "x", "Tanh(Softplus(x))"): il.IntervalMish,
    _pair("mul", "x", "(Hardtanh(0, 6, (x + 3)) / 6)"): il.IntervalHardswish,
    **{text: il.IntervalGELU for gate in ERF_GATES for text in _halved(gate)},
    **dict.fromkeys(_halved(TANH_GATE), lambda: il.IntervalGELU("tanh")),
}
"""Layers by the text of what they compute."""


def gate(builder: Builder, node: fx.Node) -> tuple[IntervalLayer, fx.Node] | None:
    """A layer that computes the output of a node, and the node that it reads; None if none does."""
    for x in _sources(node):
        made = GATES.get(_text(builder, node, x))
        if made is not None:
            return made(), x
    return None


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the output of a node is computed from, the nearest first."""
    found = [node]
    for other in found:
        found += [source for source in other.all_input_nodes if source not in found]
        if len(found) > MOST:
            break
    return found


def _text(builder: Builder, node: fx.Node, x: fx.Node, depth: int = DEPTH) -> str:
    """What a node computes from `x`, as far as gates are made of it; other nodes are a "?"."""
    if node is x:
        return "x"
    if depth == 0:
        return "?"
    inner = [_text(builder, source, x, depth - 1) for source in node.all_input_nodes]
    if node.op == "call_module":
        return _of_layer(builder.root.get_submodule(str(node.target)), inner[0])
    if operation(node) in ("mul", "add"):
        return _pair(operation(node), inner[0], inner[-1])
    return f"erf({inner[0]})" if operation(node) == "erf" else "?"


def _of_layer(layer: Any, inner: str) -> str:
    if isinstance(layer, il.IntervalScale) and layer.scale.numel() == layer.shift.numel() == 1:
        scale, shift = float(layer.scale), float(layer.shift)
        if scale != 1:
            return f"({inner} * {_number(scale)})" if shift == 0 else "?"
        return f"({inner} + {_number(shift)})"
    if isinstance(layer, il.IntervalDivide) and layer.divisor.numel() == 1:
        return f"({inner} / {_number(float(layer.divisor))})"
    if isinstance(layer, il.IntervalHardtanh):
        return f"Hardtanh({layer.min_val:g}, {layer.max_val:g}, {inner})"
    plain = isinstance(layer, il.IntervalSigmoid | il.IntervalTanh | il.IntervalSoftplus)
    return f"{kind_of(layer)}({inner})" if plain else "?"
