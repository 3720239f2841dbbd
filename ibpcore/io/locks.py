"""Locks on folders: one process at a time, released by the system when the process dies."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path

from ibpcore.errors import UserError

LOCK = ".lock"
TEMPORARY = ".ibptmp"
"""Suffix of a file that is being written; a killed process leaves it behind."""
SECONDS_BETWEEN = 0.1
_HELD: dict[Path, int] = {}
"""The folders that this process holds, by absolute path, each with its open lock file."""

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
    the process ends. On a file system without locks there is no protection. Whoever removes
    the folder or the file takes the lock away, see `check_held`.

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
def held_anew(asked: Path | None, default: Path, begun: Container[str] = ()) -> Iterator[Path]:
    """Makes the folder `asked`, and holds it; if None, `default`, numbered where that exists.

    It may hold files of names in `begun`, which a killed process wrote before it could be resumed.

    Raises:
        UserError: the folder exists and is not empty, is in use, or cannot be made.
    """
    folder, number = asked or default, 2
    while asked is None and folder.exists():
        folder, number = default.with_name(f"{default.name}-{number}"), number + 1
    with held(folder):
        if any(path.name != LOCK and path.name not in begun for path in folder.iterdir()):
            raise UserError(f"the output folder {folder} already exists and is not empty")
        yield folder


def check_held(path: Path) -> None:
    """Raises UserError if this process held a folder that `path` is in, and has lost it.

    It is lost when the folder or its lock file is removed: another process may hold it by now.
    """
    for folder in Path(os.path.abspath(path)).parents:
        if folder in _HELD and not is_open_at(_HELD[folder], folder / LOCK):
            raise UserError(
                f"{path} was not written: its folder or the lock in it was removed by someone,"
                " and may belong to another process now"
            )


def is_open_at(handle: int, path: Path) -> bool:
    """Whether the file at `path` is the open one, and not another of the same name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


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
    held_as = Path(os.path.abspath(folder))
    _HELD[held_as] = handle
    try:
        yield
    finally:
        _HELD.pop(held_as, None)
        # Before the lock is released, after which the file may be another's; on Windows an open
        # file cannot be removed, and stays.
        with contextlib.suppress(OSError):
            if is_open_at(handle, path):
                path.unlink()
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Removes the unfinished files that killed processes left in a folder."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _taken(path: Path) -> int | None:
    """Opens and locks the file; None if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            os.close(handle)
            return None
        if is_open_at(handle, path):
            return handle
        os.close(handle)  # its former holder removed the file after it was opened here
