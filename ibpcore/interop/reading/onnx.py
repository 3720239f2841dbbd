"""ONNX files, read straight into interval layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.interop.assembly import Assembly
from ibpcore.interop.exporting.onnx_graph import package
from ibpcore.interop.reading import activations, affine, arithmetic, pooling, rearrangements
from ibpcore.interop.reading.building import Builder, Signal, Value, core
from ibpcore.interop.reading.files import DOMAINS, File, Port, array_of, check_file, read_file
from ibpcore.interop.reading.folding import FOLDED, folded
from ibpcore.interop.reading.merging import merged
from ibpcore.interop.reading.operations import Operation, Rule
from ibpcore.interop.rewriting import rewritten
from ibpcore.interop.translating.site import Layers, Sizes
from ibpcore.nn.networks import Network

KINDS = (activations, affine, arithmetic, pooling, rearrangements)
RULES: dict[str, Rule] = {kind: rule for part in KINDS for kind, rule in part.RULES.items()}
"""By the name of the operator."""
TYPES = {
    "float": torch.float32,
    "float16": torch.float32,
    "bfloat16": torch.float32,
    "double": torch.float64,
}
"""Types of the network, by that of the input."""


def from_onnx(path: str | Path) -> Network:
    """The network of an ONNX file in interval layers, in evaluation mode.

    Returns:
        a network whose `in_shape` is the shape of an input without the batch.

    Raises:
        UserError: the file is damaged, an operator has no interval rule (the message names the
            node), or the package onnx is missing.
        OSError: the file cannot be read.
    """
    try:
        layers, shape = _read(read_file(Path(path)))
        return Network(layers, shape).eval()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(file: File) -> tuple[Layers, Sizes]:
    """The layers of a file, and the shape of an input without the batch."""
    nodes = _needed(file)
    for node in nodes:
        kind = node.op_type
        if node.domain not in DOMAINS or kind not in {*RULES, *FOLDED, "Constant"}:
            raise UserError(f"node {_name(node)!r}: no interval rule for {kind}")
    check_file(file)
    if file.input.type not in TYPES:
        raise UserError(f"its input is {file.input.type}, not float")
    shape, batch = _one_input(file.input, file.output)
    builder = Builder(core(shape), TYPES[file.input.type])
    values: dict[str, Value] = {**file.constants, file.input.name: Signal(builder.images, shape)}
    for node in nodes:
        reader = _Reader(builder, file.opset, batch, values)
        values.update(zip(node.output, reader.outputs(node), strict=False))
    logits = values.get(file.output.name)
    if not isinstance(logits, Signal):
        raise UserError("its output does not depend on its input")
    flat = builder.formed(logits.node, (math.prod(logits.shape),), "its output")
    trace = merged(rewritten(builder.trace(flat)))
    return Assembly(trace).whole(), core(shape)


def _needed(file: File) -> list[Any]:
    """The nodes on which the output depends, in their order."""
    wanted, found = {file.output.name}, []
    for node in reversed(file.model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(node)
    return found[::-1]


def _name(node: Any) -> str:
    """Of a node, or else of its output."""
    return str(node.name or next(filter(None, node.output), ""))


def _one_input(port: Port, output: Port) -> tuple[Sizes, int]:
    """The shape of one input, with a 1 for the batch, and the size of the batch in the file.

    A first size of 1, or one that is not fixed, or one that the output has too, is that of a
    batch. Otherwise there is no batch.

    Raises:
        UserError: another size is not fixed, or there is none.
    """
    shape = port.shape
    batch = 1
    if len(shape) > 1:
        first = shape[0] or 1
        same = len(output.shape) > 1 and output.shape[0] == first
        batch, shape = (first, (1, *shape[1:])) if same else (1, (first, *shape[1:]))
    sizes = tuple(size for size in shape if size is not None)
    if not sizes or len(sizes) < len(shape):
        shown = " x ".join("?" if size is None else str(size) for size in shape)
        raise UserError(
            f"its input {port.name!r} has shape {shown or '?'}: all sizes but that of the batch"
            " must be fixed"
        )
    return sizes, batch


@dataclass(frozen=True)
class _Reader:
    """Reads nodes one by one.

    Attributes:
        values: what names stand for, of all nodes before.
    """

    builder: Builder
    opset: int
    batch: int
    values: Mapping[str, Value]

    def outputs(self, node: Any) -> list[Value]:
        """The values of the outputs of a node.

        Raises:
            UserError: they cannot be read; the message names the node.
        """
        place = f"node {_name(node)!r} ({node.op_type})"
        try:
            inputs = [self.values[name] if name else None for name in node.input]
        except KeyError as error:
            raise UserError(f"{place}: it reads {error}, which no node computes") from None
        try:
            attributes = {entry.name: _attribute(entry) for entry in node.attribute}
            if node.op_type == "Constant":
                return [_constant(attributes)]
            constants = [value for value in inputs if not isinstance(value, Signal)]
            if len(constants) == len(inputs):
                return [*folded(node, constants, self.opset)]
            settings = attributes, len(node.output), self.batch
            found = RULES[node.op_type](Operation(self.builder, place, inputs, *settings))
        except (*REFUSED, MemoryError) as error:
            raise UserError(f"{place}: {first_line(error)}") from None
        return found if isinstance(found, list) else [found]


def _attribute(entry: Any) -> Any:
    """The value of an attribute: a number, a text, an array, or a list."""
    onnx = package("onnx")
    value = onnx.helper.get_attribute_value(entry)
    if isinstance(value, onnx.TensorProto):
        return array_of(onnx, value)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _constant(attributes: dict[str, Any]) -> np.ndarray:
    """The value of a node that holds a constant."""
    ((name, value),) = attributes.items()
    kinds = {"value_int": np.int64, "value_ints": np.int64}
    floats = {"value_float": np.float32, "value_floats": np.float32}
    if name == "value":
        return np.asarray(value)
    if name not in kinds | floats:
        raise UserError(f"a constant given as {name} cannot be read")
    return np.asarray(value, dtype=(kinds | floats)[name])
