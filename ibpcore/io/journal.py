"""A journal: the finished parts of long work, each on disk before the next begins."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from ibpcore.distributed import SINGLE_PROCESS, Ranks, broadcast_object, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic
from ibpcore.io.locks import check_held, is_open_at


class Journal:
    """An append-only file of JSON values, from which interrupted work is resumed.

    Each line is a digest and a value; the first value is the settings of the work. The digests
    of the other lines cover the settings too, so a line of other work is never taken for one of
    this. A last line that lacks its end is dropped: a kill leaves such a line. If any other line
    is damaged, the file is kept under another name, the intact lines stay, and opening fails
    once. Each rank appends to a file of its own, rank 0 to `path`; all existing files are read,
    however many ranks wrote.

    The file is open until the context ends.

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
        found = run_on_rank_zero(
            ranks, lambda: {f: _read(f, settings) for f in journal_files(path)}
        )
        self.path, self._own = path, _file(path, ranks.rank)
        self.parts = [part for parts in found.values() for part in parts]
        self._files = {*found, *(_file(path, rank) for rank in range(ranks.size))}
        self._key = _key(settings)
        _read(self._own, settings)
        self._file = open(self._own, "ab", buffering=0)  # noqa: SIM115
        self._size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self) -> None:
        """Raises UserError if the file is no longer there as it was opened and appended to.

        Another process may have the folder now, and the work there may be another.
        """
        check_held(self._own)
        handle = self._file.fileno()
        if not (is_open_at(handle, self._own) and os.fstat(handle).st_size == self._size):
            raise UserError(
                f"{self._own} was removed, replaced or changed by someone while it was in use:"
                " nothing more is written there"
            )

    def append(self, part: Any) -> None:
        """Appends a JSON value, which is on disk when this returns.

        Raises:
            UserError: see `check`.
            OSError: it cannot be written.
        """
        self.check()
        line = rest = _encode_line(part, self._key)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._own)) from None
        self._size += len(line)
        self.parts.append(part)

    def remove(self) -> None:
        """Removes the files of all ranks, once the result of the work is on disk.

        Raises:
            UserError: see `check`.
        """
        self.check()
        self._file.close()
        for file in self._files - {self.path}:
            file.unlink(missing_ok=True)
        self.path.unlink()  # last: while it exists, the work is not complete


def _file(path: Path, rank: int) -> Path:
    """`certificates.journal` for rank 0, `certificates.1.journal` for rank 1."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


def journal_files(path: Path) -> list[Path]:
    """Rank 0's file, and the existing ones of others; other names are no journals."""
    name = re.compile(rf"{re.escape(path.stem)}\.[1-9][0-9]*{re.escape(path.suffix)}")
    return [path, *sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name))]


def _read(path: Path, settings: dict[str, Any]) -> list[Any]:
    """The parts in a file, which is created if missing and repaired if torn."""
    found = path.read_bytes() if path.exists() else b""
    *lines, rest = found.split(b"\n")
    if lines and _is_former(lines[0]):
        raise UserError(
            f"{path} was written by an earlier version of ibpcore, whose journals do not say of"
            " which model each line is: delete it to start over"
        )
    key = _key(settings)
    first, parts = _decoded(lines[:1], b""), _decoded(lines[1:], key)
    for before in first:
        known = before if isinstance(before, dict) else {}
        check_settings(path, before, dict.fromkeys(known) | settings)
    repaired = _encode_line(settings, b"") + b"".join(_encode_line(part, key) for part in parts)
    damaged = len(first) + len(parts) < len(lines) or not _lacks_its_end(rest)
    kept = _keep(path, found) if damaged else None
    if found != repaired:
        write_atomic(path, repaired)
    if damaged:
        raise UserError(
            f"{path} was damaged, and is kept as {kept}: run the command again to go on from the"
            f" intact parts, {len(parts)} in number"
        )
    return parts


def check_settings(path: Path, before: Any, settings: dict[str, Any]) -> None:
    """Raises UserError if one of `settings` had another value before, as read from `path`."""
    known = before if isinstance(before, dict) else {}
    changed = [name for name, value in settings.items() if known.get(name) != value]
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed since {path} was written: delete it to start over"
        )


def _key(settings: dict[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode()).digest()


def _digest(text: bytes, key: bytes) -> bytes:
    """16 hexadecimal digits."""
    return hashlib.blake2b(text, digest_size=8, key=key).hexdigest().encode()


def _encode_line(value: Any, key: bytes) -> bytes:
    text = json.dumps(value).encode()
    return _digest(text, key) + b" " + text + b"\n"


def _decoded(lines: list[bytes], key: bytes) -> list[Any]:
    """The values of the lines that `_encode_line` made with `key`, here without their end."""
    values = []
    for line in lines:
        digest, _, text = line.partition(b" ")
        with contextlib.suppress(ValueError, RecursionError):
            if digest == _digest(text, key):
                values.append(json.loads(text))
    return values


def _is_former(line: bytes) -> bool:
    """Whether it begins a journal of the former format, with checksums of the line alone."""
    return line[:9] == b"%08x " % zlib.crc32(line[9:] + b"\n")


def _lacks_its_end(rest: bytes) -> bool:
    """Whether a kill can have left this of a line: nothing follows its value, if that is whole."""
    text = rest.partition(b" ")[2].decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return True
    return end == len(text)


def _keep(path: Path, content: bytes) -> Path:
    """Writes the content of a damaged file beside it, under a name that is new."""
    kept, number = path.with_name(f"{path.name}.damaged"), 2
    while kept.exists():
        kept, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    write_atomic(kept, content)
    return kept
