"""Files of `torch.save`, read without running code and without allocating more than they hold."""

from __future__ import annotations

import codecs
import io
import pickletools
import re
import warnings
import zipfile
from typing import Any

import torch

from ibpcore.errors import UserError

REBUILT = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", "collections Counter"}
"""Names that the pickle of a training state calls, besides the types of storages."""
REBUILT_IN_MODULES = REBUILT | {
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "builtins set",
    "_codecs encode",
}
"""Names that pickles of whole modules and numpy scalars call too, besides arbitrary classes."""


class Unknown:
    """Stands in for an object of any class; the class is not imported, so no code of it runs.

    Objects of each class become a subclass with the name of the class.

    Attributes:
        state: the pickled state of the object, usually its attributes.
    """

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty(*arguments: Any) -> dict[Any, Any]:
    """Stands in for `collections.defaultdict`, which is filled after its creation."""
    return {}


def called(file: io.BytesIO) -> set[str]:
    """The names that `torch.load` would call, each as "module name", without types of storages.

    `torch.load` itself allows `bytearray` and tensor constructors of any size, hence this check.
    Codecs from bytes to bytes, which could multiply them, are included as "codec name".

    Raises:
        ValueError: `torch.save` does not write such files, or the records are compressed and
            could unpack to any size.
        zipfile.BadZipFile: the file is not a zip archive.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        (pickled,) = [record for record in records if record.filename.endswith("/data.pkl")]
        if any(record.file_size != record.compress_size for record in records):
            raise ValueError("packed records")
        codes = list(pickletools.genops(archive.read(pickled)))
    names = {str(name) for code, name, _ in codes if code.name in ("GLOBAL", "STACK_GLOBAL")}
    if "_codecs encode" in names:
        texts = {value for _, value, _ in codes if isinstance(value, str) and len(value) < 32}
        names |= {f"codec {text}" for text in texts if _turns_bytes_into_bytes(text)}
    file.seek(0)
    storages = {name for name in names if re.fullmatch(r"torch \w+Storage", name)}
    return {re.sub(r"^__builtin__ ", "builtins ", name) for name in names - storages}


def _turns_bytes_into_bytes(codec: str) -> bool:
    nothing: Any = b""
    try:
        codecs.encode(nothing, codec)
    except Exception:  # unknown, or a codec of texts
        return False
    return True


def read_foreign(content: bytes) -> Any:
    """Reads what another program wrote with `torch.save`; objects become `Unknown`.

    Args:
        content: of the whole file.

    Raises:
        UserError: it is not such a file, is damaged, or calls what no checkpoint calls.
    """
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        raise UserError(
            "it is damaged, or not written by torch.save since PyTorch 1.6: if it is older, load"
            " it and save it again"
        )
    # A damaged pickle raises almost anything, and torch warns with advice to trust the file.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            objects = {name.replace(" ", ".") for name in called(file) - REBUILT_IN_MODULES}
            # Names that torch knows it would call itself, despite a stand-in.
            if not objects <= set(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
                raise ValueError("calls what no checkpoint calls")
            file.seek(0)
            with torch.serialization.safe_globals([_stand_in(name) for name in objects]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError("it is damaged, or not a PyTorch checkpoint") from None


def _stand_in(name: str) -> Any:
    if name == "collections.defaultdict":
        return _empty, name
    return type(name.rpartition(".")[2], (Unknown,), {}), name
