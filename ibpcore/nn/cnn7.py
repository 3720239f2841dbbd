"""The network CNN7 and its smaller variants (Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ibpcore.errors import UserError
from ibpcore.nn.activations import IntervalReLU
from ibpcore.nn.affine import IntervalBatchNorm, IntervalConv2d, IntervalLinear
from ibpcore.nn.constants import IntervalNormalize
from ibpcore.nn.initialization import ibp_initialization
from ibpcore.nn.networks import Classifier, check_in_shape
from ibpcore.nn.rearrangements import IntervalFlatten


@dataclass(frozen=True)
class Architecture:
    """The parameters of a CNN7, stored in its model file.

    Attributes and errors are the arguments and errors of `cnn7`.
    """

    in_shape: tuple[int, ...]
    classes: int
    width: int = 64
    hidden: int = 512
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(check_in_shape(self.in_shape)) != 3:
            raise UserError(f"in_shape must be (channels, height, width), got {self.in_shape}")
        for name, least in (("classes", 2), ("width", 1), ("hidden", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise UserError(f"{name} must be at least {least}, but is {value!r}")
        if len(self.mean) not in (0, self.in_shape[0]) or len(self.mean) != len(self.std):
            raise UserError(f"mean and std must have {self.in_shape[0]} entries each, or none")
        if not all(map(isfinite, (*self.mean, *self.std))):
            raise UserError("mean and std must be finite")

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Architecture:
        """The architecture from JSON values, in which tuples are lists.

        Raises:
            UserError: a field is missing, unknown or has the wrong type.
        """
        try:
            fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise UserError(f"not the description of a CNN7: {error}") from None


class CNN7(Classifier):
    """The standard network of certified training (Table 3), with IBP initialisation.

    Five 3x3 convolutions and two linear layers, with batch norm and ReLU after all but the
    last. The third convolution has stride 2, and so has the fifth if the images have a side of
    64 pixels or more.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.in_shape, self.classes = architecture.in_shape, architecture.classes
        channels, height, width_in = architecture.in_shape
        narrow, wide = architecture.width, 2 * architecture.width
        strides = (1, 1, 2, 1, 2 if min(height, width_in) >= 64 else 1)
        layers: list[nn.Module] = []
        if architecture.mean:
            layers.append(IntervalNormalize(architecture.mean, architecture.std))
        for filters, stride in zip((narrow, narrow, wide, wide, wide), strides, strict=True):
            layers.append(IntervalConv2d(channels, filters, 3, stride=stride, padding=1))
            layers += [IntervalBatchNorm(filters), IntervalReLU()]
            channels = filters
            height, width_in = -(-height // stride), -(-width_in // stride)
        features = channels * height * width_in
        layers += [IntervalFlatten(), IntervalLinear(features, architecture.hidden)]
        layers += [IntervalBatchNorm(architecture.hidden), IntervalReLU()]
        layers.append(IntervalLinear(architecture.hidden, architecture.classes))
        super().__init__(*layers)
        ibp_initialization(self)
        # Convolutions follow the layout of their weights: up to four times faster on a CPU.
        self.to(memory_format=torch.channels_last)

    def description(self) -> dict[str, Any]:
        return {"name": "cnn7", **asdict(self.architecture)}


def cnn7(
    in_shape: Sequence[int],
    classes: int,
    width: int = 64,
    hidden: int = 512,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> CNN7:
    """A new CNN7, the usual model to train.

    Args:
        in_shape: channels, height, width of an image.
        classes: number of classes, at least 2.
        width: channels of the first convolution (64 in the paper).
        hidden: units of the linear layer (512 in the paper).
        mean, std: normalisation per channel in pixel units; empty for none.

    Raises:
        UserError: the arguments do not describe a network.
    """
    try:
        normalization = tuple(n + 0.0 for n in mean), tuple(n + 0.0 for n in std)
    except TypeError:
        raise UserError("mean and std must be sequences of numbers") from None
    return CNN7(Architecture(check_in_shape(in_shape), classes, width, hidden, *normalization))
