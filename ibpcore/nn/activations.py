"""Interval layers that apply one function to every number."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds import relaxations
from ibpcore.bounds.interval import Interval
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, IntervalLayer, Operators


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


class IntervalDropout(IntervalLayer, nn.Dropout):
    """`nn.Dropout` for tensors, the identity for intervals.

    Bounds hold for the network in evaluation, where dropout does nothing. `inplace` has no
    effect.
    """

    twins = (nn.Dropout,)
    arguments = ("p",)

    def operators(self) -> Operators:
        return ()

    def forward(self, x: Any) -> Any:
        return x if isinstance(x, Interval) else F.dropout(x, self.p, self.training)
