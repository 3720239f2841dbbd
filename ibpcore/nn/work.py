"""The work of a pass through a network, from its sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ibpcore.bounds.operators import Affine, Nonlinear, Operator
from ibpcore.nn.folding import clean_pass
from ibpcore.nn.networks import Classifier, modes_kept

IMAGES = 2
"""Number of images in a pass that is observed: two, for batch norm without statistics."""


def multiplications(network: Classifier) -> int:
    """Number of multiplications for one image, in linear layers and convolutions.

    Raises:
        UserError: a layer has no interval rule.
    """

    def products(operator: Operator, x: Tensor) -> int:
        return operator.multiplications(x) if isinstance(operator, Affine) else 0

    return sum(_counted(network, products)) // IMAGES


def activations(network: Classifier) -> int:
    """Number of numbers that the layers read for one image.

    Raises:
        UserError: a layer has no interval rule.
    """
    return sum(_counted(network, lambda _, x: x.numel())) // IMAGES


def nonlinear_inputs(network: Classifier) -> list[int]:
    """Number of inputs of each nonlinear layer, for one image.

    Raises:
        UserError: a layer has no interval rule.
    """

    def inputs(operator: Operator, x: Tensor) -> int:
        return x.numel() // IMAGES if isinstance(operator, Nonlinear) else 0

    return [number for number in _counted(network, inputs) if number > 0]


@torch.no_grad()
def _counted(network: Classifier, count: Callable[[Operator, Tensor], int]) -> list[int]:
    """`count` of each operator and its input, in a clean pass that leaves the network as it was."""
    found: list[int] = []
    weight = next(network.parameters(), torch.empty(0))
    images = weight.new_zeros(IMAGES, *network.in_shape)
    with modes_kept(network):
        clean_pass(
            network.eval(), images, track=False, observe=lambda op, x: found.append(count(op, x))
        )
    return found
