"""Interval layers that combine their input with constants, such as normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds.interval import Interval
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, IntervalLayer, Operators


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


class Constants(IntervalLayer):
    """Base class of layers that combine each number of their input with constants.

    A constant is one number for all, one for each channel, or a tensor that broadcasts against a
    sample, such as a mean image: its shape is used as PyTorch would use it.

    Args:
        channels: size of dimension 1 of the input.
        constants: by name, numbers or tensors. Those with 1 or `channels` elements may have any
            shape. A tensor is used as it is, not copied; an `nn.Parameter` is trained. Numbers
            get the type and device of a tensor beside them.
    """

    def __init__(self, channels: int, **constants: Any) -> None:
        super().__init__()
        self.channels = channels
        like = next((v for v in constants.values() if isinstance(v, Tensor)), torch.empty(0))
        for name, value in constants.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=like.dtype, device=like.device)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def spread(self, *constants: Tensor) -> list[Tensor]:
        """Copies of constants as `ChannelAffine` needs them: all per channel, or none."""
        # Copies: a later optimiser step must not change a folded network.
        per_channel = [value.numel() in (1, self.channels) for value in constants]
        if all(per_channel):
            return [value.flatten().repeat(self.channels // value.numel()) for value in constants]
        return [value.clone().view(*[1] * (2 - value.dim()), *value.shape) for value in constants]

    def extra_repr(self) -> str:
        return f"{self.channels}"


class IntervalScale(ByOperators, Constants):
    """scale * x + shift, for additions of constants and multiplications by them.

    Args:
        channels, scale, shift: see `Constants`.
    """

    arguments = ("channels", "scale", "shift")
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, scale: Any = 1.0, shift: Any = 0.0) -> None:
        super().__init__(channels, scale=scale, shift=shift)

    def operators(self) -> Operators:
        return (ops.ChannelAffine(*self.spread(self.scale, self.shift)),)


class WithConstant(Constants):
    """Base class of layers with one constant.

    Args:
        channels, constant: see `Constants`.
    """

    constant: Tensor

    def __init__(self, channels: int, constant: Any) -> None:
        super().__init__(channels, constant=constant)


class IntervalSubtract(WithConstant):
    """x - constant, see `WithConstant`."""

    arguments = ("channels", "constant")

    def operators(self) -> Operators:
        (constant,) = self.spread(self.constant)
        return (ops.ChannelAffine(torch.ones_like(constant), -constant),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return x - ops.along_channels(self.spread(self.constant)[0], x)


class IntervalDivide(Constants):
    """x / divisor.

    Args:
        channels, divisor: see `Constants`.
    """

    arguments = ("channels", "divisor")
    divisor: Tensor

    def __init__(self, channels: int, divisor: Any) -> None:
        super().__init__(channels, divisor=divisor)

    def operators(self) -> Operators:
        (divisor,) = self.spread(self.divisor)
        return (ops.ChannelAffine(1 / divisor, torch.zeros_like(divisor)),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return x / ops.along_channels(self.spread(self.divisor)[0], x)
