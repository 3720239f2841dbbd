"""The files of MNIST: arrays of bytes behind a header that is not believed."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

UNSIGNED_BYTES = 0x08


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of bytes with so many dimensions in an idx file.

    Raises:
        ValueError: the file holds something else, or not as much as its header says.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    head = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]) or len(content) < head:
        raise ValueError(f"{path.name} is no idx file of {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    # In Python's numbers, which do not overflow as those of a tensor's size do.
    if math.prod(shape) != len(content) - head:
        raise ValueError(
            f"{path.name} should hold {shape} bytes, but has {len(content) - head} of them"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
