"""Files that may be compressed by gzip, as those of VNN-COMP are."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ibpcore.errors import UserError

GZIP = b"\x1f\x8b"
"""Start of a gzip file, whatever its name."""
SUFFIX = ".gz"
LARGEST = 2**31
"""Bytes of a file after it is unpacked."""


def plain_or_packed(path: Path) -> Path:
    """The file itself, or the one of that name with `.gz` behind it if only that exists."""
    packed = path.with_name(path.name + SUFFIX)
    return packed if packed.is_file() and not path.exists() else path


def is_packed(path: Path) -> bool:
    """Whether the file begins as gzip does, whatever its name.

    Raises:
        UserError: there is no such file; the message does not name it.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise UserError("it is missing, or not a file")
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def unpacked(path: Path) -> bytes:
    """The content of a file, without its compression if it has one.

    Raises:
        UserError: it is missing, damaged or too large; the message does not name it.
        OSError: it exists but cannot be read.
    """
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError("it is damaged: it cannot be unpacked") from None
    if len(content) > LARGEST:
        raise UserError(f"it is too large: more than {LARGEST // 2**20} MiB")
    return content
