"""Pixels of an image file, with 8 bits a channel, and what was changed to get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ibpcore.data.png import read_deep_png
from ibpcore.errors import UserError, first_line
from ibpcore.threads import available_processors

FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "MPO", "PCX"),
    *("PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
"""Pillow's names of the formats whose depth is known; it cuts others to 8 bits without a word."""
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pillow's modes that become RGB without a change of colour."""
BITS_PER_SAMPLE, SAMPLE_FORMAT, SIGNED = 258, 339, 2
"""Tags of a TIFF file, and the value of the second for levels with a sign."""
AV1_CONFIGURATION, HIGH_DEPTH = b"av1C", 0x40
"""Type of a box, and a bit in the third byte of its content ("AV1 in ISOBMFF", section 2.3)."""
DEEP = "16 bits to 8"
LISTED = 10
"""Number of images that cannot be read, of which an error tells the reasons."""
MAX_ASPECT = 100
"""Largest ratio of the sides of an image to be resized: a thin line would exhaust the memory."""


Item = TypeVar("Item")


class Decoded(NamedTuple):
    """An image as a network of this package receives it.

    Attributes:
        pixels: uint8, (H, W, 3) for RGB or (H, W) for grey.
        changes: how they differ from the file, in words; empty if they do not.
    """

    pixels: np.ndarray
    changes: tuple[str, ...]


def read_each(
    read: Callable[[Item], Decoded], items: Sequence[Item]
) -> Iterator[tuple[int, Decoded]]:
    """Yields position and image of each item that can be read, by several threads, in order.

    Raises:
        UserError: at the end, if `read` has raised some; it gives the reasons of the first
            `LISTED` of them.
    """

    def attempt(item: Item) -> Decoded | UserError:
        try:
            return read(item)
        except UserError as error:
            return error

    failed = list[str]()
    with ThreadPoolExecutor(available_processors()) as pool:
        for position, found in enumerate(pool.map(attempt, items)):
            if isinstance(found, UserError):
                failed.append(str(found))
            else:
                yield position, found
    if failed:
        several = f"{len(failed)} of {len(items)} images: " if len(failed) > 1 else ""
        more = f"; and {len(failed) - LISTED} more" if len(failed) > LISTED else ""
        raise UserError(several + "; ".join(failed[:LISTED]) + more)


def read_image(path: Path, image_size: int | None, channels: int = 3) -> Decoded:
    """Reads one image: the first frame, without transparency, with 8 bits a channel.

    A level v of 16 bits becomes round(v * 255 / 65535), in grey and in colour alike.

    Args:
        path: of a file in one of `FORMATS`, of which only PNG may have 16 bits a channel.
        image_size: resize the shorter side to this and crop the centre; None for the size of
            the file.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: the image cannot be decoded, or is too oblong to be resized.
    """
    # Imported here: it takes a second, which the command line need not wait for.
    from torchvision.datasets import folder
    from torchvision.transforms import functional as transforms

    try:
        if not path.is_file():  # reading from a pipe would never end
            raise ValueError("it is not a file")
        with folder.Image.open(path) as file:
            if file.format not in FORMATS:
                raise ValueError(f"its format {file.format} is none of {', '.join(FORMATS)}")
            changes = list(_changes(file, path))
            image = folder.Image.fromarray(_rounded(path)) if DEEP in changes else _as_rgb(file)
        if image_size is not None and max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels are too oblong to be resized")
    except Exception as error:  # damaged images raise almost anything
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from None
    if image_size is not None:
        if image.size != (image_size, image_size):
            changes.append("resized")
        image = transforms.center_crop(transforms.resize(image, image_size), [image_size] * 2)
    pixels = np.asarray(image)
    if channels == 3:
        return Decoded(pixels, tuple(changes))
    if (pixels != pixels[..., :1]).any():
        changes.append("colour to grey")
    return Decoded(np.asarray(transforms.to_grayscale(image)), tuple(changes))


def _changes(file: Any, path: Path) -> Iterator[str]:
    """What the pixels of an open file will lose on the way to RGB with 8 bits a channel."""
    deep = _is_deep(file, path)
    if deep:
        if file.format != "PNG":
            raise ValueError("it has more than 8 bits a channel, which is read from PNG only")
        yield DEEP
    elif file.mode not in EIGHT_BITS:
        yield f"{file.mode} to RGB"
    # Pillow takes levels with a sign for ones without.
    if file.format == "TIFF" and SIGNED in file.tag_v2.get(SAMPLE_FORMAT, ()):
        raise ValueError("its levels have a sign")
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # a photograph with its previews
        yield f"first of {frames} frames"
    if _has_transparency(file, deep):
        yield "transparency dropped"


def _is_deep(file: Any, path: Path) -> bool:
    """Whether a channel of the file has more than 8 bits, whatever mode Pillow reads it as."""
    if file.mode.startswith(("I", "F")):
        return True
    if file.format == "AVIF":
        return _is_deep_avif(path.read_bytes())
    if file.format == "TIFF":
        return max(file.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8
    if file.format not in ("PNG", "PPM") or not file.tile:
        return False
    # The layout of the file's pixels: such as "RGB;16B", or ("RGB", largest level).
    layout = file.tile[0][3]
    return layout[1] > 255 if isinstance(layout, tuple) else ";16" in layout


def _is_deep_avif(content: bytes) -> bool:
    """Whether a part of an AVIF file has 10 or 12 bits, by its boxes `av1C`."""
    boxes = content.split(AV1_CONFIGURATION)[1:]
    return not boxes or any(len(box) < 3 or box[2] & HIGH_DEPTH for box in boxes)


def _has_transparency(file: Any, deep: bool) -> bool:
    """Whether a pixel is not opaque."""
    named = "transparency" in file.info
    if file.mode in ("LA", "PA", "RGBA") or (named and not deep):
        return file.convert("RGBA").getchannel("A").getextrema()[0] < 255
    return named  # a colour of 16 bits, which Pillow cannot look for


def _as_rgb(file: Any) -> Any:
    # Pillow warns of palettes with transparency that become RGB in one step.
    transparent = "transparency" in file.info
    return (file.convert("RGBA") if transparent else file).convert("RGB")


def _rounded(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a PNG file of 16 bits a channel."""
    levels = read_deep_png(path.read_bytes())
    colors = levels[..., : 3 if levels.shape[2] >= 3 else 1]  # the others are transparency
    # 65535 is 257 * 255, and halves do not occur.
    rounded = ((colors.astype(np.int32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(rounded, (*levels.shape[:2], 3)))
