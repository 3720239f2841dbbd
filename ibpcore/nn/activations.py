"""Interval layers that apply one piecewise linear function to every number."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds import relaxations
from ibpcore.errors import UserError
from ibpcore.nn.constants import WithConstant
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
        lines = partial(relaxations.leaky_relu, negative_slope=slope)
        # Above slope 1 the lower line is the chord, the only one.
        others = partial(lines, of_relu=relaxations.relu_reversed) if slope <= 1 else None
        return (ops.Monotone(partial(F.leaky_relu, negative_slope=slope), lines, others),)


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


class IntervalMaximum(ByOperators, WithConstant):
    """max(x, constant), see `WithConstant`."""

    arguments = ("channels", "constant")

    def operators(self) -> Operators:
        (constant,) = self.spread(self.constant)
        return (ops.Extremum(constant, torch.maximum),)


class IntervalMinimum(ByOperators, WithConstant):
    """min(x, constant), see `WithConstant`."""

    arguments = ("channels", "constant")

    def operators(self) -> Operators:
        (constant,) = self.spread(self.constant)
        return (ops.Extremum(constant, torch.minimum),)
