"""ONNX files: from bytes to a model whose form is checked, and its tensors as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibpcore.errors import UserError, first_line
from ibpcore.interop.exporting.onnx_graph import package
from ibpcore.io.compressed import unpacked

OLDEST = 7
"""Opset, from which on operators broadcast as NumPy does."""
DOMAINS = ("", "ai.onnx")
"""Names of the set of ONNX's own operators."""
HALVES = ("float16", "bfloat16")
"""Types that float32 holds exactly."""


class Port(NamedTuple):
    """The input or the output of a network.

    Attributes:
        shape: None for a size that is not fixed.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]


class File(NamedTuple):
    """The content of a file.

    Attributes:
        model: the `ModelProto`.
        opset: the version of its operators.
        constants: its initialisers, as `array_of` gives them.
    """

    model: Any
    opset: int
    constants: dict[str, np.ndarray]
    input: Port
    output: Port


def read_file(path: Path) -> File:
    """The content of an ONNX file, which may be compressed by gzip.

    Weights in other files are read if these are in the same folder or below it.

    Raises:
        UserError: the file is missing, damaged or no ONNX file, ONNX does not accept it, it has
            several inputs or outputs, or the package onnx is missing.
        OSError: it cannot be read.
    """
    onnx = package("onnx")
    content = unpacked(path)
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # of protobuf, whose errors have no base class of their own
        raise UserError("it is no ONNX file, or damaged") from None
    graph = model.graph
    if not graph.node or not graph.output:
        raise UserError("it is no ONNX file, or damaged: it holds no network")
    versions = [entry.version for entry in model.opset_import if entry.domain in DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not OLDEST <= versions[0] <= newest:
        raise UserError(f"its operators are of opset {versions}, not of one in {OLDEST}-{newest}")
    for tensor in graph.initializer:
        _load(onnx, tensor, path.parent)
    constants = {tensor.name: array_of(onnx, tensor) for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in constants]
    return File(model, versions[0], constants, _port(given, "input"), _port(graph.output, "output"))


def check_file(file: File) -> None:
    """Raises UserError unless ONNX accepts the network."""
    for value in file.model.graph.output:
        # Some programs leave the shape out, which only this check minds.
        value.type.tensor_type.shape.SetInParent()
    try:
        package("onnx").checker.check_model(file.model)
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"ONNX does not accept it: {first_line(error)}") from None


def _load(onnx: Any, tensor: Any, folder: Path) -> None:
    """Reads the numbers of a tensor that lie in another file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    facts = {entry.key: entry.value for entry in tensor.external_data}
    path, inside = (folder / facts.get("location", "")).resolve(), folder.resolve()
    if not path.is_relative_to(inside) or not path.is_file():
        raise UserError(
            f"the weights {tensor.name!r} lie in {facts.get('location')!r}, which is no file in"
            " its folder"
        )
    try:
        start, length = (int(facts.get(key, 0)) for key in ("offset", "length"))
    except ValueError:
        start = length = -1
    size = path.stat().st_size
    length = length or size - start
    if start < 0 or length < 0 or start + length > size:
        raise UserError(f"the weights {tensor.name!r} are not in {path.name}, which ends before")
    with path.open("rb") as stream:
        stream.seek(start)
        tensor.raw_data = stream.read(length)
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def array_of(onnx: Any, tensor: Any) -> np.ndarray:
    """The numbers of a `TensorProto`; those of half precision as float32, which is exact.

    Raises:
        UserError: they do not fit its shape.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f"the tensor {tensor.name!r} within a node lies in another file")
    try:
        return widened(onnx.numpy_helper.to_array(tensor))
    except Exception as error:  # of any type, since a file may hold anything
        raise UserError(f"the tensor {tensor.name!r} is damaged: {first_line(error)}") from None


def widened(array: Any) -> np.ndarray:
    """`array` with half precision numbers as float32."""
    found = np.asarray(array)
    return found.astype(np.float32) if found.dtype.name in HALVES else found


def _port(values: Sequence[Any], kind: str) -> Port:
    """The only one of the inputs or outputs.

    Raises:
        UserError: there are none or several.
    """
    if len(values) != 1:
        names = ", ".join(repr(value.name) for value in values[:5]) or "none"
        raise UserError(f"it has {len(values)} {kind}s ({names}), not one")
    (value,) = values
    if not value.type.HasField("tensor_type"):
        raise UserError(f"its {kind} {value.name!r} is no tensor")
    tensor = value.type.tensor_type
    onnx = package("onnx")
    known = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    return Port(value.name, known, shape)
