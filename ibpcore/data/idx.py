"""Reader of idx files, the format of MNIST, that checks the header against the file's size."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ibpcore.io.compressed import GZIP

UNSIGNED_BYTES = 0x08
MAX_BYTES = 2**30
"""Limit of an unpacked file, above the size of any data set in this format."""


def find_idx(folder: Path, name: str) -> Path | None:
    """The idx file of an official name such as `train-images-idx3-ubyte`, None if there is none.

    It may also be called `train-images.idx3-ubyte`, be packed (`.gz`), and lie in a folder of its
    own name, as unpacking on a desktop makes it. An unpacked file comes before a packed one.
    """
    names = (name, name.replace("-idx", ".idx"))
    variants = [path for n in names for path in (folder / n, folder / n / n)]
    packed = [path.with_name(f"{path.name}.gz") for path in variants]
    return next((path for path in variants + packed if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, read-only, which must have this number of dimensions.

    Args:
        path: of the file, packed by gzip or not.
        dimensions: of the array.

    Raises:
        ValueError: the file has another format or shape, or not the size that its header says.
        OSError: it cannot be read.
    """
    content = _unpacked(path)
    head = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]) or len(content) < head:
        raise ValueError(f"{path.name} is not an idx file of {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    # Python integers do not overflow, whatever the header says.
    if math.prod(shape) != len(content) - head:
        raise ValueError(f"{path.name} should hold {shape} bytes, but has {len(content) - head}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(GZIP):
        return content
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        unpacked = stream.decompress(content, MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"{path.name} is a damaged gzip file: {error}") from None
    if not stream.eof:
        raise ValueError(f"{path.name} is a gzip file that was cut, or unpacks to too much")
    return unpacked
