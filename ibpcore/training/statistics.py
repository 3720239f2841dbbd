"""Batch norm statistics of all training images, in place of running ones."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import update_bn

from ibpcore.data.batches import ordered_batches
from ibpcore.data.images import ImageSet


def set_precise_statistics(model: nn.Module, images: ImageSet, batch_size: int) -> None:
    """Gives the batch norm layers the means of the statistics of all batches of `images`.

    Running statistics are those of the last steps, in which the weights still changed (Wu and
    Johnson 2021, arXiv 2105.07576, section 3).

    Args:
        model: on the device of `images`; its mode is kept.
        images: the training images, which are not augmented.
        batch_size: at least 2.
    """
    # A single image has no variance.
    batches = (batch for batch in ordered_batches(images, batch_size) if len(batch.labels) > 1)
    update_bn(batches, model)
