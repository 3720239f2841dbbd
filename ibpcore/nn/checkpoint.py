"""Model files: weights and architecture in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.io.files import as_path, write_atomic
from ibpcore.nn.cnn7 import CNN7, Architecture
from ibpcore.nn.networks import Classifier, Network, channels_last

ENTRY, FORMAT = "ibpcore", 1
MODEL = "model.safetensors"
"""The model file in a run folder."""


def save_model(model: nn.Module, path: str | Path, **facts: Any) -> None:
    """Saves weights, architecture and `facts` as one safetensors file, for `load_model`.

    Args:
        model: from `ibpcore.cnn7`, `ibpcore.convert` or `ibpcore.nn.Network`.
        path: usually `model.safetensors`.
        facts: further JSON values, such as the training configuration; see `read_facts`.

    Raises:
        UserError: the model is not a `Classifier`, has a layer or weights that cannot be
            saved, or a fact is no JSON value.
        OSError: the file cannot be written.
    """
    if not isinstance(model, Classifier):
        raise UserError(
            f"a {type(model).__name__} cannot be saved: call ibpcore.convert(model, in_shape) first"
        )
    check_weights(model)
    write_atomic(as_path(path, "a model file"), _content(model, facts))


def check_weights(model: nn.Module) -> None:
    """Raises UserError unless the weights are finite and of one type that files may hold."""
    state = model.state_dict()
    weights = {name: state[name] for name in state if not name.endswith("num_batches_tracked")}
    types = {tensor.dtype for tensor in weights.values()}
    for name, tensor in weights.items():
        if len(types) > 1 or tensor.dtype not in (torch.float32, torch.float64):
            odd = f"{name} is {tensor.dtype}"
            raise UserError(f"the weights are neither all float32 nor all float64: {odd}")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise UserError(f"{name} is no dense tensor in memory")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name} holds values that are not finite")


def _content(model: Classifier, facts: dict[str, Any]) -> bytes:
    header = _header(model, facts)
    tensors: dict[str, Tensor] = {}
    kept: set[int] = set()
    for name, tensor in model.state_dict().items():
        # safetensors allows no shared tensors: layers that share weights get a copy each.
        shared = tensor.untyped_storage().data_ptr() in kept
        tensors[name] = (tensor.clone() if shared else tensor).contiguous()
        kept.add(tensor.untyped_storage().data_ptr())
    # A single entry, since safetensors writes several in random order.
    return safetensors.torch.save(tensors, {ENTRY: header})


def _header(model: Classifier, facts: dict[str, Any]) -> str:
    header = {"format": FORMAT, "architecture": model.description(), "facts": facts}
    try:
        return json.dumps(header, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"architecture or facts are no JSON values: {first_line(error)}") from None


def _plain(value: Any) -> int | float:
    """A number of another library, such as a size that NumPy has multiplied, as one of Python."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def fingerprint(model: Classifier) -> str:
    """A SHA-256 digest of architecture and weights, which identifies the model of a certificate."""
    return hashlib.sha256(_content(model, {})).hexdigest()


def load_model(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Loads a model that `save_model` has written, in evaluation mode on `device`.

    No code in the file is run.

    Args:
        path: a model file, or the folder of a run, for the model in it.
        device: to load the model to.

    Raises:
        UserError: there is no such file, it is not an intact model file of ibpcore, or there
            is no such device.
    """
    path = model_file(path)
    architecture = _read_header(path, "architecture")
    try:
        model = _restored(architecture, safetensors.torch.load_file(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"there is no device {device!r}: {first_line(error)}") from None


def check_saved(model: Classifier) -> None:
    """Raises UserError unless `load_model` would load what `save_model` would write."""
    check_weights(model)
    tensors = safetensors.torch.load(_content(model, {}))
    _restored(json.loads(_header(model, {}))["architecture"], tensors)


def _restored(architecture: dict[str, Any], tensors: dict[str, Tensor]) -> Classifier:
    """The classifier of a description, with these weights."""
    model = _build(architecture)
    try:
        # With `assign` float64 weights stay float64.
        model.load_state_dict(tensors, assign=True)
        channels_last(model)  # as in a new model
    except RuntimeError:
        raise UserError("the weights do not fit the architecture in the file") from None
    check_weights(model)
    return model


BUILDERS: dict[str, Callable[[dict[str, Any]], Classifier]] = {
    "cnn7": lambda facts: CNN7(Architecture.from_dict(facts)),
    "network": Network.from_description,
}


def _build(architecture: dict[str, Any]) -> Classifier:
    name = architecture.pop("name", None)
    if name not in BUILDERS:
        raise UserError("it has an architecture unknown to this version")
    try:
        with torch.device("meta"):  # uses no memory and no random numbers
            return BUILDERS[name](architecture)
    except REFUSED as error:
        reason = first_line(error)  # values that do not fit a layer, or sizes beyond the memory
        raise UserError(f"it describes no network that can be built: {reason}") from None


def model_file(path: str | Path) -> Path:
    """The model file at `path`, which may also be the folder of a run.

    Raises:
        UserError: `path` is neither a string nor a path.
    """
    path = as_path(path, "a model file")
    return path / MODEL if path.is_dir() else path


def read_facts(path: str | Path) -> dict[str, Any]:
    """The `facts` that were saved with a model, in a model file or the folder of a run.

    Raises:
        UserError: there is no such file, or it is not an intact model file of ibpcore.
    """
    return _read_header(model_file(path), "facts")


def _read_header(path: Path, entry: str) -> dict[str, Any]:
    """The JSON object called `entry` in the metadata."""
    if not path.is_file():
        raise UserError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not an intact safetensors file: {error}; to read a checkpoint of another"
            " program use ibp import"
        ) from None
    if ENTRY not in header:
        raise UserError(f"{path} is a safetensors file, but not a model of ibpcore")
    try:
        entries = json.loads(header[ENTRY])
        known, values = entries["format"] == FORMAT, entries[entry]
    except (KeyError, TypeError, ValueError, RecursionError):
        known, values = True, None
    if not known:
        raise UserError(f"{path} was written by another version of ibpcore")
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: its {entry} cannot be read")
    return values
