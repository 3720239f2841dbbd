"""Image files and folders outside any data set, read as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibpcore.data.decoding import Decoded, read_each, read_image
from ibpcore.data.folders import in_words, list_images
from ibpcore.errors import UserError, printable
from ibpcore.wording import counted


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files that were read for a network, one entry a picture.

    Attributes:
        paths: of the files.
        images: (N, C, H, W) uint8.
        labels: the class of each, None if unknown.
        changes: how the pixels of each differ from those of the file, in words, see
            `ibpcore.data.decoding.Decoded`.
        remarks: of each folder, how many images were found and passed over: lines to print.
    """

    paths: list[Path]
    images: Tensor
    labels: list[int | None]
    changes: list[tuple[str, ...]]
    remarks: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def picture_files(
    paths: Sequence[Path], classes: Sequence[str]
) -> tuple[list[tuple[Path, int | None]], list[str]]:
    """Expands files and folders to (file, label) of each picture, the label None if unknown.

    A folder stands for the pictures in it and in its subfolders, as `list_images` finds them. A
    picture has the label of the innermost subfolder that is named after a class. A file stands
    for itself.

    Returns:
        the pictures, and a remark on each folder.

    Raises:
        UserError: a path does not exist, a folder contains no picture, or see `list_images`.
    """
    labels = {name: label for label, name in enumerate(classes)}
    found, remarks = list[tuple[Path, int | None]](), []
    for path in paths:
        if path.is_dir():
            files, passed_over = list_images(path)
            remark = f"{path}: {in_words(len(files), passed_over, path)}"
            if not files:
                raise UserError(remark)
            remarks.append(printable(remark))
            for file in files:
                names = reversed(file.relative_to(path).parts[:-1])
                found.append((file, next((labels[n] for n in names if n in labels), None)))
        elif path.exists():
            found.append((path, None))
        else:
            raise UserError(f"there is no image or folder {path}")
    return found, remarks


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
        UserError: pictures cannot be read or do not fit, or `in_shape` is not (C, H, W).
    """
    if len(in_shape) != 3:
        raise UserError(f"the model takes inputs of shape {in_shape}, which are no images")
    channels, height, width = in_shape
    if channels not in (1, 3):
        raise UserError(
            f"the model takes images of {counted(channels, 'channel')}, neither grey nor RGB"
        )
    if image_size is not None and (height, width) != (image_size, image_size):
        raise UserError(f"the model takes {width}x{height} pixels, not {image_size}x{image_size}")
    files, remarks = picture_files(paths, classes)
    images = np.empty((len(files), channels, height, width), dtype=np.uint8)

    def read(path: Path) -> Decoded:
        decoded = read_image(path, None, channels)
        if decoded.pixels.shape[:2] == (height, width):
            return decoded
        if image_size is None:
            side = f": --image-size {width} resizes and crops it" if width == height else ""
            raise UserError(
                f"{path} has {decoded.pixels.shape[1]}x{decoded.pixels.shape[0]} pixels, but the"
                f" model takes {width}x{height}{side}"
            )
        return read_image(path, image_size, channels)

    found, labels, changes = [path for path, _ in files], [label for _, label in files], []
    for i, decoded in read_each(read, found):
        images[i] = decoded.pixels if channels == 1 else decoded.pixels.transpose(2, 0, 1)
        changes.append(decoded.changes)
    return Pictures(found, torch.from_numpy(images), labels, changes, remarks)
