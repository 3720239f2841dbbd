"""IBP initialisation (Shi et al. 2021): interval widths neither explode nor vanish."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def ibp_initialization(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws the affine weights of `model` with std sqrt(2 pi) / fan_in, in place.

    The last affine layer keeps its default initialisation, and so do all biases.
    """
    affine = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in affine[:-1]:
        fan_in = layer.weight[0].numel()
        layer.weight.normal_(0, math.sqrt(2 * math.pi) / fan_in, generator=generator)
