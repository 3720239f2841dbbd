"""Reader of PNG files with 16 bits a channel, of which Pillow keeps the upper 8 only.

Section numbers are those of the PNG specification, third edition.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Number of channels of a colour type: grey, RGB, grey with alpha, RGB with alpha."""
BYTES = 2
"""Of a channel."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)
"""First row and column, and steps of rows and columns, of each pass (section 8.2)."""


def read_deep_png(content: bytes) -> np.ndarray:
    """The levels in a PNG file of 16 bits a channel, (H, W, C) uint16, alpha last if there is one.

    Raises:
        ValueError, struct.error, zlib.error: the file is damaged, or has another depth.
    """
    chunks = list(_chunks(content))
    kind, head = chunks[0]
    width, height, depth, color, _, _, interlaced = struct.unpack(">2I5B", head)
    if kind != b"IHDR" or depth != 8 * BYTES or color not in CHANNELS or interlaced > 1:
        raise ValueError("it is not a PNG file of 16 bits a channel")
    size = CHANNELS[color] * BYTES
    parts = [
        (slice(y, height, dy), slice(x, width, dx), (height - y + dy - 1) // dy, columns)
        for y, x, dy, dx in (ADAM7 if interlaced else WHOLE)
        if y < height and (columns := (width - x + dx - 1) // dx) > 0
    ]
    length = sum(rows * (1 + columns * size) for *_, rows, columns in parts)
    data = b"".join(body for name, body in chunks if name == b"IDAT")
    # Grows with what the file holds, whatever its header says.
    pixels = np.frombuffer(zlib.decompressobj().decompress(data, length), np.uint8)
    if len(pixels) != length:
        raise ValueError("the pixels of the PNG file are cut")
    levels = np.empty((height, width, CHANNELS[color]), np.uint16)
    for ys, xs, rows, columns in parts:
        part, pixels = np.split(pixels, [rows * (1 + columns * size)])
        lines = part.reshape(rows, -1)
        raw = _unfiltered(lines[:, 1:].reshape(rows, columns, size), lines[:, 0])
        levels[ys, xs] = raw.view(">u2")
    return levels


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and body of each chunk, up to IEND (section 5.3)."""
    if not content.startswith(SIGNATURE):
        raise ValueError("it is not a PNG file")
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, start)
        body = content[start + 8 : start + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, start + 8 + length)
        if zlib.crc32(kind + body) != checksum:
            raise ValueError("the PNG file is damaged: a checksum is wrong")
        yield kind, body
        start += 12 + length


def _unfiltered(filtered: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Undoes the filters of scanlines (section 9), one diagonal of the image after the other.

    A pixel is predicted from its left, upper and upper left neighbours, so that those of a
    diagonal do not depend on each other.

    Args:
        filtered: (H, W, size) uint8, bytes of each pixel.
        kinds: (H,) uint8, the filter of each line.
    """
    if kinds.max() > 4:
        raise ValueError("the PNG file has an unknown filter")
    height, width, size = filtered.shape
    # The first row and column stand for what lies outside the image.
    found = np.zeros((height + 1, width + 1, size), np.int32)
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, up, corner = found[y + 1, x], found[y, x + 1], found[y, x]
        guesses = (np.zeros_like(left), left, up, (left + up) // 2, _paeth(left, up, corner))
        guess = np.choose(kinds[y, None], guesses)
        found[y + 1, x + 1] = (filtered[y, x] + guess) % 256
    return found[1:, 1:].astype(np.uint8)


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of the three neighbours the one nearest to left + up - corner; ties go in this order."""
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    nearest = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
