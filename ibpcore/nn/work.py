"""The work of a pass through a network, from its sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.operators import Affine, Operator
from ibpcore.nn.folding import clean_pass
from ibpcore.nn.networks import Classifier, modes_kept


@torch.no_grad()
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

    weight = next(network.parameters(), torch.empty(0))
    images = weight.new_zeros(2, *network.in_shape)  # two, for batch norm without statistics
    with modes_kept(network):
        clean_pass(network.eval(), images, track=False, observe=count)
    return total // len(images)
