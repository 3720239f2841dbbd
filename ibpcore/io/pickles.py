"""Files of `torch.save`, read so that nothing is run and no more is made than lies in them."""

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
"""What the pickle of a state calls, beside the types of storages."""
REBUILT_IN_MODULES = REBUILT | {
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "builtins set",
    "_codecs encode",
}
"""What that of whole modules and of numpy's numbers calls too, beside classes of any kind."""


class Unknown:
    """Stands for an object of any class, which is not looked up: nothing in it can run.

    Each class has a subclass of this, by its name.

    Attributes:
        state: what the object was pickled with, usually its attributes.
    """

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty(*arguments: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`, which is filled after it is made."""
    return {}


def called(file: io.BytesIO) -> set[str]:
    """What `torch.load` would call, each as "module name", without types of storages.

    By itself it would call `bytearray` and constructors of tensors with any size. Codecs by
    which bytes would grow again and again are named too.

    Raises:
        ValueError: `file` is another one than `torch.save` writes, or packed, to be unpacked
            to any size.
        zipfile.BadZipFile: likewise.
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
    except Exception:  # unknown, or of texts
        return False
    return True


def read_foreign(content: bytes) -> Any:
    """What another program wrote with `torch.save`; objects become `Unknown`.

    Args:
        content: of the whole file.

    Raises:
        UserError: it is no such file, is damaged, or would call what is called nowhere else.
    """
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        raise UserError(
            "it is damaged, or not of torch.save since PyTorch 1.6: if it is older, load it and"
            " save it again"
        )
    # A damaged pickle raises almost anything, and torch warns of it, and advises to trust it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            objects = {name.replace(" ", ".") for name in called(file) - REBUILT_IN_MODULES}
            # What torch knows it would call itself, whatever stands for it.
            if not objects <= set(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
                raise ValueError("calls what no checkpoint calls")
            file.seek(0)
            with torch.serialization.safe_globals([_stand_in(name) for name in objects]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError("it is damaged, or no checkpoint of PyTorch") from None


def _stand_in(name: str) -> Any:
    if name == "collections.defaultdict":
        return _empty, name
    return type(name.rpartition(".")[2], (Unknown,), {}), name
