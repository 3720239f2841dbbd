"""Downloads of archives: resumed, checked by their MD5, and unpacked whole or not at all."""

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

MAX_BYTES = 2**30
"""Limit of a download and of the content of an archive, above the size of any data set here."""
READ_BYTES = 2**18
"""Bytes read at a time."""
TIMEOUT = 30
"""Seconds without a byte after which a connection is given up."""
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
MEMBER_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,9}", re.ASCII)
ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, struct.error),
    *(ValueError, RuntimeError, LookupError, OverflowError),
)
"""Raised by the readers for a damaged archive, besides an OSError of `DAMAGE_ERRNOS`."""
DAMAGE_ERRNOS = (None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Not gzip, a position before the start of the file, two members of one name, one below another."""


class Archive(NamedTuple):
    """An archive of a data set that can be downloaded.

    Attributes:
        name: file name to keep it under, with a suffix that `unpack` knows.
        urls: addresses, tried in order.
        md5: hexadecimal digest of the whole file.
    """

    name: str
    urls: tuple[str, ...]
    md5: str


def install(archives: Sequence[Archive], downloads: Path, folder: Path, inside: str = ".") -> None:
    """Downloads archives and unpacks them to `folder`, which appears whole or not at all.

    Args:
        archives: to fetch into `downloads`, where they stay.
        downloads: folder of the archives; created if missing.
        folder: to create.
        inside: the folder within the archives' content that becomes `folder`.

    Raises:
        UserError: an archive cannot be fetched, has another checksum, or is damaged.
        OSError: the disk cannot be written.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    files = [fetch(archive, downloads) for archive in archives]
    # A killed process may have left it.
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
    """Downloads an archive into `folder`, resuming an earlier attempt, and returns its path.

    Raises:
        UserError: no address provides it with this checksum; an incomplete download is kept,
            one with a wrong checksum is removed.
        OSError: the disk cannot be written.
    """
    path, reasons = folder / archive.name, list[str]()
    if path.is_file() and _md5(path) == archive.md5:
        return path
    part = path.with_name(f"{path.name}.part")
    for url in archive.urls:
        try:
            _resume(url, part)
        except NETWORK_ERRORS as error:
            reasons.append(f"{url}: {first_line(error)}")
            continue
        if _md5(part) == archive.md5:
            return part.replace(path)
        part.unlink()
        reasons.append(f"{url}: wrong checksum, so the file was removed")
    raise UserError(f"cannot download {'; '.join(reasons)}")


def _resume(url: str, part: Path) -> None:
    """Downloads the rest of `part`, or all of it if the server does not support ranges.

    Raises:
        OSError: whatever urllib raises; ConnectionError if fewer bytes came than announced.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ibpcore"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not have or error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return  # nothing is missing; the checksum decides
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        total = None if response.length is None else have + response.length
        look = {"unit": "B", "unit_scale": True, "desc": part.stem, "dynamic_ncols": True}
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total, initial=have, disable=not sys.stderr.isatty(), **look) as bar,
        ):
            # A stream that never ends is cut, and then has a wrong checksum.
            while have <= MAX_BYTES and (chunk := response.read(READ_BYTES)):
                have += file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < min(total, MAX_BYTES):
        raise ConnectionError(
            f"interrupted after {have} of {total} bytes; the same command continues from there"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .gz, .tar.gz or .zip into `folder`, and writes nowhere else.

    Raises:
        UserError: the archive is damaged, unpacks to more than `MAX_BYTES`, or has a member
            that is not a plain file or would lie outside `folder`.
        OSError: the disk cannot be written.
    """
    left = MAX_BYTES
    try:
        for name, content in _members(archive):
            if not MEMBER_NAME.fullmatch(name) or {"..", "."} & set(name.split("/")):
                raise UserError(f"{archive} has a member whose name is not allowed: {name}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "xb") as file:
                while chunk := content.read(READ_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        raise UserError(f"{archive} unpacks to more than {MAX_BYTES} bytes")
                    file.write(chunk)
    except UserError:
        raise
    except (OSError, *ARCHIVE_ERRORS) as error:
        if isinstance(error, OSError) and error.errno not in DAMAGE_ERRNOS:
            raise
        raise UserError(f"{archive} cannot be unpacked: {first_line(error)}") from None


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Yields name and content of each file in the archive; read each before the next."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as parts:
            for info in parts.infolist():
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{archive} has a member that is not a file: {info.filename}")
                if not info.is_dir():
                    yield info.filename, parts.open(info)
    elif archive.name.endswith(".tar.gz"):
        with gzip.open(archive) as packed, tarfile.open(fileobj=_Limited(packed), mode="r|") as tar:
            for member in tar:
                if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
                    raise UserError(f"{archive} has a member that is not a file: {member.name}")
                if not member.isdir():
                    yield member.name, tar.extractfile(member)
    else:
        with gzip.open(archive) as content:
            yield archive.stem, content


class _Limited(io.RawIOBase):
    """A gzip stream that ends with an error after `MAX_BYTES`.

    tarfile reads whole member names into memory, so `unpack`'s own limit would come too late.
    """

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file, self.left = file, MAX_BYTES

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
        return chunk
