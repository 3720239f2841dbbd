"""Models and resumable runs on disk; every file is whole or not there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ibpcore.errors import UserError
from ibpcore.models import CNN7, Architecture

FORMAT = "ibpcore-1"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old or the new content, never a part.

    Raises:
        OSError: it cannot be written; nothing is left behind, the old file is as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(model: nn.Module, path: str | Path, **facts: Any) -> None:
    """Writes weights, architecture and `facts` as one safetensors file.

    Args:
        model: made by `ibpcore.cnn7`.
        path: usually `model.safetensors`.
        facts: JSON values worth keeping, such as how the model was trained.

    Raises:
        UserError: the model is of another kind.
        OSError: the file cannot be written.
    """
    if not isinstance(model, CNN7):
        raise UserError(f"only models made by cnn7 can be saved, not {type(model).__name__}")
    header = {
        "format": FORMAT,
        "architecture": json.dumps({"name": "cnn7", **model.architecture.to_dict()}),
        "facts": json.dumps(facts),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(Path(path), safetensors.torch.save(tensors, header))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> CNN7:
    """The model in a file of `save_model`, in evaluation mode.

    Raises:
        UserError: there is no such file, or it is not an intact model of ours.
    """
    header = _read_header(path)
    architecture = json.loads(header["architecture"])
    if architecture.pop("name", None) != "cnn7":
        raise UserError(f"{path} holds an architecture unknown to this version")
    model = CNN7(Architecture.from_dict(architecture))
    tensors = safetensors.torch.load_file(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{path}: the weights do not fit the architecture beside them") from None
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds values that are not finite")
    return model.to(device).eval()


def read_facts(path: str | Path) -> dict[str, Any]:
    """The `facts` that a model was saved with.

    Raises:
        UserError: there is no such file, or it is not an intact model of ours.
    """
    facts = json.loads(_read_header(path)["facts"])
    if not isinstance(facts, dict):
        raise UserError(f"{path} is not a model of ibpcore")
    return facts


def _read_header(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise UserError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but not a model of ibpcore")
    return header


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes what it takes to go on with a run: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is nothing to resume: {path} is missing") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged: {reason}") from None
    return state
