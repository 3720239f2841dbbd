"""What every training method takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.config import TrainConfig
from ibpcore.folding import FoldedNetwork
from ibpcore.margins import differences, largest_difference, robust_logits
from ibpcore.regularizers import Activations


class CleanBatch(NamedTuple):
    """A batch after its clean pass.

    Attributes:
        network: folded with the statistics of this batch, gradient included.
        logits: (B, classes), clean.
        images: (B, C, H, W) in pixel units.
        labels: (B,).
        slopes: (B,) what `MethodLoss.slopes` was at each sample's last visit, NaN if never.
        relu_inputs: what the ReLU layers read in the clean pass, in order, each (B, ...);
            None where no regulariser will ask for the activations.
    """

    network: FoldedNetwork
    logits: Tensor
    images: Tensor
    labels: Tensor
    slopes: Tensor
    relu_inputs: list[Tensor] | None = None


class MethodLoss(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: scalar, with gradient; regularisers come on top.
        radii: (B,) radii that were trained at.
        slopes: (B,) what to remember of each sample until its next visit.
        activations: what the regularisers need, where they were asked for.
    """

    loss: Tensor
    radii: Tensor
    slopes: Tensor
    activations: Activations | None = None


Method = Callable[[CleanBatch, float, TrainConfig], MethodLoss]
"""(batch, scheduled epsilon_max, configuration) -> loss."""


def loss_at_radii(
    batch: CleanBatch, radii: Tensor, rows: Tensor | None, config: TrainConfig
) -> MethodLoss:
    """kappa * standard + (1 - kappa) * robust cross-entropy at given radii (eq. 9-11).

    Args:
        radii: (B,), 0 outside `rows`.
        rows: (n,) samples that an interval pass is spent on; None for all. At radius 0 the
            interval is a point, and the robust logits are known from the clean ones.
    """
    activations = None if batch.relu_inputs is None else Activations()
    robust = differences(batch.logits, batch.labels)
    if rows is None:
        robust = _bounded(batch, slice(None), radii, config, activations)
    elif len(rows) > 0:
        robust = robust.index_copy(0, rows, _bounded(batch, rows, radii, config, activations))
    if activations is not None and rows is not None and batch.relu_inputs is not None:
        marked = torch.zeros_like(radii, dtype=torch.int8).index_fill(0, rows, 1)
        # Their number is known: a boolean index would make the host wait on CUDA.
        others = marked.argsort(stable=True)[: len(radii) - len(rows)]
        activations.points = [x[others] for x in batch.relu_inputs]
    standard = F.cross_entropy(batch.logits, batch.labels)
    loss = config.kappa * standard + (1 - config.kappa) * F.cross_entropy(robust, batch.labels)
    return MethodLoss(loss, radii, _slopes(batch, robust, radii), activations)


def _bounded(
    batch: CleanBatch,
    rows: Tensor | slice,
    radii: Tensor,
    config: TrainConfig,
    activations: Activations | None,
) -> Tensor:
    """(n, classes) robust logits of `rows`."""
    return robust_logits(
        batch.network,
        batch.images[rows],
        batch.labels[rows],
        radii[rows],
        elide=config.elide,
        clip=config.clip_range,
        observe=activations,
    )


@torch.no_grad()
def _slopes(batch: CleanBatch, robust: Tensor, radii: Tensor) -> Tensor:
    """(R(r) - R(0)) / r, (B,), as remembered where that says nothing."""
    rise = largest_difference(robust, batch.labels) - largest_difference(
        differences(batch.logits, batch.labels), batch.labels
    )
    slopes = (rise / radii).to(batch.slopes.dtype)
    return torch.where(slopes.isfinite() & (slopes > 0), slopes, batch.slopes)
