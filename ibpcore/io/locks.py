"""A folder to one process at a time: a lock that the system lets go when its holder dies."""

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
        """Whether the open file is this process's, or its file system knows no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems: better no lock than no work
            pass
        return True


@contextlib.contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[Path]:
    """Makes `folder` if need be, and keeps other processes from writing there meanwhile.

    What a killed process left half-written is cleared away at the start, and at the end
    what was made here and stayed empty. The lock is one of the system on the file `.lock`:
    however its holder ends, it is free. A file system without locks gives none.

    Args:
        folder: to write in.
        patience: seconds to wait for another process.

    Raises:
        UserError: another process holds the folder, or it cannot be made or written.
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
        with contextlib.suppress(OSError):  # the first that is not empty stays, as do the others
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
        # While it is held: afterwards it may be another's. Windows keeps an open file.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _taken(path: Path) -> int | None:
    """The file, open and locked; None if another process has it.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its last holder removed the file after it was opened here
