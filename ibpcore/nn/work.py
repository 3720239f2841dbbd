"""The work of a pass through a network, from its sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ibpcore.bounds.operators import Affine, Operator
from ibpcore.nn.folding import clean_pass
from ibpcore.nn.networks import Classifier, modes_kept


def multiplications(network: Classifier) -> int:
    """Number of multiplications for one image, in linear layers and convolutions.

    Raises:
        UserError: a layer has no interval rule.
    """

    def products(operator: Operator, x: Tensor) -> int:
        if not isinstance(operator, Affine):
            return 0
        return operator(x).numel() * operator.weight[0].numel()

    return _total(network, products)


def activations(network: Classifier) -> int:
    """Number of numbers that the layers read for one image.

    Raises:
        UserError: a layer has no interval rule.
    """
    return _total(network, lambda _, x: x.numel())


@torch.no_grad()
def _total(network: Classifier, count: Callable[[Operator, Tensor], int]) -> int:
    """The sum of `count`, of an operator and its input, over a clean pass, for one image."""
    total = 0

    def observe(operator: Operator, x: Tensor) -> None:
        nonlocal total
        total += count(operator, x)

    weight = next(network.parameters(), torch.empty(0))
    images = weight.new_zeros(2, *network.in_shape)  # two, for batch norm without statistics
    with modes_kept(network):
        clean_pass(network.eval(), images, track=False, observe=observe)
    return total // len(images)
