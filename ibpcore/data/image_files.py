"""Image files and folders outside any data set, read as a network takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibpcore.data.folders import list_images, read_image
from ibpcore.errors import UserError


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files that were read for a network, one entry a picture.

    Attributes:
        paths: of the files.
        images: (N, C, H, W) uint8.
        labels: the class of each, None if unknown.
        resized: whether the image in the file has another size.
    """

    paths: list[Path]
    images: Tensor
    labels: list[int | None]
    resized: list[bool]

    def __len__(self) -> int:
        return len(self.paths)


def picture_files(paths: Sequence[Path], classes: Sequence[str]) -> list[tuple[Path, int | None]]:
    """Expands files and folders to (file, label) of each picture, the label None if unknown.

    A folder stands for the pictures in it and in its subfolders, sorted. A picture has the
    label of the innermost subfolder that is named after a class. A file stands for itself.

    Raises:
        UserError: a path does not exist, or a folder contains no picture.
    """
    labels = {name: label for label, name in enumerate(classes)}
    found: list[tuple[Path, int | None]] = []
    for path in paths:
        if path.is_dir():
            for file in list_images(path, subfolders=True):
                names = reversed(file.relative_to(path).parts[:-1])
                found.append((file, next((labels[n] for n in names if n in labels), None)))
        elif path.exists():
            found.append((path, None))
        else:
            raise UserError(f"there is no image or folder {path}")
    return found


def read_pictures(
    paths: Sequence[Path],
    classes: Sequence[str],
    in_shape: tuple[int, ...],
    image_size: int | None = None,
) -> Pictures:
    """Reads pictures, grey or RGB, in the same way as the images of a data set.

    Args:
        paths: files and folders, see `picture_files`.
        classes: names, in the order of the labels.
        in_shape: shape of the network's input.
        image_size: resize the shorter side of a picture of another size to this, and crop the
            centre; None to refuse such a picture.

    Raises:
        UserError: a picture cannot be read or does not fit, or `in_shape` is not (C, H, W).
    """
    if len(in_shape) != 3:
        raise UserError(f"the model takes inputs of shape {in_shape}, which are no images")
    channels, height, width = in_shape
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels, neither grey nor RGB")
    if image_size is not None and (height, width) != (image_size, image_size):
        raise UserError(f"the model takes {width}x{height} pixels, not {image_size}x{image_size}")
    files = picture_files(paths, classes)
    images = np.empty((len(files), channels, height, width), dtype=np.uint8)

    def read(path: Path) -> tuple[np.ndarray, bool]:
        pixels = read_image(path, None, channels)
        fits = pixels.shape[:2] == (height, width)
        if not fits and image_size is None:
            side = f": --image-size {width} resizes and crops it" if width == height else ""
            raise UserError(
                f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, but the model takes"
                f" {width}x{height}{side}"
            )
        return (pixels if fits else read_image(path, image_size, channels)), not fits

    found, labels, resized = [path for path, _ in files], [label for _, label in files], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for image, (pixels, changed) in zip(images, pool.map(read, found), strict=True):
            image[:] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
            resized.append(changed)
    return Pictures(found, torch.from_numpy(images), labels, resized)
