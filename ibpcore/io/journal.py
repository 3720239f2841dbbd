"""A journal: parts of a long piece of work, each on disk before the next is begun."""

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
    """A file of JSON values, a checksum and one value a line; the first are the settings.

    A line that a fault tore is left out, and whatever follows it. Each rank has a file of
    its own, that of rank 0 is `path`; all that are there are read, however many ranks wrote.

    Attributes:
        path: of the first file.
        parts: what was recorded, in order, file by file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], ranks: Ranks = SINGLE_PROCESS) -> None:
        """Goes on with the files, or begins them; all ranks together.

        Raises:
            UserError: they were begun with other settings, or are damaged beyond a torn line,
                or the ranks have not the same settings.
            OSError: one cannot be read or written.
        """
        if broadcast_object(ranks, settings) != settings:
            raise UserError(f"rank {ranks.rank} has other weights, images or settings than rank 0")
        # Before anything is added: rank 0 reads, and mends, all of them.
        every = run_on_rank_zero(ranks, lambda: [_opened(file, settings) for file in _files(path)])
        self.path, self._own = path, _file(path, ranks.rank)
        self.parts = [json.loads(line[9:]) for lines in every for line in lines[1:]]
        self._lines = _opened(self._own, settings)

    def append(self, part: Any) -> None:
        """Records a JSON value; it is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        self.parts.append(part)
        self._lines.append(_line(part))
        try:
            with open(self._own, "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(self._lines[-1])
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:  # somebody removed it: no reason to lose what it held
            write_atomic(self._own, b"".join(self._lines))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._own)) from None

    def remove(self) -> None:
        """The work of all ranks is done, and its result on disk."""
        for file in reversed(_files(self.path)):
            file.unlink(missing_ok=True)


def _file(path: Path, rank: int) -> Path:
    """`certificates.journal` of rank 0, `certificates.1.journal` of the next."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


def _files(path: Path) -> list[Path]:
    """That of rank 0, and those of others that are there; the first is there to the last."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))]


def _opened(path: Path, settings: dict[str, Any]) -> list[bytes]:
    """The whole lines of a file, which is begun if it is not there, and mended if it is torn."""
    found = path.read_bytes() if path.exists() else b""
    lines = _whole_lines(found) or [_line(settings)]
    try:
        before, *_ = [json.loads(line[9:]) for line in lines]
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: delete it to begin anew") from None
    check_settings(path, before, settings)
    if found != b"".join(lines):
        write_atomic(path, b"".join(lines))
    return lines


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
