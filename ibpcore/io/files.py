"""Atomic writes, and JSON files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ibpcore.errors import UserError

TEMPORARY = ".ibptmp"
"""Ends the name of a file that is being written; of a process that was killed it stays."""


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old or the new content, never a part.

    Raises:
        OSError: it cannot be written; nothing is left behind, the old file is as it was.
    """
    try:
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}-", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        # A failing write names no file, and mkstemp one that nobody asked for.
        raise OSError(error.errno, error.strerror, str(path)) from None
    with contextlib.suppress(OSError):  # the file is whole; not every system syncs folders
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """So that after a power cut a file is not back that was replaced before another was."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Clears away what killed processes were writing there.

    Raises:
        OSError: it cannot be.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, or not JSON.
        OSError: it is there, but cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
