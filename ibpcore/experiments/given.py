"""Data sets and settings as a program gives them to `ibpcore.train` and `ibpcore.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ibpcore.data.arrays import OWN, image_set, own_dataset, pair
from ibpcore.data.images import Dataset, ImageSet, hold_out, subset_indices
from ibpcore.data.sources import DATASETS, Request, check_parts, load_dataset
from ibpcore.errors import UserError
from ibpcore.training.config import TrainConfig

Data: TypeAlias = str | Dataset | tuple[Any, Any]
"""The name of a data set, a data set, or images and labels, see `ibpcore.data.arrays.image_set`."""


def as_dataset(
    data: Any, test: tuple[Any, Any] | None, classes: Sequence[str] | None
) -> str | Dataset:
    """The name of a data set, or a data set in memory.

    Raises:
        UserError: there is no such data set; see `ibpcore.data.sources.check_parts` and
            `ibpcore.data.arrays.own_dataset`; or test images or names of classes are given for a
            data set that has its own.
    """
    if isinstance(data, str) and data not in DATASETS:
        raise UserError(
            f"data must be one of {', '.join(DATASETS)}, a Dataset, or (images, labels), but is"
            f" {data!r}"
        )
    if isinstance(data, str | Dataset):
        if test is not None or classes is not None:
            raise UserError("test and classes can be given only for data of (images, labels)")
        if isinstance(data, Dataset):
            check_parts(data)
        return data
    return own_dataset(*pair(data, "data"), test, classes)


def split_as(config: TrainConfig, dataset: Dataset) -> Dataset:
    """A data set in memory, limited and split as `config` says; see `dataset_of` for named ones.

    Raises:
        UserError: too few images remain for training, or an image size is given.
    """
    if config.image_size is not None:
        raise UserError("image_size can be given only for the data set imagefolder, read by name")
    train, test = _limited(dataset.train, config.limit_train), dataset.test
    limited = replace(dataset, train=train, test=_limited(test, config.limit_test))
    return limited if limited.validation is not None else hold_out(limited, config.validation)


def _limited(images: ImageSet, limit: int | None) -> ImageSet:
    """At most so many of the images, the same ones as of a named data set."""
    return images[torch.from_numpy(subset_indices(len(images), limit))]


def test_images(data: Any, limit: int | None, image_size: int | None, folder: Path) -> Dataset:
    """A data set of which the test part is to be certified, at most `limit` images of it.

    Raises:
        UserError: `limit` is below 1; see `ibpcore.data.sources.load_dataset` and `check_parts`,
            and `ibpcore.data.arrays.image_set`.
    """
    limit = None if limit is None else whole(limit, "limit")
    if isinstance(data, str):
        size = image_size if data == "imagefolder" else None
        return load_dataset(data, Request(folder, False, 1, limit, size))
    if isinstance(data, Dataset):
        data = replace(data, train=data.test, validation=None)  # only the test images are used
        check_parts(data)
    else:
        images = image_set(*pair(data, "data"))
        data = Dataset(OWN, "own images", (), images, images)
    return replace(data, test=_limited(data.test, limit))


def plain(value: Any) -> Any:
    """A setting with a number of Python in place of one of NumPy, such as those of `linspace`."""
    return value.item() if isinstance(value, np.generic) else value


def whole(value: Any, name: str) -> int:
    """A number of epochs or images; raises UserError unless it is a whole one of at least 1."""
    number = plain(value)
    if type(number) is not int or number < 1:
        raise UserError(f"{name} must be a whole number of at least 1, but is {value!r}")
    return number


def check_callback(function: Any, name: str) -> None:
    """Raises UserError unless `function` can be called or is None."""
    if not (function is None or callable(function)):
        raise UserError(f"{name} must be a function, or None, but is {function!r}")
