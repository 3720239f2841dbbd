"""Rules from sizes: whether arithmetic or the overhead of operators decides how long a step takes.

- In the last passes of a search only a few lanes are doubtful. Where arithmetic dominates, such a
  pass is cheap. Where overhead dominates, it costs as much as one with all lanes.
- Samples of radius 0 need no interval pass, but selecting the others takes operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.chunking import remembered
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import Affine, Operator

CHEAP_PASSES, COSTLY_PASSES = 0.02, 0.06
"""Mean doubt that needs no pass, as a share of epsilon: where a pass over a few lanes is much
cheaper than one over all lanes, and where it is not."""
OVERHEAD = {"cpu": 1e8}
"""Multiplications that take about as long as the operators of a pass, by type of device."""
ACCELERATOR = 5e10
"""The same on other devices, an estimate."""
SELECTION = 0.1
"""Selecting samples for a pass with gradient takes about 0.3 of the operators of a pass without.
They have three times the multiplications of such a pass."""


def accepted_doubt(network: FoldedNetwork, images: Tensor, batch_size: int) -> float:
    """The mean doubt that needs no pass, as a share of epsilon.

    Args:
        images: (B, C, H, W), any part of a batch.
        batch_size: that of the whole batch, so that all parts and ranks accept the same.
    """
    return COSTLY_PASSES if _share(network, images, batch_size) < 1 else CHEAP_PASSES


def worth_leaving_out(network: FoldedNetwork, images: Tensor, samples: int) -> bool:
    """Whether it saves time to leave so many of `images`, (B, C, H, W), out of the loss pass."""
    return samples > 0 and _share(network, images, samples) > SELECTION


def _share(network: FoldedNetwork, images: Tensor, lanes: int) -> float:
    """The arithmetic of so many lanes in a pass, relative to its overhead."""
    key = ("multiplications", *images.shape[1:])
    lane, _ = remembered(network, key, lambda: (_multiplications(network, images[:1]), 0))
    return lane * lanes / OVERHEAD.get(images.device.type, ACCELERATOR)


@torch.no_grad()
def _multiplications(network: FoldedNetwork, image: Tensor) -> int:
    """Those of midpoint and radius of one lane, in linear layers and convolutions."""
    found = 0

    def seen(operator: Operator, x: Interval) -> None:
        nonlocal found
        if isinstance(operator, Affine):
            found += 2 * operator.multiplications(x.mid)

    network(Interval(mid=image, rad=torch.zeros_like(image)), seen)
    return found
