"""Nodes whose inputs are constants: their values, without rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ibpcore.errors import UserError, first_line
from ibpcore.interop.exporting.onnx_graph import package
from ibpcore.interop.reading.building import MOST_VALUES
from ibpcore.interop.reading.files import widened

MOVES = (
    *("Abs", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape"),
    *("DepthToSpace", "Expand", "Flatten", "Floor", "Gather", "GatherElements"),
    *("GatherND", "Identity", "Max", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu"),
    *("Reshape", "Round", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze", "Where"),
)
"""Operators that round no number, apart from casts, which ONNX defines to do so."""
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
"""Operators whose results may be rounded, which is noticed."""
COUNTING = (
    *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod"),
    *("NonZero", "Not", "Or", "Range", "ReduceProd", "ReduceSum", "Sum", "Xor"),
)
"""Operators that are computed for whole numbers and truth values only."""
FOLDED = frozenset({*MOVES, *ARITHMETIC, *COUNTING})


def folded(node: Any, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray]:
    """The outputs of a `NodeProto`, by the reference implementation of ONNX.

    Raises:
        UserError: they are not computed, or would be rounded.
    """
    if node.op_type not in FOLDED:
        raise UserError("its inputs are constants, of which it would compute others")
    if node.op_type in ("ConstantOfShape", "Expand", "Tile"):
        _check_size(node.op_type, inputs)
    found = _computed(node, inputs, opset)
    for output in found:
        if output.dtype.kind != "f" or node.op_type in MOVES:
            continue
        if node.op_type not in ARITHMETIC:
            raise UserError("it computes constants, which would be rounded")
        a, b = (np.asarray(array) for array in inputs)
        exact(node.op_type, a, b)
    return found


def _computed(node: Any, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray]:
    helper = package("onnx").helper
    reference: Any = package("onnx.reference").ReferenceEvaluator
    given = {name: a for name, a in zip(node.input, inputs, strict=True) if a is not None}
    ports = [
        [helper.make_value_info(name, helper.make_tensor_type_proto(1, None)) for name in names]
        for names in (given, filter(None, node.output))
    ]
    graph = helper.make_graph([node], "constants", *ports)
    try:
        with np.errstate(all="ignore"):
            found = reference(graph, opsets={"": opset}).run(None, given)
    except Exception as error:  # of any type, since a file may hold anything
        raise UserError(first_line(error)) from None
    return [widened(output) for output in found]


def _check_size(kind: str, inputs: Sequence[np.ndarray | None]) -> None:
    last = np.asarray(inputs[-1], dtype=np.float64)
    size = 1 if kind == "ConstantOfShape" else np.asarray(inputs[0]).size
    if np.maximum(last, 1).prod() * size > MOST_VALUES:
        raise UserError(f"it would have more than {MOST_VALUES} numbers")


def exact(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum, difference, product or quotient of constants, float32 or float64.

    Raises:
        UserError: it would be rounded.
    """
    dtype = np.result_type(a, b)
    operation: Any = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
    with np.errstate(all="ignore"):
        found = np.asarray(operation[kind](a, b), dtype=dtype)
        # With 64 bits in place of 24 the check itself is exact for products, and by the error of
        # Knuth's sum for sums.
        x, y, z = (np.asarray(array, dtype=np.float64) for array in (a, b, found))
        if kind == "Mul":
            same = z == x * y
        elif kind == "Div":
            same = z * y == x
        else:
            same = _sum_is(x, y if kind == "Add" else -y, z)
    if dtype == np.float64 and not _is_simple(kind, x, y):
        same = np.asarray(False)
    if not np.all(same):
        raise UserError("it computes constants, which would be rounded")
    return found


def _sum_is(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    return np.asarray((z == total) & (error == 0))


def _is_simple(kind: str, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether doubles hold so few digits that products of them are exact."""
    few = [bool((array == array.astype(np.float32)).all()) for array in (x, y)]
    return kind in ("Add", "Sub") or all(few)
