"""Translation of activations and dropout."""

from __future__ import annotations

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Layers, Site, Translation


def _translate_leaky_relu(
    site: Site, input: TracedSignal, negative_slope: float = 0.01, inplace: bool = False
) -> Layers:
    return [il.IntervalLeakyReLU(negative_slope)]


def _translate_dropout(
    site: Site, input: TracedSignal, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Layers:
    if training:
        raise site.unsupported("it is active in evaluation too: pass training=self.training")
    return [il.IntervalDropout(p)]


MODULES: dict[type[nn.Module], Translation] = {}
OPERATIONS: dict[str, Translation] = {
    "relu": lambda site, input, inplace=False: [il.IntervalReLU()],
    "leaky_relu": _translate_leaky_relu,
    "sigmoid": lambda site, input: [il.IntervalSigmoid()],
    "tanh": lambda site, input: [il.IntervalTanh()],
    "dropout": _translate_dropout,
}
