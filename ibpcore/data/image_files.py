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
from torchvision.datasets.folder import IMG_EXTENSIONS

from ibpcore.data.folders import read_image
from ibpcore.errors import UserError

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What was read, one entry a picture.

    Attributes:
        paths: of the files.
        images: (N, C, H, W) bytes, as the network takes them.
        labels: the class, None where nobody says.
        resized: whether the file holds it in another size.
    """

    paths: list[Path]
    images: Tensor
    labels: list[int | None]
    resized: list[bool]

    def __len__(self) -> int:
        return len(self.paths)


def is_picture(path: Path) -> bool:
    """Whether its name is that of a file with a picture."""
    return path.suffix.lower() in IMG_EXTENSIONS


def picture_files(paths: Sequence[Path], classes: Sequence[str]) -> list[tuple[Path, int | None]]:
    """The files meant by `paths`, with labels.

    A folder stands for the pictures in it and in its subfolders, sorted; a picture has the
    label of the innermost subfolder that is called like a class. A file stands for itself.

    Raises:
        UserError: a path is not there, or a folder holds no picture.
    """
    labels = {name: label for label, name in enumerate(classes)}
    found: list[tuple[Path, int | None]] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"there is no image or folder {path}")
            found.append((path, None))
            continue
        files = sorted(_below(path))
        if not files:
            raise UserError(f"no images in {path}")
        for file in files:
            names = reversed(file.relative_to(path).parts[:-1])
            found.append((file, next((labels[n] for n in names if n in labels), None)))
    return found


def _below(folder: Path) -> list[Path]:
    """The pictures in `folder` and below, but for what is hidden."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(root, name) for name in names if not name.startswith("."))
        files += [path for path in visible if is_picture(path)]
    return files


def read_pictures(
    paths: Sequence[Path], classes: Sequence[str], shape: Shape, image_size: int | None = None
) -> Pictures:
    """The pictures in files and folders, as a data set's are read: bytes, grey or RGB.

    Args:
        paths: see `picture_files`.
        classes: names, in the order of the labels.
        shape: what the network takes.
        image_size: bring the shorter side of a picture of another size to this, and crop the
            centre; None to refuse it.

    Raises:
        UserError: a picture cannot be read or does not fit; nothing has been done then.
    """
    channels, height, width = shape
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

    resized = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for image, (pixels, changed) in zip(
            images, pool.map(read, [path for path, _ in files]), strict=True
        ):
            image[:] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
            resized.append(changed)
    labels = [label for _, label in files]
    return Pictures([path for path, _ in files], torch.from_numpy(images), labels, resized)
