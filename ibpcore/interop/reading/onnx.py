"""ONNX files, read straight into interval layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.interop.assembly import Assembly
from ibpcore.interop.exporting.onnx_graph import package
from ibpcore.interop.reading import (
    activations,
    affine,
    arithmetic,
    pooling,
    rearrangements,
    resizing,
)
from ibpcore.interop.reading.building import Builder, Signal, Value, core
from ibpcore.interop.reading.files import DOMAINS, File, Port, array_of, check_file, read_file
from ibpcore.interop.reading.folding import FOLDED, folded
from ibpcore.interop.reading.merging import merged
from ibpcore.interop.reading.operations import Operation, Rule
from ibpcore.interop.rewriting import rewritten
from ibpcore.interop.translating.site import Layers, Sizes
from ibpcore.io.files import as_path
from ibpcore.nn import IntervalPermute
from ibpcore.nn.networks import Network, check_in_shape

KINDS = (activations, affine, arithmetic, pooling, rearrangements, resizing)
RULES: dict[str, Rule] = {kind: rule for part in KINDS for kind, rule in part.RULES.items()}
"""By the name of the operator."""
TYPES = {
    "float": torch.float32,
    "float16": torch.float32,
    "bfloat16": torch.float32,
    "double": torch.float64,
}
"""Types of the network, by that of the input."""
CONSTANTS = {
    **{"value": None, "value_float": np.float32, "value_floats": np.float32},
    **{"value_int": np.int64, "value_ints": np.int64},
}
"""Types of constants that nodes hold, by the name of the attribute; that of a tensor is its own."""


def from_onnx(path: str | Path, in_shape: Sequence[int] | None = None) -> Network:
    """The network of an ONNX file in interval layers, in evaluation mode.

    It computes over the reals what the file defines. Weights, and numbers such as slopes, are
    those of the file, float32 or float64; half precision becomes float32, which is exact, and
    casts between floats of what depends on the input are left out. A file is refused if
    constants would have to be rounded to write it in layers, such as `beta * C` of a `Gemm`. One
    exception: GELU that is written out has a root of 2 or of 2 / pi rounded to float32, and is
    read as GELU.

    The network is that for one image: a first dimension of 1, or one that is not fixed, or that
    the output has too, is the batch. Otherwise there is no batch.

    Args:
        path: the file; its weights may lie in other files in its folder or below.
        in_shape: the shape of an input without the batch, if it is not that of the file: images
            (channels, height, width) for a network that takes flat ones, or (height, width,
            channels).

    Returns:
        a network whose `in_shape` is `in_shape`, or the shape in the file without the batch. Its
        logits are the numbers of the output in their order.

    Raises:
        UserError: the file is damaged, an operator has no interval rule (the message names the
            node), the output has less than two numbers, the file or the package onnx is missing.
        OSError: the file exists but cannot be read.
    """
    file = as_path(path, "an ONNX file")
    try:
        return Network(*layers_of(file, in_shape)).eval()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def layers_of(path: Path, in_shape: Sequence[int] | None = None) -> tuple[Layers, Sizes]:
    """The layers of a file, of which the output may be a single number, and `in_shape`.

    See `from_onnx`, whose errors do not have the path here.
    """
    file = read_file(path)
    nodes = _needed(file)
    for node in nodes:
        if node.domain not in DOMAINS or node.op_type not in {*RULES, *FOLDED, "Constant"}:
            raise UserError(f"node {_name(node)!r}: no interval rule for {node.op_type}")
    check_file(file)
    if file.input.type not in TYPES:
        raise UserError(f"its input is {file.input.type}, not float")
    shape, batch = _one_input(file.input, file.output)
    given = core(shape) if in_shape is None else check_in_shape(in_shape)
    builder = Builder(given, TYPES[file.input.type])
    values: dict[str, Value] = {**file.constants, file.input.name: _images(builder, shape)}
    reader = _Reader(builder, file.opset, batch, values)
    for node in nodes:
        reader.read(node)
    trace = builder.trace(_logits(builder, values.get(file.output.name), batch))
    try:
        return Assembly(merged(rewritten(trace))).whole(), given
    except RecursionError:
        raise UserError("its branches are nested too deeply") from None


def _logits(builder: Builder, value: Value | None, batch: int) -> fx.Node:
    """The output of the file as (B, classes).

    Raises:
        UserError: it does not depend on the input, or not on one image of a batch alone.
    """
    if not isinstance(value, Signal):
        raise UserError("its output does not depend on its input")
    if batch > 1 and value.shape[:1] != (1,):
        raise UserError(f"it mixes the images of its batch of {batch}")
    return builder.formed(value.node, (math.prod(value.shape),), "its output")


def _images(builder: Builder, shape: Sizes) -> Signal:
    """The input of the file, of this shape, from that of the network.

    Raises:
        UserError: one does not fit the other, or the order of the numbers is not certain.
    """
    given = builder.shape(builder.images)
    if core(shape) == given:
        return Signal(builder.images, shape)
    if len(given) == 3 and core(shape) == (*given[1:], given[0]):
        turned = builder.layer(IntervalPermute((0, 2, 3, 1)), builder.images, "its input")
        return Signal(turned, shape)
    if math.prod(shape) != math.prod(given) or sum(size > 1 for size in shape) > 1:
        raise UserError(f"it takes inputs of shape {core(shape)}, which cannot be {given}")
    return Signal(builder.images, shape)


def _needed(file: File) -> list[Any]:
    """The nodes on which the output depends, in their order."""
    wanted, found = {file.output.name}, []
    for node in reversed(file.model.graph.node):
        if wanted & set(node.output):
            wanted |= {name for name in node.input if name}
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
        builder: where their layers are added.
        opset: the version of their operators.
        batch: the fixed size of the batch in the file.
        values: what names stand for, to which nodes that are read add their outputs.
    """

    builder: Builder
    opset: int
    batch: int
    values: dict[str, Value]

    def read(self, node: Any) -> None:
        """Reads a node.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        place = f"node {_name(node)!r} ({node.op_type})"
        try:
            inputs = [self.values[name] if name else None for name in node.input]
        except KeyError as error:
            raise UserError(f"{place}: it reads {error}, which no node computes") from None
        try:
            found = self._outputs(node, inputs, place)
        except (*REFUSED, MemoryError) as error:
            raise UserError(f"{place}: {first_line(error)}") from None
        # Outputs beyond those of a rule, such as the indices of a maximum, cannot be read.
        self.values.update(zip(node.output, found, strict=False))

    def _outputs(self, node: Any, inputs: list[Value | None], place: str) -> list[Value]:
        """The values of the outputs of a node with these inputs."""
        attributes = {entry.name: _attribute(entry) for entry in node.attribute}
        if node.op_type == "Constant":
            return [_constant(attributes)]
        constants = [value for value in inputs if not isinstance(value, Signal)]
        if len(constants) == len(inputs):
            return [*folded(node, constants, self.opset)]
        if node.op_type not in RULES:
            raise UserError("it has an interval rule only for constants")
        settings = attributes, len(node.output), self.batch
        found = RULES[node.op_type](Operation(self.builder, place, inputs, *settings))
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
    if name not in CONSTANTS:
        raise UserError(f"a constant given as {name} cannot be read")
    return np.asarray(value, dtype=CONSTANTS[name])
