"""Formats of checkpoint files: what can be read, and what others are called."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any, NamedTuple

import safetensors.torch

from ibpcore.errors import UserError
from ibpcore.io.torch_files import is_torch_file, read_torch_file


class Checkpoint(NamedTuple):
    """The content of a file.

    Attributes:
        objects: dictionaries of tensors, and `ibpcore.io.pickles.Unknown` for modules.
        by_name: whether the format sorts entries by their names.
    """

    objects: Any
    by_name: bool


BEGINNINGS = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, such as Keras writes, not a PyTorch checkpoint",
    b"\x93NUMPY": "is a NumPy array, not a PyTorch checkpoint",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run git lfs pull",
    b"<": "is a web page, not a checkpoint: the download failed",
}
TORCHSCRIPT = b"/constants.pkl"
"""Name of a record that torch.save does not write."""
TAR_PLACE, TAR_MARK = 257, b"ustar"

VARINT, BYTES = 0, 2
"""Kinds of values in a protobuf message."""
VERSION, GRAPH, LARGEST_FIELD, MOST_FIELDS = 1, 7, 30, 10_000
"""Numbers of the fields of an ONNX model, and how many there can be."""


def read_checkpoint(content: bytes) -> Checkpoint:
    """Reads a file of `torch.save` or safetensors; nothing in it is run.

    Args:
        content: of the whole file.

    Raises:
        UserError: it is neither, which the message says, or it is damaged.
    """
    if TORCHSCRIPT in content and zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError("it is a TorchScript archive: save the state dict of the module instead")
    if is_torch_file(content):
        return Checkpoint(read_torch_file(content), by_name=False)
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content):
        return Checkpoint(_read_safetensors(content), by_name=True)
    raise UserError(f"it {_description(content)}")


def _read_safetensors(content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if "ibpcore" in header.get("__metadata__", {}):
            raise UserError("it is a model file of ibpcore already")
        tensors = safetensors.torch.load(content)
    except UserError:
        raise
    except Exception:  # of many types, as the header may hold anything
        raise UserError("it is a damaged safetensors file") from None
    return {name: tensors[name] for name in sorted(tensors)}


def _description(content: bytes) -> str:
    """What a file is that cannot be read, as the rest of a sentence."""
    for beginning, text in BEGINNINGS.items():
        if content.lstrip().startswith(beginning):
            return text
    if content[TAR_PLACE:].startswith(TAR_MARK):
        return "is a tar archive: unpack it first; as a checkpoint it is older than PyTorch 0.1.10"
    if zipfile.is_zipfile(io.BytesIO(content)):
        return "is a zip archive, but not one of torch.save"
    if is_onnx(content):
        return "is an ONNX network, not a checkpoint"
    if content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle, but not written by torch.save"
    return "is damaged, or neither a file of torch.save nor a safetensors file"


def is_onnx(content: bytes) -> bool:
    """Whether it is a protobuf message with the fields of an ONNX model: version and graph."""
    place, fields = 0, set()
    for _ in range(MOST_FIELDS):
        tag, place = _varint(content, place)
        value, place = _varint(content, place)
        if tag & 7 not in (VARINT, BYTES) or not 1 <= tag >> 3 <= LARGEST_FIELD:
            return False
        fields.add(tag >> 3)
        place += value if tag & 7 == BYTES else 0
        if place >= len(content):
            break
    return place == len(content) and {VERSION, GRAPH} <= fields


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte from `place` on, and the place behind it."""
    number = shift = 0
    while place < len(content):
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128 or shift > 63:
            break
    return number, place
