"""Interval layers that combine their input with constants, such as normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, Operators


class IntervalNormalize(ByOperators):
    """(x - mean) / std for each channel: normalisation as the first layer of a model.

    With it the model takes pixels in [0, 1], and epsilon is in pixel units.

    Args:
        mean, std: one number per channel, in pixel units.

    Raises:
        UserError: the lengths differ, or a std is not positive.
    """

    arguments = ("mean", "std")
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError("mean and std need one entry per channel, every std above 0")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def operators(self) -> Operators:
        return (ops.ChannelAffine(1 / self.std, -self.mean / self.std),)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class IntervalScale(ByOperators):
    """scale * x + shift with one number for all channels or one per channel.

    `convert` uses it for additions of, and multiplications by, constants and parameters.

    Args:
        channels: size of dimension 1 of the input.
        scale, shift: numbers, or tensors of any shape with 1 or `channels` elements. An
            `nn.Parameter` is used as it is, not copied.

    Raises:
        UserError: one of them has another number of elements.
    """

    arguments = ("channels", "scale", "shift")
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, scale: Any = 1.0, shift: Any = 0.0) -> None:
        super().__init__()
        self.channels = channels
        for name, value in (("scale", scale), ("shift", shift)):
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.get_default_dtype())
            if value.numel() not in (1, channels):
                raise UserError(f"{name} has {value.numel()} elements, not 1 or {channels}")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def operators(self) -> Operators:
        # Copies: a later optimiser step must not change a folded network.
        return (ops.ChannelAffine(self._each(self.scale), self._each(self.shift)),)

    def _each(self, value: Tensor) -> Tensor:
        return value.flatten().repeat(self.channels // value.numel())

    def extra_repr(self) -> str:
        return f"{self.channels}"
