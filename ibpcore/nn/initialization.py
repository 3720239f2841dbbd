"""Initialisation of the weights of a network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def ibp_initialization(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws the affine weights of `model` with std sqrt(2 pi) / fan_in, in place.

    This keeps the widths of intervals from exploding or vanishing (Shi et al. 2021). The last
    affine layer and all biases keep their default initialisation.
    """
    affine = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in affine[:-1]:
        fan_in = layer.weight[0].numel()
        layer.weight.normal_(0, math.sqrt(2 * math.pi) / fan_in, generator=generator)


@torch.no_grad()
def kaiming_initialization(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws the affine weights of `model` with std sqrt(2 / fan_in), in place (He et al. 2015).

    This preserves the scale of activations under ReLU, but not that of interval widths.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)


INITIALIZATIONS: dict[str, Callable[[nn.Module], None]] = {
    "ibp": ibp_initialization,
    "kaiming": kaiming_initialization,
    "own": lambda model: None,
}
"""Initialisations by name; "own" keeps the weights that the network already has."""
