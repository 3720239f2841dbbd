"""An ONNX graph under construction: nodes, constants and their names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from ibpcore.errors import UserError


class Value(NamedTuple):
    """Name of an input or output of a node, and its value for one image of zeros, (1, ...)."""

    name: str
    example: Tensor


class Graph:
    """Collects nodes and constants, which are named after the places of the modules in `model`.

    Raises: see `package`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.onnx = package("onnx")
        self.places = {module: place for place, module in model.named_modules()}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, layer: nn.Module, name: str, value: Tensor) -> str:
        """Adds a constant of a layer, only once if called again; returns its name."""
        name = f"{self.places[layer]}.{name}"
        array = value.detach().cpu().contiguous().numpy()
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds an operation on inputs with these names; returns the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name


def package(name: str) -> Any:
    """Imports a package of the extra `export`.

    Raises:
        UserError: it is missing.
    """
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name} is needed: pip install 'ibpcore[export]'") from None
