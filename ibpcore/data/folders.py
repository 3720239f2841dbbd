"""Image files in folders: which there are, their classes, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ibpcore.data.images import ImageSet, subset_indices
from ibpcore.errors import UserError, first_line
from ibpcore.threads import available_processors

Sample = tuple[Path, int]
"""An image file and its label."""
DEEP_MODES = ("I", "F")
"""Prefixes of Pillow's modes of more than 8 bits; converted to RGB they would be clipped."""
MAX_ASPECT = 100
"""Largest ratio of the sides of an image to be resized: a thin line would exhaust the memory."""
ONE_SIZE = "all must have one size (an imagefolder is brought to one by --image-size)"


def is_image(path: Path) -> bool:
    """Whether the suffix is that of an image format."""
    # Imported here: it takes a second, which the command line need not wait for.
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.suffix.lower() in IMG_EXTENSIONS


def list_images(folder: Path, subfolders: bool = False) -> list[Path]:
    """The image files in `folder`, and in all `subfolders` if wanted, sorted, none hidden.

    Raises:
        UserError: there are none, or no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"wrong layout: there is no folder {folder}")
    found = []
    for path in folder.rglob("*") if subfolders else folder.iterdir():
        hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
        if is_image(path) and not hidden and not (subfolders and path.is_dir()):
            found.append(path)
    if not found:
        raise UserError(f"no images in {folder}")
    return sorted(found)


def class_folders(root: Path) -> list[Path]:
    """The class folders in `root`, sorted by name.

    Raises:
        UserError: `root` does not exist or contains no folder.
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
        UserError: a class has no folder or no images, or a folder is not named after a class.
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
        for file in list_images(found[name] / subfolder)
    ]


def read_images(samples: Sequence[Sample], limit: int | None, image_size: int | None) -> ImageSet:
    """Reads images as RGB, (N, 3, H, W) uint8.

    Args:
        samples: files and labels.
        limit: read this many of them, spread over all; None for all.
        image_size: resize the shorter side to this and crop the centre. None takes the images
            as they are, which must then all have one size.

    Raises:
        UserError: an image cannot be decoded, or the sizes differ.
    """
    picked = [samples[i] for i in subset_indices(len(samples), limit)]

    def read(sample: Sample) -> np.ndarray:
        return read_image(sample[0], image_size)

    with ThreadPoolExecutor(available_processors()) as pool:
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
    """Reads one image as uint8.

    Args:
        path: of the file, in any format that Pillow reads.
        image_size: see `read_images`.
        channels: 3 for RGB, 1 for grey.

    Returns:
        (H, W, 3), or (H, W) for a single channel.

    Raises:
        UserError: the image cannot be decoded, or is too oblong to be resized.
    """
    from torchvision.datasets import folder
    from torchvision.transforms import functional as transforms

    try:
        if not path.is_file():  # reading from a pipe would never end
            raise ValueError("it is not a file")
        with folder.Image.open(path) as file:
            if file.mode.startswith(DEEP_MODES):
                raise ValueError("it has more than 8 bits a channel: convert it first")
        image = folder.pil_loader(str(path))
        if image_size is not None and max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels are too oblong to be resized")
    except Exception as error:  # damaged images raise almost anything
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from None
    if image_size is not None:
        image = transforms.center_crop(transforms.resize(image, image_size), [image_size] * 2)
    return np.asarray(image if channels == 3 else transforms.to_grayscale(image))
