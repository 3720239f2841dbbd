"""Translation of arithmetic with constants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Constant, Layers, Site, Translation
from ibpcore.nn.constants import Constants
from ibpcore.nn.networks import weight_like


def scaled(site: Site, scale: float) -> Layers:
    """Multiplication of the output of a node by a number."""
    return with_constant(site, il.IntervalScale, "scale", scale)


def with_constant(site: Site, kind: type[Constants], name: str, constant: Any) -> Layers:
    """A layer of that kind for the input of a node, with the constant that it calls `name`."""
    if len(site.given) < 2:
        raise site.unsupported("its input has no channels")
    channels, like = site.shape[1], site.trace.like
    numbers = {"scale": 1.0, "shift": 0.0} if kind is il.IntervalScale else {}
    if isinstance(constant, Constant):
        placed = _placed(site, constant)
        if placed.value.dtype != like.dtype:  # as PyTorch casts it
            placed = placed.formed(lambda value: value.to(weight_like(site.trace.root).dtype))
        layer = site.tied(kind(channels, **{name: torch.ones_like(placed.value)}), **{name: placed})
        numbers.pop(name, None)
    elif isinstance(constant, int | float):
        layer = kind(channels, **{name: like.new_tensor(float(constant))})
        numbers[name] = float(constant)
    else:
        raise site.unsupported("it has no interval rule with such a constant")
    return [site.numbered(layer, **numbers)]


def _placed(site: Site, constant: Constant) -> Constant:
    """The constant for one image: one number, one per channel, or in the shape of an image.

    Raises:
        UserError: it does not broadcast to an image, or differs between the images of a batch.
    """
    given, shape = site.given, tuple(constant.value.shape)
    if site.shape != given:
        raise site.unsupported(f"a constant of shape {shape} changes the shape {given}")
    if len(shape) == len(given) and shape[0] == given[0]:

        def of_one_image(value: Tensor) -> Tensor:
            if not bool((value == value[:1]).all()):
                raise site.unsupported("its constant differs between the images of a batch")
            return value[:1]

        constant = constant.formed(of_one_image)
    sizes = (1,) * (len(given) - len(shape)) + tuple(constant.value.shape)
    if math.prod(sizes) == sizes[1]:  # one number, or one per channel
        return replace(constant, any_shape=True)
    if constant.value.numel() == given[1]:
        # Otherwise the layer would take it as one number for each channel.
        return constant.formed(lambda value: value.expand(1, *given[1:]))
    return constant


def _translate_add(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    constant = other if isinstance(input, TracedSignal) else input
    return [] if _is(constant, 0) else with_constant(site, il.IntervalScale, "shift", constant)


def _translate_sub(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    if not isinstance(input, TracedSignal):
        return [*scaled(site, -1.0), *with_constant(site, il.IntervalScale, "shift", input)]
    return [] if _is(other, 0) else with_constant(site, il.IntervalSubtract, "constant", other)


def _translate_rsub(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    return [*scaled(site, -1.0), *with_constant(site, il.IntervalScale, "shift", other)]


def _translate_mul(site: Site, input: Any, other: Any) -> Layers:
    constant = other if isinstance(input, TracedSignal) else input
    return [] if _is(constant, 1) else with_constant(site, il.IntervalScale, "scale", constant)


def _translate_div(site: Site, input: Any, other: Any, rounding_mode: str | None = None) -> Layers:
    if rounding_mode is not None or not isinstance(input, TracedSignal):
        raise site.unsupported("only a division by a constant has an interval rule")
    if _is(other, 0):
        raise site.unsupported("it divides by 0")
    return [] if _is(other, 1) else with_constant(site, il.IntervalDivide, "divisor", other)


def _is(constant: Any, number: int) -> bool:
    return isinstance(constant, int | float) and constant == number


MODULES: dict[type[nn.Module], Translation] = {}
OPERATIONS: dict[str, Translation] = {
    "add": _translate_add,
    "sub": _translate_sub,
    "rsub": _translate_rsub,
    "mul": _translate_mul,
    "div": _translate_div,
    "neg": lambda site, input: scaled(site, -1.0),
}
