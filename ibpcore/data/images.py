"""Labelled images as bytes, and data sets of a training, a test and a validation part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ibpcore.errors import UserError
from ibpcore.wording import counted

LISTED = 10
"""Largest number of names in a list of them."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, kept as bytes in the memory of the device they are used on.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.

    Raises:
        UserError: they have other shapes or types.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, tensor, dim, kind in (
            ("images", self.images, 4, torch.uint8),
            ("labels", self.labels, 1, torch.int64),
        ):
            if not isinstance(tensor, Tensor) or (tensor.dim(), tensor.dtype) != (dim, kind):
                raise UserError(f"{name} must be a tensor of {dim} dimensions and type {kind}")
        if len(self.images) != len(self.labels):
            raise UserError(
                f"{counted(len(self.images), 'image')} with {counted(len(self.labels), 'label')}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images {tuple(self.images.shape[1:])}, {self.images.device})"

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 digest of images and labels: equal for equal sets."""
        return _digest(b"", [self])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, read whole into memory.

    Attributes:
        name: a key of `ibpcore.data.sources.DATASETS`.
        title: names what was found on disk, such as a subset; quoted with every result.
        classes: class names, in the order of the labels.
        train, test: images for training, and images that results are quoted for.
        mean, std: normalisation of each channel in pixel units; empty for none.
        validation: images held out of the training images, see `hold_out`.
        remarks: of a tree of images, how many were found, passed over and changed: lines to print.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    validation: ImageSet | None = None
    remarks: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 digest of all that training depends on: title, classes, all but test images."""
        parts = [self.train] if self.validation is None else [self.train, self.validation]
        return _digest("\n".join([self.title, *self.classes]).encode(), parts)

    def __repr__(self) -> str:
        parts = [f"{len(self.train)} training", f"{len(self.test)} test"]
        if self.validation is not None:
            parts.insert(1, f"{len(self.validation)} validation")
        images = f"{', '.join(parts)} images {self.in_shape}"
        return f"Dataset({self.title!r}: {images}, {len(self.classes)} classes)"

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def listed(names: Sequence[str]) -> str:
    """Names in one line; of many the first and the last."""
    few = list(names) if len(names) <= LISTED else [*names[: LISTED - 2], "...", names[-1]]
    return ", ".join(few)


def _digest(head: bytes, parts: Sequence[ImageSet]) -> str:
    digest = hashlib.sha256(head)
    for tensor in (tensor for part in parts for tensor in (part.images, part.labels)):
        digest.update(str(tuple(tensor.shape)).encode())
        for piece in tensor.split(4096):  # `tobytes` copies
            digest.update(piece.cpu().numpy().tobytes())
    return digest.hexdigest()


def subset_indices(total: int, limit: int | None) -> np.ndarray:
    """Sorted indices of `limit` of `total` samples, a fixed random subset; all for None."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.RandomState(0).permutation(total)[:limit])


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Moves `count` training images to the validation part.

    They are the same images every time, whatever the seed of a run.

    Raises:
        UserError: fewer than two images would remain for training.
    """
    if count == 0:
        return dataset
    total = len(dataset.train)
    if count > total - 2:
        raise UserError(
            f"validation must leave two of {counted(total, 'image')} to train on, but is {count}"
        )
    held = torch.zeros(total, dtype=torch.bool)
    held[torch.from_numpy(subset_indices(total, count))] = True
    return replace(dataset, train=dataset.train[~held], validation=dataset.train[held])


def usual_held_out(dataset: Dataset) -> int:
    """How many images a comparison of runs holds out by default: a tenth, at least one."""
    return max(1, round(len(dataset.train) / 10))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) uint8, in pixel units.

    Rounded to four digits; the deviation is at least 1/255, so that it can be divided by.
    """
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten().long(), minlength=256).double()
        levels, share = torch.arange(256).double() / 255, counts / counts.sum()
        mean = float((share * levels).sum())
        variance = float((share * (levels - mean).square()).sum())
        means.append(round(mean, 4))
        stds.append(round(max(variance**0.5, 1 / 255), 4))
    return tuple(means), tuple(stds)
