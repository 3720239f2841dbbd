"""Initialisation of the weights of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ibpcore.nn.affine import IntervalMatMul


@torch.no_grad()
def ibp_initialization(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws the affine weights of `model` with std sqrt(2 pi) / fan_in, in place.

    This keeps the widths of intervals from exploding or vanishing (Shi et al. 2021). The last
    affine layer and all biases keep their default initialisation.
    """
    for layer in affine_layers(model)[:-1]:
        std = math.sqrt(2 * math.pi) / _fan_in(layer)
        layer.weight.normal_(0, std, generator=generator)


@torch.no_grad()
def kaiming_initialization(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws the affine weights of `model` with std sqrt(2 / fan_in), in place (He et al. 2015).

    This preserves the scale of activations under ReLU, but not that of interval widths.
    """
    for layer in affine_layers(model):
        std = math.sqrt(2) / math.sqrt(_fan_in(layer))
        layer.weight.normal_(0, std, generator=generator)


def affine_layers(model: nn.Module) -> list[Any]:
    """The layers of `model` with a `weight` of products, in order: linear ones, convolutions."""
    kinds = nn.Linear, nn.modules.conv._ConvNd, IntervalMatMul
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def _fan_in(layer: Any) -> int:
    """The number of products in each output; of a transposed convolution, at most."""
    if isinstance(layer, IntervalMatMul):
        return layer.in_features
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return int(layer.weight[0].numel())


INITIALIZATIONS: dict[str, Callable[[nn.Module], None]] = {
    "ibp": ibp_initialization,
    "kaiming": kaiming_initialization,
    "own": lambda model: None,
}
"""Initialisations by name; "own" keeps the weights that the network already has."""
