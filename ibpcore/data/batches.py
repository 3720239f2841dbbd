"""Batches, shuffled and augmented on the device that holds the images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.data.images import ImageSet
from ibpcore.distributed import SINGLE_PROCESS, Ranks


class Batch(NamedTuple):
    """A batch of a data set: the unit of work of training and certification.

    Attributes:
        images: (B, C, H, W) float32 in [0, 1].
        labels: (B,) int64.
        samples: (B,) int64, indices into the data set. If several ranks share a batch, these
            are the indices of the whole batch; images and labels are this rank's share of it.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor


def as_pixels(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 pixels in [0, 1], (N, C, H, W) with channels last.

    Convolutions here use that memory format, and would convert the images every time.
    """
    kept = torch.channels_last if images.dim() == 4 else torch.preserve_format
    return images.to(torch.float32, memory_format=kept) / 255


def ordered_batches(data: ImageSet, batch_size: int) -> Iterator[Batch]:
    """Yields every sample once, in order: the batches of evaluation."""
    every = torch.arange(len(data), device=data.images.device)
    for index in every.split(batch_size):
        yield Batch(as_pixels(data.images[index]), data.labels[index], index)


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Number of batches that `shuffled_batches` yields for a data set of `samples` images."""
    # A last batch of a single sample is dropped: batch norm needs a variance.
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
    """Yields the batches of one epoch of training, of each batch this rank's share.

    Order and augmentation depend on (seed, epoch) alone, so a resumed run sees the same batches.

    Args:
        data: the images, on the device where the batches are made.
        batch_size: at least 2.
        seed, epoch: seed the order and the augmentation.
        flip: mirror each image with probability 1/2.
        padding: shift each image by up to this many pixels in each direction, repeating its
            edge pixels: a random crop after edge padding.
        ranks: the ranks that share each batch.
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
    """Randomly cropped and flipped images, for `shuffled_batches`.

    Args:
        images: (N, C, H, W) uint8.
        index: (B,) the images of the batch. Crops and flips are drawn for all of them.
        generator: on the device of `images`.
        flip, padding: see `shuffled_batches`.
        part: the b images of the batch to return.

    Returns:
        (b, C, H, W) uint8, `images[index[part]]` after augmentation.
    """
    if not flip and padding == 0:
        return images[index[part]]
    device, (channels, height, width) = images.device, images.shape[1:]
    shift = torch.randint(
        -padding, padding + 1, (2, len(index), 1), generator=generator, device=device
    )
    # Clamped coordinates read the nearest pixel inside the image, which is edge padding.
    rows = (torch.arange(height, device=device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shift[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(len(index), 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(channels, device=device).view(1, -1, 1, 1)
    rows, columns, index = rows[part], columns[part], index[part]
    return images[index.view(-1, 1, 1, 1), every, rows[:, None, :, None], columns[:, None, None]]
