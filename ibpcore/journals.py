"""A journal: parts of a long piece of work, each on disk before the next is begun."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from ibpcore.checkpoint import write_atomic
from ibpcore.errors import UserError


class Journal:
    """A file of JSON values, a checksum and one value a line; the first are the settings.

    A line that a fault tore is left out, and whatever follows it.

    Attributes:
        path: of the file.
        parts: what was recorded, in order.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Goes on with the file, or begins it.

        Raises:
            UserError: it was begun with other settings, or is damaged beyond a torn line.
            OSError: it cannot be read or written.
        """
        self.path = path
        found = path.read_bytes() if path.exists() else b""
        self._lines = _whole_lines(found) or [_line(settings)]
        try:
            before, *self.parts = [json.loads(line[9:]) for line in self._lines]
        except (ValueError, RecursionError):
            raise UserError(f"{path} is damaged: delete it to begin anew") from None
        check_settings(path, before, settings)
        if found != b"".join(self._lines):
            self._write()

    def append(self, part: Any) -> None:
        """Records a JSON value; it is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        self.parts.append(part)
        self._lines.append(_line(part))
        try:
            with open(self.path, "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(self._lines[-1])
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:  # somebody removed it: no reason to lose what it held
            self._write()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def remove(self) -> None:
        """The work is done, and its result on disk."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _write(self) -> None:
        write_atomic(self.path, b"".join(self._lines))


def check_settings(path: Path, before: Any, settings: dict[str, Any]) -> None:
    """Refuses to go on with the file `path`, which says what the settings were `before`.

    Raises:
        UserError: one of `settings` has another value.
    """
    known = before if isinstance(before, dict) else {}
    changed = [name for name, value in settings.items() if known.get(name) != value]
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed since {path} was written: delete it to begin anew"
        )


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode() + b"\n"
    return b"%08x " % zlib.crc32(text) + text


def _whole_lines(content: bytes) -> list[bytes]:
    """Those from the first on that are as `_line` made them."""
    lines = []
    for line in content.split(b"\n")[:-1]:
        line += b"\n"
        if line[:9] != b"%08x " % zlib.crc32(line[9:]):
            break
        lines.append(line)
    return lines
