"""Fetching archives: resumed where they stopped, checked, and unpacked whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import io
import re
import shutil
import stat
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.hub import tqdm

from ibpcore.errors import UserError, first_line

LARGEST = 2**30
"""Bytes of a download, and of what an archive holds: beyond those of any data set here."""
CHUNK = 2**18
TIMEOUT = 30
"""Seconds without a byte."""
MEMBER = re.compile(r"[\w.-]+(/[\w.-]+){0,9}", re.ASCII)
DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, struct.error),
    *(ValueError, RuntimeError, LookupError, OverflowError),
)
"""What reading a damaged archive raises, and OSErrors of these numbers: no gzip, places before
the file's start, two members of one name, one below another."""
FORGED = (None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class Archive(NamedTuple):
    """A file to fetch.

    Attributes:
        name: it is kept under, with a suffix of `unpack`.
        urls: where it is, one after the other tried.
        md5: of the whole file.
    """

    name: str
    urls: tuple[str, ...]
    md5: str


def install(archives: Sequence[Archive], downloads: Path, folder: Path, inside: str = ".") -> None:
    """Makes `folder` of what the archives hold: it is there whole, or not at all.

    Args:
        archives: fetched into `downloads`, where they stay.
        folder: is not there yet.
        inside: the part of what was unpacked that becomes `folder`.

    Raises:
        UserError: one cannot be fetched, has another checksum, or is no such archive.
        OSError: the disk cannot be written.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    files = [fetch(archive, downloads) for archive in archives]
    # Left behind by a process that was killed, if it is there.
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for file in files:
            unpack(file, part)
        if not (part / inside).is_dir():
            raise UserError(f"{files[0]} holds no folder {inside}")
        (part / inside).rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch(archive: Archive, folder: Path) -> Path:
    """The file in `folder`, fetched from where an earlier attempt stopped.

    Raises:
        UserError: no address gives it, or not with this checksum; what came so far is kept
            unless it is wrong.
        OSError: the disk cannot be written.
    """
    path, reasons = folder / archive.name, list[str]()
    if path.is_file() and _md5(path) == archive.md5:
        return path
    part = path.with_name(f"{path.name}.part")
    for url in archive.urls:
        try:
            _go_on(url, part)
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
        ) as error:
            reasons.append(f"{url}: {first_line(error)}")
            continue
        if _md5(part) == archive.md5:
            return part.replace(path)
        part.unlink()
        reasons.append(f"{url}: wrong checksum, so the file was removed")
    raise UserError(f"cannot download {'; '.join(reasons)}")


def _go_on(url: str, part: Path) -> None:
    """Appends to `part` what it lacks; starts anew where the server cannot give a part.

    Raises:
        OSError: whatever urllib raises, and ConnectionError where less came than announced.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ibpcore"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not have or error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return  # nothing is lacking; the checksum tells
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        total = None if response.length is None else have + response.length
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):
            # Of what never ends the checksum is wrong.
            while have <= LARGEST and (chunk := response.read(CHUNK)):
                have += file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < min(total, LARGEST):
        raise ConnectionError(
            f"interrupted after {have} of {total} bytes; the same command goes on from there"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .gz, .tar.gz or .zip into `folder`, and nowhere else.

    Raises:
        UserError: it is damaged, larger than any data set, or has members that are no
            plain files or lie outside.
        OSError: the disk cannot be written.
    """
    left = LARGEST
    try:
        for name, content in _members(archive):
            if not MEMBER.fullmatch(name) or {"..", "."} & set(name.split("/")):
                raise UserError(f"{archive} has a member of a name that is not allowed: {name}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "xb") as file:
                while chunk := content.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise UserError(f"{archive} unpacks to more than {LARGEST} bytes")
                    file.write(chunk)
    except UserError:
        raise
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno not in FORGED:
            raise
        raise UserError(f"{archive} cannot be unpacked: {first_line(error)}") from None


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of each file in it; each must be read before the next."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as parts:
            for info in parts.infolist():
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{archive} has a member that is no file: {info.filename}")
                if not info.is_dir():
                    yield info.filename, parts.open(info)
    elif archive.name.endswith(".tar.gz"):
        with gzip.open(archive) as packed, tarfile.open(fileobj=_Limited(packed), mode="r|") as tar:
            for member in tar:
                if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
                    raise UserError(f"{archive} has a member that is no file: {member.name}")
                if not member.isdir():
                    yield member.name, tar.extractfile(member)
    else:
        with gzip.open(archive) as content:
            yield archive.stem, content


class _Limited(io.RawIOBase):
    """No more than `LARGEST` bytes of a file: tarfile takes whole names into memory."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file, self.left = file, LARGEST

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {LARGEST} bytes")
        return chunk
