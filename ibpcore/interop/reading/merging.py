"""Layers that files write as several nodes, of which only one has to be computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from ibpcore import nn as il
from ibpcore.interop.tracing import Trace

AFFINE = (il.IntervalLinear, il.IntervalConv1d, il.IntervalConv2d, il.IntervalConvTranspose2d)


def merged(trace: Trace) -> Trace:
    """An equivalent trace; the graph of `trace` is changed."""
    values = {node: value for node, value in trace.values.items() if not _is_merged(trace, node)}
    return replace(trace, values=values)


def _is_merged(trace: Trace, node: fx.Node) -> bool:
    """Whether a node adds a bias to a product without one, which becomes its bias then."""
    if node.op != "call_module" or (added := _added(trace.module(node))) is None:
        return False
    (product,) = node.all_input_nodes
    layer = trace.module(product) if product.op == "call_module" else None
    if not isinstance(layer, AFFINE) or layer.bias is not None or len(product.users) > 1:
        return False
    bias = _bias(added, layer, vector=len(trace.values[product].shape) == 2)
    if bias is None:
        return False
    layer.bias = nn.Parameter(bias.contiguous())
    node.replace_all_uses_with(product)
    return True


def _added(layer: nn.Module) -> Tensor | None:
    """The constant that a layer adds, if it does nothing else."""
    if isinstance(layer, il.IntervalSubtract):
        return -layer.constant
    if isinstance(layer, il.IntervalScale) and layer.scale.numel() == 1 and layer.scale == 1:
        return layer.shift
    return None


def _bias(added: Tensor, layer: Any, vector: bool) -> Tensor | None:
    """What is added to the output of a layer as one number for each of its features, if it is.

    Args:
        added: see `ibpcore.nn.constants.Constants`.
        vector: whether the output is (B, features).
    """
    if isinstance(layer, il.IntervalLinear):
        if added.numel() == 1:
            return added.reshape(()).expand(layer.out_features)
        if vector:
            return added.flatten()
        last = added.dim() > 1 and added.shape[-1] == added.numel()
        return added.flatten() if last else None
    if added.numel() == 1:
        return added.reshape(()).expand(layer.out_channels)
    return added if added.dim() == 1 else None
