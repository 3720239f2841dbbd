"""Files of `torch.save`, read without running code and without allocating more than they hold."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ibpcore.errors import UserError
from ibpcore.io.pickles import Name, Unknown, unpickled

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""First two pickles of the format before PyTorch 1.6."""
MAGIC_PICKLE = pickle.dumps(MAGIC, 2)

TYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Bool": torch.bool, "BFloat16": torch.bfloat16},
    **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    "Untyped": torch.uint8,
}
"""By the names of the types of storages, without "Storage"."""


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) >= 2**62:
        raise ValueError("a tensor with too many elements")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter Parameter": _parameter,
    "collections OrderedDict": lambda items=(): dict(items),
    "collections Counter": lambda items=(): dict(items),
    # Its argument makes the values of missing keys, which no file has.
    "collections defaultdict": lambda *_: {},
    "torch Size": tuple,
}
"""What makes the values of checkpoints; anything else is unknown."""


def is_torch_file(content: bytes) -> bool:
    """Whether the file begins as one of `torch.save`, of any version since 0.1.10."""
    if content.startswith(MAGIC_PICKLE):
        return True
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, EOFError):
        return False


def read_torch_file(content: bytes, other: Callable[[str], Any] = Unknown) -> Any:
    """Reads what `torch.save` has written.

    Args:
        content: of the whole file.
        other: makes the stand-in for an object that is neither a tensor nor a plain value, from
            the name of its class.

    Raises:
        UserError: it is not such a file, or it is damaged.
    """
    read = _read_legacy if content.startswith(MAGIC_PICKLE) else _read_archive
    try:
        return read(content, other)
    except Exception:  # a damaged file raises almost anything
        raise UserError("it is damaged, or not a PyTorch checkpoint") from None


class _Storages:
    """The storages of a file, as tensors of one dimension.

    Attributes:
        left: bytes that further ones may have in all.
        buffers: memory and tensor of each, by key.
    """

    def __init__(self, most: int) -> None:
        self.left = most
        self.buffers: dict[str, tuple[memoryview, Tensor]] = {}

    def at(self, key: str, kind: Any, count: int) -> Tensor:
        """The storage, allocated when it is first named.

        Args:
            kind: the `Name` of its type.
            count: number of its elements.
        """
        if key not in self.buffers:
            dtype = TYPES[kind.rpartition(" ")[2].removesuffix("Storage")]
            size = count * dtype.itemsize
            if not 0 <= size <= self.left:
                raise ValueError("storages larger than the file")
            self.left -= size
            content = torch.empty(size, dtype=torch.uint8)
            self.buffers[key] = content.numpy().data, content.view(dtype)
        return self.buffers[key][1]


def _read_archive(content: bytes, other: Callable[[str], Any]) -> Any:
    """The format since PyTorch 1.6: a zip archive of a pickle and a record for each storage."""
    storages = _Storages(len(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {record.filename: record for record in archive.infolist()}
        # Compressed records could unpack to any size.
        if any(record.file_size != record.compress_size for record in records.values()):
            raise ValueError("packed records")
        (pickled,) = [name for name in records if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("another order of bytes")

        def stored(saved: tuple[Any, ...]) -> Tensor:
            _, kind, key, _, count = saved
            known = key in storages.buffers
            values = storages.at(key, kind, count)
            if not known:
                buffer = storages.buffers[key][0]
                if records[f"{folder}data/{key}"].file_size != len(buffer):
                    raise ValueError("a storage of another size")
                buffer[:] = archive.read(f"{folder}data/{key}")
            return values

        return unpickled(io.BytesIO(archive.read(pickled)), CALLS, stored, other)


def _read_legacy(content: bytes, other: Callable[[str], Any]) -> Any:
    """The format before PyTorch 1.6: five pickles, then each storage behind its length."""
    file, storages = io.BytesIO(content), _Storages(len(content))

    def stored(saved: tuple[Any, ...]) -> Any:
        if saved[0] == "module":  # the source of a class, to warn if it has changed
            return saved[1]
        _, kind, key, _, count, view = saved
        values = storages.at(key, kind, count)
        return values if view is None else values[view[1] : view[1] + view[2]]

    header = [_plain(file) for _ in range(3)]
    if header[:2] != [MAGIC, PROTOCOL] or not header[2]["little_endian"]:
        raise ValueError("another format, or another order of bytes")
    objects = unpickled(file, CALLS, stored, other)
    keys = _plain(file)
    if sorted(keys) != sorted(storages.buffers):
        raise ValueError("storages that are missing or superfluous")
    for key in keys:
        buffer, values = storages.buffers[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(values) or file.readinto(buffer) != len(buffer):
            raise ValueError("a storage of another size")
    return objects


def _plain(file: io.BytesIO) -> Any:
    return unpickled(file, {}, lambda saved: Name(saved))
