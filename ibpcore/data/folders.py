"""Image files in folders: which there are, their classes, and their pixels."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ibpcore.data.decoding import FORMATS, Decoded, read_each, read_image
from ibpcore.data.images import ImageSet, subset_indices
from ibpcore.errors import UserError
from ibpcore.wording import counted

Sample = tuple[Path, int]
"""An image file and its label."""
FOREIGN_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
)
"""Of images that Pillow cannot read."""
APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Start of the `._` files that macOS puts beside others: metadata under the name of the image."""
ONE_SIZE = "all must have one size (an imagefolder is brought to one by --image-size)"
OUTSIDE = "outside the class folders"
LONGEST_SUFFIX = 12


PassedOver = dict[str, list[Path]]
"""The other files in a folder of images, by their kind: a suffix, or words."""


class Listing(NamedTuple):
    """The image files in a folder and its subfolders, in torchvision's order.

    Attributes:
        files: of the images.
        passed_over: the other files.
    """

    files: list[Path]
    passed_over: PassedOver


class Tree(NamedTuple):
    """The labelled image files of one part of a data set.

    Attributes:
        root: folder that was read.
        samples: files and labels.
        passed_over: the other files.
    """

    root: Path
    samples: list[Sample]
    passed_over: PassedOver

    def in_words(self) -> str:
        """Its folder, and how many images and other files there are."""
        return f"{self.root}: {in_words(len(self.samples), self.passed_over, self.root)}"


@cache
def _formats() -> dict[str, str]:
    """Pillow's name of the format of each suffix that it knows."""
    # Imported here: it takes a second, which the command line need not wait for.
    from torchvision.datasets import folder

    return dict(folder.Image.registered_extensions())


@cache
def _suffixes() -> tuple[str, ...]:
    """The suffixes of `FORMATS`."""
    return tuple(suffix for suffix, known in _formats().items() if known in FORMATS)


def is_image(path: Path) -> bool:
    """Whether the suffix, in upper or lower case, is that of a format in `FORMATS`."""
    return path.name.lower().endswith(_suffixes())


def why_not_read(suffix: str) -> str:
    """The reason why images with a suffix in lower case are not read; empty if it names none."""
    if suffix in FOREIGN_SUFFIXES:
        return "Pillow cannot read them: convert them to PNG or JPEG"
    if suffix in _formats():
        return f"the depth of {_formats()[suffix]} is not known: convert them to PNG"
    return ""


def list_images(folder: Path) -> Listing:
    """The images in a folder of a class, and the other files.

    As in torchvision's `ImageFolder`, subfolders and links to folders are followed, and hidden
    files are files. Images of more formats are found.

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
    files, passed_over = [], defaultdict[str, list[Path]](list)
    for place, names in sorted(places):
        for path in (Path(place, name) for name in sorted(names)):
            if kind := _no_image(path):
                passed_over[kind].append(path)
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


def in_words(count: int, passed_over: Mapping[str, Sequence[Path]], root: Path) -> str:
    """How many images were found in `root`, and which other files were passed over, and why."""
    text = counted(count, "image") if count else "no images"
    if total := sum(map(len, passed_over.values())):
        kinds = sorted(passed_over.items(), key=lambda kind: -len(kind[1]))
        others = ", ".join(_group(kind, files, root) for kind, files in kinds if files)
        text += f", {counted(total, 'other file')} passed over: {others}"
    return text


def _group(kind: str, files: Sequence[Path], root: Path) -> str:
    """Number and kind of files, one of them, and a reason if there is one."""
    example = f"{'such as ' * (len(files) > 1)}{files[0].relative_to(root)}"
    reason = why_not_read(kind)
    return f"{len(files)} {kind} ({example}{f'; {reason}' if reason else ''})"


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
    outside = sorted(path for path in root.iterdir() if not path.is_dir())
    samples, passed_over = [], defaultdict(list, {OUTSIDE: outside})
    for label, name in enumerate(classes):
        listing = list_images(found[name])
        if not listing.files:
            raise UserError(f"{found[name]}: {in_words(0, listing.passed_over, found[name])}")
        samples += [(file, label) for file in listing.files]
        for kind, files in listing.passed_over.items():
            passed_over[kind] += files
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
        UserError: images cannot be decoded, or the sizes differ.
    """
    picked = [samples[i] for i in subset_indices(len(samples), limit)]
    changes = Counter[str]()

    def read(sample: Sample) -> Decoded:
        return read_image(sample[0], image_size)

    pixels = np.empty((0, 0, 0, 3), dtype=np.uint8)
    for i, image in read_each(read, picked):
        (height, width, _), first = image.pixels.shape, pixels.shape[1:3]
        if len(pixels) == 0:
            pixels = np.empty((len(picked), height, width, 3), dtype=np.uint8)
        elif (height, width) != first:
            raise UserError(
                f"{picked[i][0]} has {width}x{height} pixels,"
                f" the first image {first[1]}x{first[0]}: {ONE_SIZE}"
            )
        pixels[i] = image.pixels
        changes.update(image.changes)
    labels = torch.tensor([label for _, label in picked])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels), changes
