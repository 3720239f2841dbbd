"""Rules of functions of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.arithmetic import plus, times, with_constant
from ibpcore.interop.reading.building import Signal, Value, core
from ibpcore.interop.reading.operations import Operation, Rule
from ibpcore.nn.layers import IntervalLayer

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
"""Defaults of ONNX, which are float32 numbers, other than those of torch."""


def _plain(make: Callable[..., IntervalLayer], **defaults: Any) -> Rule:
    """The rule of a function with attributes of these defaults, in the order of the layer's."""

    def read(of: Operation) -> Value:
        given = [of.attributes.get(name, default) for name, default in defaults.items()]
        x = of.signal()
        return Signal(of.layer(make(*given), x.node), x.shape)

    return read


def _read_clip(of: Operation) -> Value:
    given = [of.option(name, at) for at, name in enumerate(("min", "max"), 1)]
    low, high = (None if v is None else float(np.reshape(v, ()).item()) for v in given)
    return clipped(of, of.signal(), low, high)


def clipped(of: Operation, x: Signal, low: float | None, high: float | None) -> Signal:
    """min(max(x, low), high)."""
    low = None if low == -math.inf else low
    high = None if high == math.inf else high
    if low is not None and high is not None and -math.inf < low < high < math.inf:
        return Signal(of.layer(il.IntervalHardtanh(low, high), x.node), x.shape)
    # If low is above high, the result is high: the minimum comes last.
    for kind, limit in ((il.IntervalMaximum, low), (il.IntervalMinimum, high)):
        if limit is not None:
            x = with_constant(of, x, kind, "constant", limit)
    return x


def _read_prelu(of: Operation) -> Value:
    x, slope = of.signal(), of.constant(1, "slope")
    shape = core(x.shape)
    aligned = (1,) * (len(x.shape) - slope.ndim) + slope.shape
    channels = aligned[len(x.shape) - len(shape) :][:1]
    if (slope.size != 1 and (slope.size,) != channels) or slope.ndim > len(x.shape):
        raise UserError("only one slope for each channel has an interval rule")
    layer = il.IntervalPReLU(slope.size)
    layer.weight = torch.nn.Parameter(of.tensor(slope).flatten())
    return Signal(of.layer(layer, of.formed(x, shape)), x.shape)


def _read_hard_sigmoid(of: Operation) -> Value:
    """max(0, min(1, alpha x + beta)): not IntervalHardsigmoid, whose factor is 1/6 exactly."""
    alpha, beta = (
        of.attributes.get(name, float(np.float32(default)))
        for name, default in (("alpha", 0.2), ("beta", 0.5))
    )
    return clipped(of, plus(of, times(of, of.signal(), alpha), beta), 0.0, 1.0)


def _read_selu(of: Operation) -> Value:
    """gamma times an ELU: not IntervalSELU, whose constants have other last digits."""
    alpha, gamma = (
        of.attributes.get(name, default)
        for name, default in (("alpha", SELU_ALPHA), ("gamma", SELU_GAMMA))
    )
    x = of.signal()
    return times(of, Signal(of.layer(il.IntervalELU(alpha), x.node), x.shape), gamma)


def _read_dropout(of: Operation) -> Value:
    if np.any(of.option("training_mode", 2, False)):
        raise UserError("it is in training mode")
    return of.signal()


def _read_cast(of: Operation) -> Value:
    """Of reals: numbers of another precision are not rounded."""
    if of.attributes.get("to") not in FLOATS:
        raise UserError("a cast to whole numbers has no interval rule")
    return of.signal()


FLOATS = (1, 10, 11, 16)
"""Numbers of ONNX for float, float16, double and bfloat16."""
RULES: dict[str, Rule] = {
    # It has a rule only as a part of GELU.
    "Erf": lambda of: Signal(of.call(torch.erf, of.signal().node), of.signal().shape),
    "Identity": lambda of: of.signal(),
    "Dropout": _read_dropout,
    "Cast": _read_cast,
    "CastLike": lambda of: of.signal(),
    "Relu": _plain(il.IntervalReLU),
    "LeakyRelu": _plain(il.IntervalLeakyReLU, alpha=float(np.float32(0.01))),
    "PRelu": _read_prelu,
    "Clip": _read_clip,
    "Abs": _plain(il.IntervalAbs),
    "HardSigmoid": _read_hard_sigmoid,
    "HardSwish": _plain(il.IntervalHardswish),
    "Sigmoid": _plain(il.IntervalSigmoid),
    "Tanh": _plain(il.IntervalTanh),
    "Softplus": _plain(il.IntervalSoftplus),
    "Softsign": _plain(il.IntervalSoftsign),
    "Elu": _plain(il.IntervalELU, alpha=1.0),
    "Celu": _plain(il.IntervalCELU, alpha=1.0),
    "Selu": _read_selu,
    "Gelu": _plain(il.IntervalGELU, approximate="none"),
    "Mish": _plain(il.IntervalMish),
}
