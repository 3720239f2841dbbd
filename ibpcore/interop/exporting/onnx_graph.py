"""An ONNX graph while it is being written: its nodes and constants, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from ibpcore.errors import UserError


class Value(NamedTuple):
    """What a node reads.

    Attributes:
        name: in the graph.
        example: such a tensor of a single image.
    """

    name: str
    example: Tensor


class Graph:
    """Nodes and constants, as they are added.

    Args:
        model: its modules give constants their names.

    Raises:
        UserError: the package onnx is missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.onnx = package("onnx")
        self.places = {module: place for place, module in model.named_modules()}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, layer: nn.Module, name: str, value: Tensor) -> str:
        """Enters `value` as that of a layer, once however often it is used; its name."""
        name = f"{self.places[layer]}.{name}"
        array = value.detach().cpu().contiguous().numpy()
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds an operation on values of these names; the name of its result."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name


def package(name: str) -> Any:
    """A package of the extra `export`.

    Raises:
        UserError: it is missing.
    """
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name} is needed: pip install 'ibpcore[export]'") from None
