"""Locks on folders: one process at a time, released by the system when the process dies."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ibpcore.errors import UserError
from ibpcore.io.files import remove_temporaries

LOCK = ".lock"
SECONDS_BETWEEN = 0.1

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Whether the open file is locked now, or its file system does not support locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # on some network file systems: work without a lock
            pass
        return True


@contextlib.contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[Path]:
    """Creates `folder` if needed, and reserves it for this process until the context ends.

    Unfinished files of a killed process are removed at the start, and new folders that stayed
    empty at the end. The lock is a system lock on the file `.lock`, which is released however
    the process ends. On a file system without locks there is no protection.

    Args:
        folder: to write in.
        patience: seconds to wait for another process.

    Raises:
        UserError: another process holds the folder, or it cannot be created or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
        with _locked(folder, patience):
            yield folder
    finally:
        with contextlib.suppress(OSError):  # up to the first that is not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, patience: float) -> Iterator[None]:
    path, deadline = folder / LOCK, time.monotonic() + patience
    try:
        while (handle := _taken(path)) is None and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN)
        if handle is not None:
            remove_temporaries(folder)
    except OSError as error:
        raise UserError(f"cannot write in the folder {folder}: {error.strerror}") from None
    if handle is None:
        raise UserError(f"another process is at work in the folder {folder}")
    try:
        yield
    finally:
        # Before the lock is released, after which the file may be another's; on Windows an open
        # file cannot be removed, and stays.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _taken(path: Path) -> int | None:
    """Opens and locks the file; None if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its former holder removed the file after it was opened here
