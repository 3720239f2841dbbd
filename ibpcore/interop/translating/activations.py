"""Translation of activations and dropout."""

from __future__ import annotations

from typing import Any

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.constants import with_constant
from ibpcore.interop.translating.site import Constant, Layers, Site, Translation
from ibpcore.nn.layers import IntervalLayer


def _plain(kind: type[IntervalLayer]) -> Translation:
    """The translation of a function whose only options are those of the layer, in its order."""

    def translate(
        site: Site, input: TracedSignal, *args: Any, inplace: bool = False, **how: Any
    ) -> Layers:
        # `inplace` comes last, and no layer overwrites its input.
        return [kind(*args[: len(kind.arguments)], **how)]

    return translate


def _translate_prelu(site: Site, input: TracedSignal, weight: Constant) -> Layers:
    return [site.tied(il.IntervalPReLU(weight.value.numel()), weight=weight)]


def _translate_clamp(site: Site, input: TracedSignal, min: Any = None, max: Any = None) -> Layers:
    if isinstance(min, int | float) and isinstance(max, int | float) and min < max:
        return [il.IntervalHardtanh(float(min), float(max))]
    # If min is above max, the result is max: the minimum comes last.
    layers = [] if min is None else _translate_maximum(site, input, min)
    return layers if max is None else [*layers, *_translate_minimum(site, input, max)]


def _translate_clamp_min(site: Site, input: TracedSignal, min: Any) -> Layers:
    return _translate_clamp(site, input, min)


def _translate_clamp_max(site: Site, input: TracedSignal, max: Any) -> Layers:
    return _translate_clamp(site, input, None, max)


def _translate_maximum(site: Site, input: Any, other: Any = None) -> Layers:
    constant = other if isinstance(input, TracedSignal) else input
    return with_constant(site, il.IntervalMaximum, "constant", constant)


def _translate_minimum(site: Site, input: Any, other: Any = None) -> Layers:
    constant = other if isinstance(input, TracedSignal) else input
    return with_constant(site, il.IntervalMinimum, "constant", constant)


def _translate_max(site: Site, input: Any, other: Any = None) -> Layers:
    if not isinstance(input, Constant) and not isinstance(other, Constant):
        raise site.unsupported()  # of the numbers of one tensor
    return _translate_maximum(site, input, other)


def _translate_min(site: Site, input: Any, other: Any = None) -> Layers:
    if not isinstance(input, Constant) and not isinstance(other, Constant):
        raise site.unsupported()
    return _translate_minimum(site, input, other)


def _dropout(kind: type[IntervalLayer]) -> Translation:
    """The translation of a dropout function."""

    def translate(
        site: Site,
        input: TracedSignal,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Layers:
        if training:
            raise site.unsupported("it is active in evaluation too: pass training=self.training")
        return [kind.of(p=p)]

    return translate


def _translate_power(site: Site, input: TracedSignal, exponent: Any = 2) -> Layers:
    if exponent != 2:
        raise site.unsupported("of all powers only the square has an interval rule")
    # A square is not negative, which the product of two branches does not show.
    return [il.IntervalProduct(il.IntervalSequential()), il.IntervalReLU()]


MODULES: dict[type[nn.Module], Translation] = {}
OPERATIONS: dict[str, Translation] = {
    **dict.fromkeys(("pow", "square"), _translate_power),
    "relu": _plain(il.IntervalReLU),
    "relu6": lambda site, input, inplace=False: [il.IntervalHardtanh(0.0, 6.0)],
    "leaky_relu": _plain(il.IntervalLeakyReLU),
    "prelu": _translate_prelu,
    "hardtanh": _plain(il.IntervalHardtanh),
    "hardsigmoid": _plain(il.IntervalHardsigmoid),
    "hardswish": _plain(il.IntervalHardswish),
    "abs": _plain(il.IntervalAbs),
    "clamp": _translate_clamp,
    "clamp_min": _translate_clamp_min,
    "clamp_max": _translate_clamp_max,
    "maximum": _translate_maximum,
    "minimum": _translate_minimum,
    "max": _translate_max,
    "min": _translate_min,
    "sigmoid": _plain(il.IntervalSigmoid),
    "tanh": _plain(il.IntervalTanh),
    "softsign": _plain(il.IntervalSoftsign),
    "softplus": _plain(il.IntervalSoftplus),
    # `torch.nn.functional.logsigmoid` goes by another name.
    "torch._C._nn.log_sigmoid": _plain(il.IntervalLogSigmoid),
    "elu": _plain(il.IntervalELU),
    "celu": _plain(il.IntervalCELU),
    "selu": _plain(il.IntervalSELU),
    "silu": _plain(il.IntervalSiLU),
    "gelu": _plain(il.IntervalGELU),
    "mish": _plain(il.IntervalMish),
    "dropout": _dropout(il.IntervalDropout),
    "dropout1d": _dropout(il.IntervalDropout1d),
    "dropout2d": _dropout(il.IntervalDropout2d),
    "dropout3d": _dropout(il.IntervalDropout3d),
    "alpha_dropout": _dropout(il.IntervalAlphaDropout),
    "feature_alpha_dropout": _dropout(il.IntervalFeatureAlphaDropout),
}
