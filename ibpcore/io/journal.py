"""A journal: the finished parts of long work, each on disk before the next begins."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from ibpcore.distributed import SINGLE_PROCESS, Ranks, broadcast_object, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic


class Journal:
    """An append-only file of JSON values, from which interrupted work is resumed.

    Each line is a checksum and a value; the first value is the settings of the work. A line
    that a fault left incomplete is dropped, with all that follow it. Each rank appends to a
    file of its own, rank 0 to `path`; all existing files are read, however many ranks wrote.

    Attributes:
        path: of rank 0's file.
        parts: the recorded values, in order, file by file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], ranks: Ranks = SINGLE_PROCESS) -> None:
        """Opens or creates the files; a collective call of all ranks, which share the work.

        `settings` are all that the work depends on, as JSON values.

        Raises:
            UserError: the files have other settings or are damaged, or the ranks' settings
                differ.
            OSError: a file cannot be read or written.
        """
        if broadcast_object(ranks, settings) != settings:
            raise UserError(f"rank {ranks.rank} has other weights, images or settings than rank 0")
        # Before any rank appends, rank 0 reads and repairs all files.
        every = run_on_rank_zero(ranks, lambda: [_opened(file, settings) for file in _files(path)])
        self.path, self._own = path, _file(path, ranks.rank)
        self.parts = [json.loads(line[9:]) for lines in every for line in lines[1:]]
        self._lines = _opened(self._own, settings)

    def append(self, part: Any) -> None:
        """Appends a JSON value, which is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        self.parts.append(part)
        self._lines.append(_encode_line(part))
        try:
            with open(self._own, "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(self._lines[-1])
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:  # removed by someone: write it again, with all its lines
            write_atomic(self._own, b"".join(self._lines))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._own)) from None

    def remove(self) -> None:
        """Removes the files of all ranks, once the result of the work is on disk."""
        for file in reversed(_files(self.path)):
            file.unlink(missing_ok=True)


def _file(path: Path, rank: int) -> Path:
    """`certificates.journal` for rank 0, `certificates.1.journal` for rank 1."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


def _files(path: Path) -> list[Path]:
    """Rank 0's file first, which is the last to be removed, and the existing ones of others."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))]


def _opened(path: Path, settings: dict[str, Any]) -> list[bytes]:
    """The complete lines of a file, which is created if missing and repaired if torn."""
    found = path.read_bytes() if path.exists() else b""
    lines = _whole_lines(found) or [_encode_line(settings)]
    try:
        before, *_ = [json.loads(line[9:]) for line in lines]
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: delete it to start over") from None
    check_settings(path, before, settings)
    if found != b"".join(lines):
        write_atomic(path, b"".join(lines))
    return lines


def check_settings(path: Path, before: Any, settings: dict[str, Any]) -> None:
    """Raises UserError if one of `settings` had another value before, as read from `path`."""
    known = before if isinstance(before, dict) else {}
    changed = [name for name, value in settings.items() if known.get(name) != value]
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed since {path} was written: delete it to start over"
        )


def _encode_line(value: Any) -> bytes:
    text = json.dumps(value).encode() + b"\n"
    return b"%08x " % zlib.crc32(text) + text


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines up to the first that `_encode_line` did not make."""
    lines = []
    for line in content.split(b"\n")[:-1]:
        line += b"\n"
        if line[:9] != b"%08x " % zlib.crc32(line[9:]):
            break
        lines.append(line)
    return lines
