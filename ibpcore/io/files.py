"""Paths, atomic writes, CSV and JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ibpcore.errors import UserError
from ibpcore.io.locks import TEMPORARY, check_held


def as_path(path: Any, kind: str) -> Path:
    """`path` as a `Path`.

    Raises:
        UserError: it is neither a string nor a path; the message says what `kind` of file it is.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise UserError(f"the path of {kind} must be a string or a Path, not {path!r}")
    return Path(path)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that, whatever fails, it has either the old or the new content.

    Raises:
        UserError: this process has lost the lock of the folder, see `check_held`.
        OSError: it cannot be written; an old file is unchanged, and no other is left behind.
    """
    try:
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}-", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            check_held(path)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        # A failed write names no file, and mkstemp the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from None
    with contextlib.suppress(OSError):  # the file is complete; not every system syncs folders
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Keeps the order of replacements: a power cut cannot undo an earlier one and keep a later."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table as CSV, a row without some column as an empty cell.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # The name of an image file may contain bytes that are not UTF-8.
    write_atomic(path, buffer.getvalue().encode(errors="surrogateescape"))


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it is missing, or not JSON.
        OSError: it exists but cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or not a file")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
