"""The work of a pass through a network, from its sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.operators import Affine, Nonlinear, Operator
from ibpcore.nn.folding import clean_pass
from ibpcore.nn.layers import CleanObserver
from ibpcore.nn.networks import Classifier, modes_kept

IMAGES = 2
"""Number of images in a pass that is observed: two, for batch norm without statistics."""


def multiplications(network: Classifier) -> int:
    """Number of multiplications for one image, in linear layers and convolutions.

    Raises:
        UserError: a layer has no interval rule.
    """
    total = 0

    def count(operator: Operator, x: Tensor) -> None:
        nonlocal total
        if isinstance(operator, Affine):
            total += operator(x).numel() * operator.weight[0].numel()

    _observe(network, count)
    return total // IMAGES


def activations(network: Classifier) -> list[int]:
    """Number of inputs of each nonlinear layer, for one image.

    Raises:
        UserError: a layer has no interval rule.
    """
    numbers: list[int] = []

    def count(operator: Operator, x: Tensor) -> None:
        if isinstance(operator, Nonlinear):
            numbers.append(x.numel() // IMAGES)

    _observe(network, count)
    return numbers


@torch.no_grad()
def _observe(network: Classifier, observe: CleanObserver) -> None:
    """A clean pass that leaves the network as it was."""
    weight = next(network.parameters(), torch.empty(0))
    images = weight.new_zeros(IMAGES, *network.in_shape)
    with modes_kept(network):
        clean_pass(network.eval(), images, track=False, observe=observe)
