"""Reader of idx files, the format of MNIST, that checks the header against the file's size."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

UNSIGNED_BYTES = 0x08


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, read-only, which must have this number of dimensions.

    Raises:
        ValueError: the file has another format or shape, or not the size that its header says.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    head = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]) or len(content) < head:
        raise ValueError(f"{path.name} is not an idx file of {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    # Python integers do not overflow, whatever the header says.
    if math.prod(shape) != len(content) - head:
        raise ValueError(f"{path.name} should hold {shape} bytes, but has {len(content) - head}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
