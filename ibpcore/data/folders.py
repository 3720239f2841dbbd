"""Reading images from folders, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ibpcore.data.images import ImageSet, chosen
from ibpcore.errors import UserError, first_line

Sample = tuple[Path, int]
DEEP = ("I", "F")
"""Begin the modes of images, in Pillow, of which it would make white all that is above a byte."""
MOST_OBLONG = 100
"""Sides of an image: with its shorter one resized, a line of pixels would fill the memory."""
ONE_SIZE = "all must have one size (an imagefolder is brought to one by --image-size)"


def image_files(folder: Path) -> list[Path]:
    """The images in `folder`, sorted by name.

    Raises:
        UserError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"wrong layout: there is no folder {folder}")
    # Here: it takes a second to import, and the command line need not wait for it.
    from torchvision.datasets.folder import IMG_EXTENSIONS

    visible = (p for p in folder.iterdir() if not p.name.startswith("."))
    files = sorted(p for p in visible if p.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise UserError(f"no images in {folder}")
    return files


def class_folders(root: Path) -> list[Path]:
    """The class folders below `root`, sorted by name.

    Raises:
        UserError: `root` does not exist or holds no folder.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: expected one folder a class in it (see --data-dir)")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"no class folders in {root}")
    return folders


def tree_samples(root: Path, classes: Sequence[str], subfolder: str = "") -> list[Sample]:
    """(file, label) of every image in `root/<class>/subfolder`.

    Raises:
        UserError: a class has no folder or no images, or there is a folder of no class.
    """
    found = {folder.name: folder for folder in class_folders(root)}
    strange = sorted(set(found) - set(classes))
    missing = sorted(set(classes) - set(found))
    if strange or missing:
        names = [f"{n} is missing" for n in missing] + [f"{n} is extra" for n in strange]
        raise UserError(f"class folders of {root} do not match: {', '.join(names)[:200]}")
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in image_files(found[name] / subfolder)
    ]


def read_images(samples: Sequence[Sample], limit: int | None, image_size: int | None) -> ImageSet:
    """The images as RGB bytes, (N, 3, H, W).

    Args:
        samples: files and labels.
        limit: read this many of them, spread over all.
        image_size: resize the shorter side to this and crop the centre; None takes the
            images as they are, which must then all have one size.

    Raises:
        UserError: an image cannot be decoded, or the sizes differ.
    """
    picked = [samples[i] for i in chosen(len(samples), limit)]

    def read(sample: Sample) -> np.ndarray:
        return read_image(sample[0], image_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = read(picked[0])
        pixels = np.empty((len(picked), *first.shape), dtype=np.uint8)
        for i, image in enumerate(pool.map(read, picked)):
            if image.shape != first.shape:
                raise UserError(
                    f"{picked[i][0]} has {image.shape[1]}x{image.shape[0]} pixels, the first"
                    f" image {first.shape[1]}x{first.shape[0]}: {ONE_SIZE}"
                )
            pixels[i] = image
    labels = torch.tensor([label for _, label in picked])
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def read_image(path: Path, image_size: int | None, channels: int = 3) -> np.ndarray:
    """(H, W, 3) bytes, or (H, W) for a single channel; resized as `read_images` says.

    Raises:
        UserError: it cannot be decoded.
    """
    from torchvision.datasets import folder
    from torchvision.transforms import functional as transforms

    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("it is no file")
        with folder.Image.open(path) as file:
            if file.mode.startswith(DEEP):
                raise ValueError("it has more than 8 bits a channel: convert it first")
        image = folder.pil_loader(str(path))
        if image_size is not None and max(image.size) > MOST_OBLONG * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels are too oblong to be resized")
    except Exception as error:  # damaged images raise almost anything
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from None
    if image_size is not None:
        image = transforms.center_crop(transforms.resize(image, image_size), [image_size] * 2)
    return np.asarray(image if channels == 3 else transforms.to_grayscale(image))
