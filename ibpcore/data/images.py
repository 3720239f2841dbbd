"""Labelled images as bytes, and the data set made of them in two or three parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ibpcore.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, kept as bytes on whatever device they are used on.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def fingerprint(self) -> str:
        """Tells whether two sets are the same: a digest of images and labels."""
        return _digest(b"", [self])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was found on disk.

    Attributes:
        name: the name it was asked for by.
        title: what was really read, to be quoted with every result.
        classes: class names, in the order of the labels.
        train, test: what is trained on, and what results are quoted for.
        validation: held out of the training images, see `hold_out`.
        mean, std: normalisation of each channel in pixel units; empty for none.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    validation: ImageSet | None = None

    def fingerprint(self) -> str:
        """Tells whether two data sets train the same: a digest of classes, images, labels."""
        parts = [self.train] if self.validation is None else [self.train, self.validation]
        return _digest("\n".join([self.title, *self.classes]).encode(), parts)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def _digest(head: bytes, parts: Sequence[ImageSet]) -> str:
    digest = hashlib.sha256(head)
    for tensor in (tensor for part in parts for tensor in (part.images, part.labels)):
        digest.update(str(tuple(tensor.shape)).encode())
        for some in tensor.split(4096):  # a copy of some at a time
            digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()


def chosen(total: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` of `total` samples, spread over all, the same every time."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.RandomState(0).permutation(total)[:limit])


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """`dataset` with `count` of its training images, spread over all, for validation.

    They are the same every time, whatever the seed of a run.

    Raises:
        UserError: fewer than two would be left to train on.
    """
    if count == 0:
        return dataset
    total = len(dataset.train)
    if count > total - 2:
        raise UserError(f"{count} validation images leave too few of {total} to train on")
    held = torch.zeros(total, dtype=torch.bool)
    held[torch.from_numpy(chosen(total, count))] = True
    return replace(dataset, train=dataset.train[~held], validation=dataset.train[held])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) bytes, in pixel units."""
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten().long(), minlength=256).double()
        levels, share = torch.arange(256).double() / 255, counts / counts.sum()
        mean = float((share * levels).sum())
        variance = float((share * (levels - mean).square()).sum())
        means.append(round(mean, 4))
        stds.append(round(max(variance**0.5, 1 / 255), 4))
    return tuple(means), tuple(stds)
