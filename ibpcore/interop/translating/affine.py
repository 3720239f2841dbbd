"""Translation of functions with weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Layers, Site, Translation
from ibpcore.nn.layers import IntervalLayer


def _translate_linear(site: Site, input: TracedSignal, weight: Any, bias: Any = None) -> Layers:
    with torch.device("meta"):
        layer = il.IntervalLinear(weight.value.shape[1], weight.value.shape[0], bias is not None)
    return [_with_weights(site, layer, weight, bias)]


def _translate_conv2d(
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
        layer = il.IntervalConv2d(inner * groups, out, *geometry)
    return [_with_weights(site, layer, weight, bias)]


def _with_weights(site: Site, layer: Any, weight: Any, bias: Any) -> IntervalLayer:
    for name, constant in (("weight", weight), ("bias", bias)):
        if constant is not None:
            site.tied(layer, **{name: constant})
    return cast(IntervalLayer, layer)


MODULES: dict[type[nn.Module], Translation] = {}
OPERATIONS: dict[str, Translation] = {"linear": _translate_linear, "conv2d": _translate_conv2d}
