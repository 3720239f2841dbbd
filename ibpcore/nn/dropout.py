"""Interval layers for dropout, which does nothing in evaluation.

Bounds hold for the network in evaluation. `inplace` has no effect.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ibpcore.bounds.interval import Interval
from ibpcore.nn.layers import IntervalLayer, Operators


class _Dropout(IntervalLayer):
    """Base class: the twin for tensors, the identity for intervals."""

    inplace: bool

    def operators(self) -> Operators:
        return ()

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return x
        return super().forward(x.clone() if self.inplace else x)


class IntervalDropout(_Dropout, nn.Dropout):
    """`nn.Dropout` for tensors, the identity for intervals."""

    twins = (nn.Dropout,)
    arguments = ("p",)


class IntervalDropout1d(_Dropout, nn.Dropout1d):
    """`nn.Dropout1d` for tensors, the identity for intervals."""

    twins = (nn.Dropout1d,)
    arguments = ("p",)


class IntervalDropout2d(_Dropout, nn.Dropout2d):
    """`nn.Dropout2d` for tensors, the identity for intervals."""

    twins = (nn.Dropout2d,)
    arguments = ("p",)


class IntervalDropout3d(_Dropout, nn.Dropout3d):
    """`nn.Dropout3d` for tensors, the identity for intervals."""

    twins = (nn.Dropout3d,)
    arguments = ("p",)


class IntervalAlphaDropout(_Dropout, nn.AlphaDropout):
    """`nn.AlphaDropout` for tensors, the identity for intervals."""

    twins = (nn.AlphaDropout,)
    arguments = ("p",)


class IntervalFeatureAlphaDropout(_Dropout, nn.FeatureAlphaDropout):
    """`nn.FeatureAlphaDropout` for tensors, the identity for intervals."""

    twins = (nn.FeatureAlphaDropout,)
    arguments = ("p",)
