"""Images that a program holds in memory, as parts of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibpcore.data.batches import as_pixels
from ibpcore.data.images import Dataset, ImageSet, channel_statistics, subset_indices
from ibpcore.errors import REFUSED, UserError, first_line

OWN = "own"
"""The name of a data set of such images, which no command can load."""
TEST_SHARE = 5
"""One of so many images is held out for the test where no test images are given."""
MOST_CLASSES = 2**20
"""Classes of such images; labels beyond are ones of something else, and would fill the memory."""
ROUNDING = torch.finfo(torch.float32).eps
"""Largest relative error of a pixel, one to two ulps of float32: that of a product with 1/255."""
PIXEL_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Floating point types that tell the 256 levels of a pixel apart."""


def image_set(images: Any, labels: Any) -> ImageSet:
    """Images and labels as an `ImageSet`.

    Floats become the bytes that they were made of. Certificates hold for the pixels byte / 255 in
    float32, from which those of a coarser type differ by their own rounding.

    Args:
        images: (N, C, H, W), or (N, H, W) for one channel: a tensor or an array of bytes, or of
            floats in [0, 1] that are bytes divided by 255.
        labels: (N,) whole numbers from 0: a tensor, an array or a list.

    Raises:
        UserError: they have other shapes, types or values, or there are none.
    """
    pixels = _bytes(_tensor(images, "images"))
    classes = _tensor(labels, "labels")
    if classes.dim() != 1 or classes.is_floating_point() or classes.is_complex():
        raise UserError(
            f"labels must be (N,) whole numbers, but are {classes.dtype} of shape"
            f" {tuple(classes.shape)}"
        )
    found = ImageSet(pixels, classes.long().cpu())
    if len(found) == 0 or min(pixels.shape) == 0:
        raise UserError(f"there are no images: they have shape {tuple(pixels.shape)}")
    if bool((found.labels < 0).any()):
        raise UserError("labels must not be negative")
    return found


def own_dataset(
    images: Any, labels: Any, test: tuple[Any, Any] | None, classes: Sequence[str] | None
) -> Dataset:
    """A data set of images in memory.

    Args:
        images, labels: see `image_set`.
        test: images and labels to test with; None to hold out a fifth of the others, always the
            same ones.
        classes: their names; None for the numbers of the labels.

    Raises:
        UserError: see `image_set`, or the parts do not fit each other or the classes.
    """
    train = image_set(images, labels)
    if test is None:
        held = torch.zeros(len(train), dtype=torch.bool)
        held[torch.from_numpy(subset_indices(len(train), len(train) // TEST_SHARE))] = True
        train, tested = train[~held], train[held]
    else:
        tested = image_set(*pair(test, "test"))
    if len(tested) == 0:
        raise UserError(f"{len(train)} images are too few to hold some out: give test images")
    if train.images.shape[1:] != tested.images.shape[1:]:
        shapes = tuple(train.images.shape[1:]), tuple(tested.images.shape[1:])
        raise UserError(f"training images are {shapes[0]}, but test images are {shapes[1]}")
    count = 1 + int(torch.cat([train.labels, tested.labels]).max())
    if count > MOST_CLASSES:
        raise UserError(f"labels must be below {MOST_CLASSES}, but one is {count - 1}")
    names = _names(range(count) if classes is None else classes)
    if len(names) < max(count, 2):
        raise UserError(f"labels up to {count - 1} need {max(count, 2)} classes, not {len(names)}")
    return Dataset(OWN, "own images", names, train, tested, *channel_statistics(train.images))


def _names(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise UserError(f"classes must be a list of names, not {classes!r}")
    return tuple(map(str, classes))


def pair(given: Any, name: str) -> tuple[Any, Any]:
    """`given` if it is (images, labels); `name` is what the error calls it."""
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise UserError(f"{name} must be (images, labels), not {type(given).__name__}")
    return given[0], given[1]


def _tensor(values: Any, name: str) -> Tensor:
    try:
        found = (
            values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        )
    except REFUSED as error:
        raise UserError(f"{name} must be a tensor or an array: {first_line(error)}") from None
    if found.is_meta or found.layout is not torch.strided:
        raise UserError(f"{name} must be a dense tensor in memory")
    return found


def _bytes(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 on the CPU."""
    images = images.cpu()
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4:
        raise UserError(f"images must be (N, C, H, W), but have shape {tuple(images.shape)}")
    if images.shape[-1] in (1, 3, 4) and images.shape[1] > 4:
        raise UserError(
            f"images must be (N, C, H, W), but have shape {tuple(images.shape)}, as if channels"
            " came last: permute(0, 3, 1, 2) moves them"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()
    if images.dtype not in PIXEL_TYPES:
        raise UserError(f"images must be uint8, or floats in [0, 1], but are {images.dtype}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError("images of floats must lie in [0, 1]")
    found = (255 * images.double()).round().to(torch.uint8)
    pixels = as_pixels(found).to(images.dtype).double()
    if not bool(((images - pixels).abs() <= ROUNDING * pixels).all()):
        # A certificate of a rounded image would not be one of the given image.
        raise UserError(
            "images must have pixels that are multiples of 1/255: round them, or give bytes"
        )
    return found.contiguous()
