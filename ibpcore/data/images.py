"""Labelled images as bytes, and the data set made of a training and a test part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was found on disk.

    Attributes:
        name: the name it was asked for by.
        title: what was really read, to be quoted with every result.
        classes: class names, in the order of the labels.
        mean, std: normalisation of each channel in pixel units; empty for none.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def fingerprint(self) -> str:
        """Tells whether two data sets train the same: a digest of classes, images, labels."""
        digest = hashlib.sha256("\n".join([self.title, *self.classes]).encode())
        for tensor in (self.train.images, self.train.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            for part in tensor.split(4096):  # a copy of some at a time
                digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def in_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def chosen(total: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` of `total` samples, spread over all, the same every time."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.RandomState(0).permutation(total)[:limit])


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
