"""Interval layers that pool images."""

from __future__ import annotations

from functools import partial

from torch import nn

from ibpcore.bounds import operators as ops
from ibpcore.errors import UserError
from ibpcore.nn.layers import IntervalLayer, Operators


class IntervalAvgPool2d(IntervalLayer, nn.AvgPool2d):
    """`nn.AvgPool2d` for intervals of images (B, C, H, W)."""

    twins = (nn.AvgPool2d,)
    arguments = (
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    )

    def operators(self) -> Operators:
        if self.divisor_override is not None and self.divisor_override < 0:
            raise UserError("IntervalAvgPool2d needs divisor_override > 0")
        return (ops.NonnegativeLinear(partial(nn.AvgPool2d.forward, self)),)


class IntervalMaxPool2d(IntervalLayer, nn.MaxPool2d):
    """`nn.MaxPool2d` for intervals of images (B, C, H, W); it is monotone in every input."""

    twins = (nn.MaxPool2d,)
    arguments = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

    def operators(self) -> Operators:
        if self.return_indices:
            raise UserError("IntervalMaxPool2d does not return indices")
        return (ops.Monotone(partial(nn.MaxPool2d.forward, self)),)
