"""Model files: weights and architecture in safetensors, saved and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.io.files import write_atomic
from ibpcore.nn.cnn7 import CNN7, Architecture
from ibpcore.nn.networks import Classifier, Network

ENTRY, FORMAT = "ibpcore", 1


def save_model(model: nn.Module, path: str | Path, **facts: Any) -> None:
    """Writes weights, architecture and `facts` as one safetensors file.

    Args:
        model: made by `ibpcore.cnn7`, or an `ibpcore.nn.networks.Network`.
        path: usually `model.safetensors`.
        facts: JSON values worth keeping, such as how the model was trained.

    Raises:
        UserError: the model is of another kind.
        OSError: the file cannot be written.
    """
    if not isinstance(model, Classifier):
        raise UserError(f"a {type(model).__name__} cannot be saved: make it a Network first")
    write_atomic(Path(path), _content(model, facts))


def _content(model: Classifier, facts: dict[str, Any]) -> bytes:
    entries = {"format": FORMAT, "architecture": model.description(), "facts": facts}
    header = json.dumps(entries)
    tensors: dict[str, Tensor] = {}
    kept: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Of layers that share their weights each has its own in the file.
        shared = tensor.untyped_storage().data_ptr() in kept
        tensors[name] = (tensor.clone() if shared else tensor).contiguous()
        kept.add(tensor.untyped_storage().data_ptr())
    # One entry only: safetensors writes several in an order that changes from run to run.
    return safetensors.torch.save(tensors, {ENTRY: header})


def fingerprint(model: Classifier) -> str:
    """Tells whether two models compute the same: a digest of architecture and weights."""
    return hashlib.sha256(_content(model, {})).hexdigest()


def load_model(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The model in a file of `save_model`, in evaluation mode.

    Raises:
        UserError: there is no such file, or it is not an intact model of ours.
    """
    model = _build(path, _read_header(path, "architecture"))
    try:
        # Taking the tensors over keeps their type, float64 too.
        model.load_state_dict(safetensors.torch.load_file(path), assign=True)
        model.to(memory_format=torch.channels_last)  # as it was made
    except RuntimeError:
        raise UserError(f"{path}: the weights do not fit the architecture beside them") from None
    state = model.state_dict()
    weights = {name: state[name] for name in state if not name.endswith("num_batches_tracked")}
    types = {tensor.dtype for tensor in weights.values()}
    if types not in ({torch.float32}, {torch.float64}):
        raise UserError(f"{path}: the weights are neither all float32 nor all float64")
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds values that are not finite")
    return model.to(device).eval()


BUILDERS: dict[str, Callable[[dict[str, Any]], Classifier]] = {
    "cnn7": lambda facts: CNN7(Architecture.from_dict(facts)),
    "network": Network.from_description,
}


def _build(path: str | Path, architecture: dict[str, Any]) -> Classifier:
    name = architecture.pop("name", None)
    if name not in BUILDERS:
        raise UserError(f"{path} holds an architecture unknown to this version")
    try:
        with torch.device("meta"):  # no memory and no random numbers for what is replaced
            return BUILDERS[name](architecture)
    except REFUSED as error:
        # Numbers that no layer can be made of, or that memory does not suffice for.
        reason = first_line(error)
        raise UserError(f"{path} describes no network that can be built: {reason}") from None


def read_facts(path: str | Path) -> dict[str, Any]:
    """The `facts` that a model was saved with.

    Raises:
        UserError: there is no such file, or it is not an intact model of ours.
    """
    return _read_header(path, "facts")


def _read_header(path: str | Path, entry: str) -> dict[str, Any]:
    """The JSON object called `entry` in the metadata."""
    if not Path(path).is_file():
        raise UserError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not an intact safetensors file: {error}; for a checkpoint of another"
            " program see ibp import"
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
