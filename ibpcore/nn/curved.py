"""Interval layers that apply one curved function to every number."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds import relaxations
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, IntervalLayer, Operators

SOFTPLUS_THRESHOLD = 20
"""From here on log(1 + exp(x)) is x in float32."""


class IntervalSigmoid(IntervalLayer, nn.Sigmoid):
    """`nn.Sigmoid` for intervals of any shape."""

    twins = (nn.Sigmoid,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(torch.sigmoid, relaxations.sigmoid),)


class IntervalTanh(IntervalLayer, nn.Tanh):
    """`nn.Tanh` for intervals of any shape."""

    twins = (nn.Tanh,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(torch.tanh, relaxations.tanh),)


class IntervalSoftsign(IntervalLayer, nn.Softsign):
    """`nn.Softsign` for intervals of any shape."""

    twins = (nn.Softsign,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(F.softsign, relaxations.softsign),)


class IntervalLogSigmoid(IntervalLayer, nn.LogSigmoid):
    """`nn.LogSigmoid` for intervals of any shape."""

    twins = (nn.LogSigmoid,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(F.logsigmoid, relaxations.logsigmoid),)


class IntervalSoftplus(ByOperators, nn.Softplus):
    """`nn.Softplus` for intervals of any shape, as log(1 + exp(beta x)) / beta everywhere.

    Where beta x is above `threshold`, `nn.Softplus` returns x, which is lower by less than
    2.1e-9 / beta; that step down would make it lose its order. `beta` must be above 0, and
    `threshold` at least 20.
    """

    twins = (nn.Softplus,)
    arguments = ("beta", "threshold")

    def operators(self) -> Operators:
        if not self.beta > 0:
            raise UserError("IntervalSoftplus needs beta > 0")
        if not self.threshold >= SOFTPLUS_THRESHOLD:
            raise UserError(f"IntervalSoftplus needs threshold >= {SOFTPLUS_THRESHOLD}")
        function = partial(_softplus, beta=self.beta)
        lines = partial(relaxations.softplus, function=function, beta=self.beta)
        return (ops.Monotone(function, lines),)


def _softplus(x: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(beta * x, x.new_zeros(())) / beta


class IntervalELU(ByOperators, nn.ELU):
    """`nn.ELU` for intervals of any shape; `alpha` must not be below 0."""

    twins = (nn.ELU,)
    arguments = ("alpha",)

    def operators(self) -> Operators:
        if not self.alpha >= 0:
            raise UserError("IntervalELU needs alpha >= 0")
        function = partial(F.elu, alpha=self.alpha)
        return (ops.Monotone(function, partial(relaxations.elu, alpha=self.alpha)),)


class IntervalCELU(ByOperators, nn.CELU):
    """`nn.CELU` for intervals of any shape; `alpha` must be above 0."""

    twins = (nn.CELU,)
    arguments = ("alpha",)

    def operators(self) -> Operators:
        if not self.alpha > 0:
            raise UserError("IntervalCELU needs alpha > 0")
        function = partial(F.celu, alpha=self.alpha)
        return (ops.Monotone(function, partial(relaxations.celu, alpha=self.alpha)),)


class IntervalSELU(ByOperators, nn.SELU):
    """`nn.SELU` for intervals of any shape."""

    twins = (nn.SELU,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(F.selu, relaxations.selu),)


class IntervalSiLU(ByOperators, nn.SiLU):
    """`nn.SiLU` for intervals of any shape."""

    twins = (nn.SiLU,)
    arguments = ()

    def operators(self) -> Operators:
        least = -1.2784645427610738, -0.27846454276107385
        return (_self_gated(F.silu, _silu_slope, *least, 0.037),)


class IntervalGELU(IntervalLayer, nn.GELU):
    """`nn.GELU` for intervals of any shape, by erf or in its form with tanh."""

    twins = (nn.GELU,)
    arguments = ("approximate",)

    def operators(self) -> Operators:
        function = partial(F.gelu, approximate=self.approximate)
        if self.approximate == "tanh":
            least = -0.7524614220710163, -0.17004075057125408
            return (_self_gated(function, _gelu_tanh_slope, *least, 0.108),)
        least = -0.7517915246935645, -0.16997120747990372
        return (_self_gated(function, _gelu_slope, *least, 0.108),)


class IntervalMish(ByOperators, nn.Mish):
    """`nn.Mish` for intervals of any shape."""

    twins = (nn.Mish,)
    arguments = ()

    def operators(self) -> Operators:
        return (
            _self_gated(F.mish, _mish_slope, -1.1924312145154952, -0.30884341301725047, 0.0591),
        )


class IntervalHardswish(ByOperators, nn.Hardswish):
    """`nn.Hardswish` for intervals of any shape."""

    twins = (nn.Hardswish,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Unimodal(F.hardswish, -1.5, -0.375, relaxations.hardswish),)


def _self_gated(
    function: Callable[[Tensor], Tensor],
    slope_at: Callable[[Tensor], Tensor],
    argmin: float,
    minimum: float,
    concavity: float,
) -> ops.Unimodal:
    """An operator for x times a gate; see `Unimodal` and `ibpcore.bounds.relaxations.self_gated`.

    `minimum` is rounded down and `concavity` up.
    """
    lines = partial(
        relaxations.self_gated,
        function=function,
        slope_at=slope_at,
        minimum=minimum,
        concavity=concavity,
    )
    return ops.Unimodal(function, argmin, minimum, lines)


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    x = x.clamp(-100, 100)  # beyond, it is 0 or 1, but a cube might overflow
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    gate = torch.tanh(scale * (x + cubic * x**3))
    return (1 + gate + x * (1 - gate.square()) * scale * (1 + 3 * cubic * x.square())) / 2


def _mish_slope(x: Tensor) -> Tensor:
    gate = torch.tanh(F.softplus(x))
    return gate + x * torch.sigmoid(x) * (1 - gate.square())
