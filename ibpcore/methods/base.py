"""What every training method takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.folding import FoldedNetwork
from ibpcore.margins import robust_logits
from ibpcore.regularizers import Activations


class CleanBatch(NamedTuple):
    """A batch after its clean pass.

    Attributes:
        network: folded with the statistics of this batch, gradient included.
        logits: (B, classes), clean.
        images: (B, C, H, W) in pixel units.
        labels: (B,).
    """

    network: FoldedNetwork
    logits: Tensor
    images: Tensor
    labels: Tensor


class MethodLoss(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: scalar, with gradient; regularisers come on top.
        radii: (B,) radii that were trained at.
        activations: what the regularisers need, where there was an interval pass.
    """

    loss: Tensor
    radii: Tensor
    activations: Activations | None


Method = Callable[[CleanBatch, float, TrainConfig], MethodLoss]
"""(batch, scheduled epsilon_max, configuration) -> loss."""


def loss_at_radii(batch: CleanBatch, radii: Tensor, config: TrainConfig) -> MethodLoss:
    """kappa * standard + (1 - kappa) * robust cross-entropy at (B,) radii (eq. 9-11)."""
    activations = Activations()
    robust = F.cross_entropy(
        robust_logits(
            batch.network,
            batch.images,
            batch.labels,
            radii,
            elide=config.elide,
            clip=config.clip_range,
            observe=activations,
        ),
        batch.labels,
    )
    standard = F.cross_entropy(batch.logits, batch.labels)
    loss = config.kappa * standard + (1 - config.kappa) * robust
    return MethodLoss(loss, radii, activations)
