"""The activations for the lists of several test files: functions from a number of channels."""

import torch

from ibpcore import nn as il


def prelu(channels: int, *slopes: float) -> il.IntervalPReLU:
    """With these slopes, repeated as needed."""
    layer = il.IntervalPReLU(channels)
    layer.weight.data = torch.tensor([slopes[i % len(slopes)] for i in range(channels)])
    return layer


PIECEWISE_LINEAR = {
    "prelu": lambda c: prelu(c, 0.25, -0.5, 1.5, 0.0),
    "prelu, one slope": lambda c: prelu(1, 0.3),
    "hardtanh": lambda c: il.IntervalHardtanh(-0.3, 0.2),
    "relu6": lambda c: il.IntervalHardtanh(0.0, 6.0),
    "hardsigmoid": lambda c: il.IntervalHardsigmoid(),
    "abs": lambda c: il.IntervalAbs(),
    "maximum": lambda c: il.IntervalMaximum(c, torch.linspace(-0.5, 0.5, c)),
    "minimum": lambda c: il.IntervalMinimum(c, 0.4),
}
CURVED = {
    "softsign": lambda c: il.IntervalSoftsign(),
    "logsigmoid": lambda c: il.IntervalLogSigmoid(),
    "softplus": lambda c: il.IntervalSoftplus(3.0, 25.0),
    "elu": lambda c: il.IntervalELU(0.7),
    "elu, steep": lambda c: il.IntervalELU(2.5),
    "elu, flat": lambda c: il.IntervalELU(0.0),
    "celu": lambda c: il.IntervalCELU(0.6),
    "selu": lambda c: il.IntervalSELU(),
    "silu": lambda c: il.IntervalSiLU(),
    "gelu": lambda c: il.IntervalGELU(),
    "gelu by tanh": lambda c: il.IntervalGELU("tanh"),
    "mish": lambda c: il.IntervalMish(),
    "hardswish": lambda c: il.IntervalHardswish(),
}
ACTIVATIONS = PIECEWISE_LINEAR | CURVED
DROPOUTS = {
    "dropout": lambda c: il.IntervalDropout(0.5),
    "dropout of rows": lambda c: il.IntervalSequential(
        il.IntervalFlatten(2), il.IntervalDropout1d(0.5)
    ),
    "dropout of channels": lambda c: il.IntervalDropout2d(0.5),
    "dropout of volumes": lambda c: il.IntervalDropout3d(0.5),
    "alpha dropout": lambda c: il.IntervalAlphaDropout(0.5),
    "alpha dropout of channels": lambda c: il.IntervalFeatureAlphaDropout(0.5),
}
