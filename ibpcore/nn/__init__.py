"""Interval layers, networks of them, and their model files.

Start with `layers`, the base of all layers: each is its `torch.nn` twin and accepts an `Interval`
too. `affine`, `constants`, `activations`, `curved`, `dropout`, `rearrangements`, `pooling` and
`composition` hold them.
`folding` turns a model into the operators that `ibpcore.bounds` propagates through, and
`checkpoint` saves and loads models. `grammar` reads architectures that are given as text, and
`architectures` names the usual ones.
"""

from ibpcore.nn.activations import (
    IntervalAbs,
    IntervalHardsigmoid,
    IntervalHardtanh,
    IntervalLeakyReLU,
    IntervalMaximum,
    IntervalMinimum,
    IntervalPReLU,
    IntervalReLU,
)
from ibpcore.nn.affine import (
    IntervalBatchNorm,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalLinear,
    IntervalMatMul,
)
from ibpcore.nn.cnn7 import CNN7
from ibpcore.nn.composition import (
    IntervalConcat,
    IntervalProduct,
    IntervalResidual,
    IntervalSequential,
)
from ibpcore.nn.constants import IntervalDivide, IntervalNormalize, IntervalScale, IntervalSubtract
from ibpcore.nn.curved import (
    IntervalCELU,
    IntervalELU,
    IntervalGELU,
    IntervalHardswish,
    IntervalLogSigmoid,
    IntervalMish,
    IntervalSELU,
    IntervalSigmoid,
    IntervalSiLU,
    IntervalSoftplus,
    IntervalSoftsign,
    IntervalTanh,
)
from ibpcore.nn.dropout import (
    IntervalAlphaDropout,
    IntervalDropout,
    IntervalDropout1d,
    IntervalDropout2d,
    IntervalDropout3d,
    IntervalFeatureAlphaDropout,
)
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Classifier, Network
from ibpcore.nn.pooling import IntervalAvgPool2d, IntervalMaxPool2d
from ibpcore.nn.rearrangements import (
    IntervalFlatten,
    IntervalIndexSelect,
    IntervalPermute,
    IntervalReshape,
    IntervalSlice,
    IntervalUpsample,
    IntervalZeroPad,
)

__all__ = ["CNN7", "Classifier", "IntervalLayer", "Network"]
__all__ += ["IntervalBatchNorm", "IntervalConv2d", "IntervalLinear", "IntervalNormalize"]
__all__ += ["IntervalLeakyReLU", "IntervalReLU", "IntervalSigmoid", "IntervalTanh"]
__all__ += ["IntervalDivide", "IntervalScale", "IntervalSubtract"]
__all__ += ["IntervalConv1d", "IntervalConvTranspose2d", "IntervalMatMul", "IntervalProduct"]
__all__ += ["IntervalIndexSelect"]
__all__ += ["IntervalFlatten", "IntervalPermute", "IntervalReshape", "IntervalZeroPad"]
__all__ += ["IntervalAvgPool2d", "IntervalMaxPool2d", "IntervalSlice", "IntervalUpsample"]
__all__ += ["IntervalConcat", "IntervalDropout", "IntervalResidual", "IntervalSequential"]
__all__ += ["IntervalAbs", "IntervalHardsigmoid", "IntervalHardtanh", "IntervalPReLU"]
__all__ += ["IntervalCELU", "IntervalELU", "IntervalMaximum", "IntervalMinimum", "IntervalSELU"]
__all__ += ["IntervalGELU", "IntervalHardswish", "IntervalMish", "IntervalSiLU"]
__all__ += ["IntervalLogSigmoid", "IntervalSoftplus", "IntervalSoftsign"]
__all__ += ["IntervalAlphaDropout", "IntervalFeatureAlphaDropout"]
__all__ += ["IntervalDropout1d", "IntervalDropout2d", "IntervalDropout3d"]
