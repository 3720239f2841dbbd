"""Translation of arithmetic with constants."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Constant, Layers, Site, Translation


def _translate_scale(site: Site, scale: Any = 1.0, shift: Any = 0.0) -> Layers:
    """scale * x + shift, where at most one of the two is a tensor."""
    given = site.given
    if len(given) < 2:
        raise site.unsupported("its input has no channels")
    for constant in (scale, shift):
        if isinstance(constant, Constant):
            shape = (1,) * (len(given) - len(constant.shape)) + constant.shape
            others = [size for dim, size in enumerate(shape) if dim != 1]
            if site.shape != given or math.prod(others) != 1 or shape[1] not in (1, given[1]):
                raise site.unsupported(
                    f"a constant must be one number or one per channel, but an input {given}"
                    f" meets one of shape {constant.shape}"
                )
        elif not isinstance(constant, int | float):
            raise site.unsupported("it has no interval rule with such a constant")
    if scale == 1 and shift == 0:
        return []
    tensors = (c.tensor if isinstance(c, Constant) else float(c) for c in (scale, shift))
    return [site.scale(given, *tensors)]


def _translate_add(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    return _translate_scale(site, shift=other if isinstance(input, TracedSignal) else input)


def _translate_sub(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    if not isinstance(input, TracedSignal):
        return [*_translate_scale(site, -1.0), *_translate_scale(site, shift=input)]
    return _translate_scale(site, shift=_fixed(site, other, operator.neg))


def _translate_mul(site: Site, input: Any, other: Any) -> Layers:
    return _translate_scale(site, other if isinstance(input, TracedSignal) else input)


def _translate_div(site: Site, input: Any, other: Any, rounding_mode: str | None = None) -> Layers:
    if rounding_mode is not None or not isinstance(input, TracedSignal):
        raise site.unsupported("only a division by a constant has an interval rule")
    return _translate_scale(site, _fixed(site, other, lambda value: 1 / value))


def _fixed(site: Site, constant: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a constant; not of a parameter, which training would no longer reach."""
    if not isinstance(constant, Constant):
        return function(constant)
    if isinstance(constant.tensor, nn.Parameter):
        raise site.unsupported(
            "it divides by a parameter or subtracts one: multiply by it or add it instead"
        )
    return Constant(constant.shape, function(constant.tensor.detach()))


MODULES: dict[type[nn.Module], Translation] = {}
OPERATIONS: dict[str, Translation] = {
    "add": _translate_add,
    "sub": _translate_sub,
    "mul": _translate_mul,
    "div": _translate_div,
    "neg": lambda site, input: _translate_scale(site, -1.0),
}
