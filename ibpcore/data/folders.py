"""Image files in folders: which there are, their classes, and their pixels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ibpcore.data.decoding import Decoded, read_image
from ibpcore.data.images import ImageSet, subset_indices
from ibpcore.errors import UserError
from ibpcore.threads import available_processors

Sample = tuple[Path, int]
"""An image file and its label."""
APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Start of the `._` files that macOS puts beside others: metadata under the name of the image."""
ONE_SIZE = "all must have one size (an imagefolder is brought to one by --image-size)"
LONGEST_SUFFIX = 12


class Listing(NamedTuple):
    """The image files in a folder and its subfolders, in torchvision's order.

    Attributes:
        files: of the images.
        passed_over: how many other files there are of each kind.
    """

    files: list[Path]
    passed_over: Counter[str]


class Tree(NamedTuple):
    """The labelled image files of one part of a data set.

    Attributes:
        root: folder that was read.
        samples: files and labels.
        passed_over: how many other files there are of each kind.
    """

    root: Path
    samples: list[Sample]
    passed_over: Counter[str]


def is_image(path: Path) -> bool:
    """Whether the name is that of an image, as torchvision's `ImageFolder` decides."""
    # Imported here: it takes a second, which the command line need not wait for.
    from torchvision.datasets.folder import is_image_file

    return is_image_file(path.name)


def list_images(folder: Path) -> Listing:
    """The files that `ImageFolder` would read in a folder of a class, and a count of the others.

    As there, subfolders and links to folders are followed, and hidden files are files.

    Raises:
        UserError: there is no such folder, one cannot be read, or a link leads back to a folder
            above it, so that its images would be read again and again.
    """
    if not folder.is_dir():
        raise UserError(f"wrong layout: there is no folder {folder}")
    places = []
    for place, _, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        if os.path.realpath(place) in map(os.path.realpath, Path(place).parents):
            raise UserError(f"the link {place} leads back to a folder above it: remove it")
        places.append((place, names))
    files, passed_over = [], Counter[str]()
    for place, names in sorted(places):
        for path in (Path(place, name) for name in sorted(names)):
            if kind := _no_image(path):
                passed_over[kind] += 1
            else:
                files.append(path)
    return Listing(files, passed_over)


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")


def _no_image(path: Path) -> str:
    """The kind of a file that is passed over; empty for an image."""
    if not is_image(path):
        suffix = path.suffix.lower()
        short = suffix if len(suffix) <= LONGEST_SUFFIX else f"{suffix[:LONGEST_SUFFIX]}..."
        return short or "without a suffix"
    if path.name.startswith("._") and path.is_file():
        with path.open("rb") as file:
            if file.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE:
                return "metadata of macOS"
    return ""


def in_words(count: int, passed_over: Counter[str]) -> str:
    """How many images were found, and how many other files were passed over, by their kind."""
    text = f"{count or 'no'} image{'s' * (count != 1)}"
    if total := passed_over.total():
        kinds = ", ".join(f"{n} {kind}" for kind, n in passed_over.most_common())
        text += f", {total} other file{'s' * (total != 1)} passed over: {kinds}"
    return text


def class_folders(root: Path) -> list[Path]:
    """The class folders in `root`, sorted by name.

    A hidden folder is none, and must hold no images: `ImageFolder` would make a class of it.

    Raises:
        UserError: `root` does not exist or contains no folder, or a hidden one holds images.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: expected one folder a class in it (see --data-dir)")
    folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.name)
    for folder in folders:
        if folder.name.startswith(".") and (files := list_images(folder).files):
            raise UserError(
                f"{files[0]} is an image in a hidden folder, which torchvision would take for a"
                f" class: move {folder} away, or rename it"
            )
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if not folders:
        raise UserError(f"no class folders in {root}")
    return folders


def read_tree(root: Path, classes: Sequence[str]) -> Tree:
    """Lists the images in `root/<class>` and its subfolders, as `ImageFolder` does.

    Raises:
        UserError: a class has no folder or no images, a folder is not named after a class, or
            see `list_images`.
    """
    found = {folder.name: folder for folder in class_folders(root)}
    strange = sorted(set(found) - set(classes))
    missing = sorted(set(classes) - set(found))
    if strange or missing:
        names = [f"{n} is missing" for n in missing] + [f"{n} is extra" for n in strange]
        raise UserError(f"class folders of {root} do not match: {', '.join(names)[:200]}")
    outside = sum(not path.is_dir() for path in root.iterdir())
    samples, passed_over = [], Counter({"outside the class folders": outside} if outside else {})
    for label, name in enumerate(classes):
        listing = list_images(found[name])
        if not listing.files:
            raise UserError(f"{found[name]}: {in_words(0, listing.passed_over)}")
        samples += [(file, label) for file in listing.files]
        passed_over += listing.passed_over
    return Tree(root, samples, passed_over)


def read_images(
    samples: Sequence[Sample], limit: int | None, image_size: int | None
) -> tuple[ImageSet, Counter[str]]:
    """Reads images as RGB, (N, 3, H, W) uint8, and counts the changes that this took.

    Args:
        samples: files and labels.
        limit: read this many of them, spread over all; None for all.
        image_size: resize the shorter side to this and crop the centre. None takes the images
            as they are, which must then all have one size.

    Raises:
        UserError: an image cannot be decoded, or the sizes differ.
    """
    picked = [samples[i] for i in subset_indices(len(samples), limit)]
    changes = Counter[str]()

    def read(sample: Sample) -> Decoded:
        return read_image(sample[0], image_size)

    with ThreadPoolExecutor(available_processors()) as pool:
        first = read(picked[0]).pixels
        pixels = np.empty((len(picked), *first.shape), dtype=np.uint8)
        for i, image in enumerate(pool.map(read, picked)):
            if image.pixels.shape != first.shape:
                raise UserError(
                    f"{picked[i][0]} has {image.pixels.shape[1]}x{image.pixels.shape[0]} pixels,"
                    f" the first image {first.shape[1]}x{first.shape[0]}: {ONE_SIZE}"
                )
            pixels[i] = image.pixels
            changes.update(image.changes)
    labels = torch.tensor([label for _, label in picked])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels), changes
