"""Interval layers that apply one piecewise linear function to every number."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds import relaxations
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, Operators


class IntervalReLU(ByOperators, nn.ReLU):
    """`nn.ReLU` for intervals of any shape."""

    twins = (nn.ReLU,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.RELU,)


class IntervalLeakyReLU(ByOperators, nn.LeakyReLU):
    """`nn.LeakyReLU` for intervals of any shape; `negative_slope` must not be below 0."""

    twins = (nn.LeakyReLU,)
    arguments = ("negative_slope",)

    def operators(self) -> Operators:
        if self.negative_slope < 0:
            raise UserError("IntervalLeakyReLU needs negative_slope >= 0")
        slope = self.negative_slope
        function = partial(F.leaky_relu, negative_slope=slope)
        return (ops.Monotone(function, partial(relaxations.leaky_relu, negative_slope=slope)),)


class IntervalPReLU(ByOperators, nn.PReLU):
    """`nn.PReLU` for intervals (B, channels, ...), with trainable slopes of any sign."""

    twins = (nn.PReLU,)
    arguments = ("num_parameters", "init")

    def operators(self) -> Operators:
        # A copy: a later optimiser step must not change a folded network.
        return (ops.PRelu(self.weight.clone()),)


class IntervalHardtanh(ByOperators, nn.Hardtanh):
    """`nn.Hardtanh` for intervals of any shape; with limits 0 and 6 it is `nn.ReLU6`."""

    twins = (nn.Hardtanh, nn.ReLU6)
    arguments = ("min_val", "max_val")

    def operators(self) -> Operators:
        low, high = float(self.min_val), float(self.max_val)
        function = partial(F.hardtanh, min_val=low, max_val=high)
        return (ops.Monotone(function, partial(relaxations.clamp, low=low, high=high)),)


class IntervalHardsigmoid(ByOperators, nn.Hardsigmoid):
    """`nn.Hardsigmoid` for intervals of any shape."""

    twins = (nn.Hardsigmoid,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(F.hardsigmoid, relaxations.hardsigmoid),)


class IntervalAbs(ByOperators):
    """`torch.abs` for intervals of any shape."""

    arguments = ()

    def operators(self) -> Operators:
        lines = partial(relaxations.prelu, slope=-1.0)
        return (ops.Unimodal(torch.abs, 0.0, 0.0, lambda x, y: lines(x)),)


class _Extremum(ByOperators):
    """Base class of the maximum and the minimum with one number or one for each channel.

    Args:
        channels: size of dimension 1 of the input.
        constant: a number, or a tensor of any shape with 1 or `channels` elements. An
            `nn.Parameter` is used as it is, not copied.

    Raises:
        UserError: it has another number of elements.
    """

    constant: Tensor

    def __init__(self, channels: int, constant: Any) -> None:
        super().__init__()
        self.channels = channels
        if not isinstance(constant, Tensor):
            constant = torch.tensor(constant, dtype=torch.get_default_dtype())
        if constant.numel() not in (1, channels):
            raise UserError(f"constant has {constant.numel()} elements, not 1 or {channels}")
        if isinstance(constant, nn.Parameter):
            self.register_parameter("constant", constant)
        else:
            self.register_buffer("constant", constant)

    def each(self) -> Tensor:
        """A copy of the constant, (channels,)."""
        # A copy: a later optimiser step must not change a folded network.
        return self.constant.flatten().repeat(self.channels // self.constant.numel())

    def extra_repr(self) -> str:
        return f"{self.channels}"


class IntervalMaximum(_Extremum):
    """max(x, constant) for each channel."""

    arguments = ("channels", "constant")

    def operators(self) -> Operators:
        return (ops.Extremum(self.each(), torch.maximum),)


class IntervalMinimum(_Extremum):
    """min(x, constant) for each channel."""

    arguments = ("channels", "constant")

    def operators(self) -> Operators:
        return (ops.Extremum(self.each(), torch.minimum),)
