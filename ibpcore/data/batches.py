"""Batches made on the device that holds the images: shuffling, crops and flips there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.data.images import ImageSet
from ibpcore.distributed import SINGLE_PROCESS, Ranks


class Batch(NamedTuple):
    """Some samples of a data set.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        labels: (B,).
        samples: (B,) which ones of the data set these are; where several ranks share a
            batch, those of all, of which the images and labels are this rank's share.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor


def as_pixels(images: Tensor) -> Tensor:
    """Bytes to float32 pixels in [0, 1]."""
    return images.float() / 255


def ordered_batches(data: ImageSet, batch_size: int) -> Iterator[Batch]:
    """Every sample once, in order."""
    every = torch.arange(len(data), device=data.images.device)
    for index in every.split(batch_size):
        yield Batch(as_pixels(data.images[index]), data.labels[index], index)


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Batches that `shuffled_batches` makes of `samples`."""
    # A last batch of one sample has no variance for batch norm: it is left out.
    return samples // batch_size + (samples % batch_size > 1)


def shuffled_batches(
    data: ImageSet,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    flip: bool,
    padding: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Batch]:
    """One epoch of training, a function of (seed, epoch) alone; of each batch this rank's share.

    Args:
        data: the images, on the device where the batches are made.
        batch_size: at least 2.
        seed, epoch: of the order and of the augmentation.
        flip: mirror each image with probability 1/2.
        padding: shift each image by up to this many pixels either way, its edge pixels
            repeated: a random crop after edge padding.
    """
    generator = torch.Generator(data.images.device)
    generator.manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(data), generator=generator, device=data.images.device)
    for batch in range(batches_per_epoch(len(data), batch_size)):
        index = order[batch * batch_size : (batch + 1) * batch_size]
        mine = ranks.sharing(len(index)).share(len(index))
        images = augmented(data.images, index, generator, flip=flip, padding=padding, part=mine)
        yield Batch(as_pixels(images), data.labels[index[mine]], index)


def augmented(
    images: Tensor,
    index: Tensor,
    generator: torch.Generator,
    *,
    flip: bool,
    padding: int,
    part: slice = slice(None),
) -> Tensor:
    """`images[index]`, crop and flip drawn for each, of which `part` is given, (b, C, H, W)."""
    if not flip and padding == 0:
        return images[index[part]]
    device, (channels, height, width) = images.device, images.shape[1:]
    shift = torch.randint(
        -padding, padding + 1, (2, len(index), 1), generator=generator, device=device
    )
    # Reading outside the image at the nearest pixel inside is what edge padding is.
    rows = (torch.arange(height, device=device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shift[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(len(index), 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(channels, device=device).view(1, -1, 1, 1)
    rows, columns, index = rows[part], columns[part], index[part]
    return images[index.view(-1, 1, 1, 1), every, rows[:, None, :, None], columns[:, None, None]]
