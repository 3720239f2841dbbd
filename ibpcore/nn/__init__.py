"""Interval layers, networks of them, and their model files.

Start with `layers`: each layer is its `torch.nn` twin and accepts an `Interval` too.
`folding` turns a model into the operators that `ibpcore.bounds` propagates through, and
`checkpoint` saves and loads models. `grammar` reads architectures that are given as text, and
`architectures` names the usual ones.
"""

from ibpcore.nn.cnn7 import CNN7
from ibpcore.nn.layers import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv2d,
    IntervalDropout,
    IntervalFlatten,
    IntervalLayer,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMaxPool2d,
    IntervalNormalize,
    IntervalPermute,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSigmoid,
    IntervalSlice,
    IntervalTanh,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.networks import Classifier, Network

__all__ = ["CNN7", "Classifier", "IntervalLayer", "Network"]
__all__ += ["IntervalBatchNorm", "IntervalConv2d", "IntervalLinear", "IntervalNormalize"]
__all__ += ["IntervalLeakyReLU", "IntervalReLU", "IntervalScale", "IntervalSigmoid", "IntervalTanh"]
__all__ += ["IntervalFlatten", "IntervalPermute", "IntervalReshape", "IntervalZeroPad"]
__all__ += ["IntervalAvgPool2d", "IntervalMaxPool2d", "IntervalSlice", "IntervalUpsample"]
__all__ += ["IntervalConcat", "IntervalDropout", "IntervalResidual", "IntervalSequential"]
