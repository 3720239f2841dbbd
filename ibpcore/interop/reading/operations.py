"""A node of a file that is to be read, and what all rules use: layouts and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from ibpcore.errors import UserError
from ibpcore.interop.reading.building import Builder, Signal, Value, check_size, core
from ibpcore.interop.tracing import TRACED_SAMPLES
from ibpcore.interop.translating.site import Sizes
from ibpcore.nn.layers import IntervalLayer


@dataclass(frozen=True, eq=False)
class Operation:
    """A node of a file.

    Attributes:
        builder: where its layers are added.
        place: its name and that of its operator, for messages.
        inputs: the values that it reads; None for one that is left out.
        attributes: numbers, texts, lists of them, and arrays.
        outputs: how many it has.
        batch: the fixed size of the batch in the file.
    """

    builder: Builder
    place: str
    inputs: Sequence[Value | None]
    attributes: dict[str, Any]
    outputs: int
    batch: int

    def input(self, at: int) -> Value | None:
        """The value number `at`, None if it is left out."""
        return self.inputs[at] if at < len(self.inputs) else None

    def signal(self, at: int = 0) -> Signal:
        """An input that depends on that of the network.

        Raises:
            UserError: it does not.
        """
        value = self.input(at)
        if not isinstance(value, Signal):
            raise UserError(f"its input {at} does not depend on the images")
        return value

    def constant(self, at: int, name: str) -> np.ndarray:
        """An input that does not depend on that of the network.

        Raises:
            UserError: it does, or is left out.
        """
        value = self.input(at)
        if isinstance(value, Signal):
            raise UserError(f"its {name} depends on the images")
        if value is None:
            raise UserError(f"it has no {name}")
        return value

    def option(self, name: str, at: int, default: Any = None) -> Any:
        """A setting: an attribute, or the constant input number `at`, which later opsets have."""
        if name in self.attributes:
            return self.attributes[name]
        return default if self.input(at) is None else self.constant(at, name).tolist()

    def tensor(self, constant: np.ndarray) -> Tensor:
        """A constant in the type of the network.

        Raises:
            UserError: it is empty, not finite, or does not hold the same numbers in that type.
        """
        check_size(constant.size)
        wide = np.array(constant, dtype=np.float64)
        tensor = torch.from_numpy(wide).to(self.builder.dtype)
        if not bool(tensor.isfinite().all()):
            raise UserError("a constant is not finite")
        if not torch.equal(tensor.double(), torch.from_numpy(wide)):
            raise UserError("a constant is double, though the network is float, and no float")
        return tensor

    def layer(self, layer: IntervalLayer, x: fx.Node) -> fx.Node:
        """See `Builder.layer`."""
        return self.builder.layer(layer, x, self.place)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """See `Builder.call`."""
        return self.builder.call(function, args, self.place)

    def formed(self, x: Signal, shape: Sequence[int]) -> fx.Node:
        """The numbers of a signal in this shape, without the batch."""
        return self.builder.formed(x.node, shape, self.place)

    def image(self, x: Signal, dims: Sequence[int] = ()) -> fx.Node:
        """A signal as (B, channels, ...), with one of these numbers of dimensions.

        Raises:
            UserError: its first dimension is not that of one image, or there are others.
        """
        if len(x.shape) < 2 or x.shape[0] != 1 or (dims and len(x.shape) not in dims):
            raise UserError(f"it has no interval rule for an input of shape {x.shape}")
        return self.formed(x, core(x.shape))

    def along(self, x: Signal, axes: Sequence[int]) -> tuple[fx.Node, list[int]]:
        """A node for a signal, and which dimensions of its output `axes` of the signal are."""
        places = [axis_of(axis, len(x.shape)) for axis in axes]
        if core(x.shape) == x.shape[1:] and 0 not in places:
            return self.formed(x, core(x.shape)), places
        return self.formed(x, x.shape), [place + 1 for place in places]


Rule: TypeAlias = Callable[[Operation], Value | list[Value]]
"""Adds the layers of a node; returns its outputs. Errors are raised without the node's name."""


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        UserError: there is none.
    """
    if not -rank <= axis < rank:
        raise UserError(f"there is no axis {axis} of {rank}")
    return axis % rank


def broadcast_shape(*shapes: Sizes) -> Sizes:
    """The shape that tensors of these shapes have together.

    Raises:
        UserError: there is none.
    """
    try:
        return tuple(int(size) for size in np.broadcast_shapes(*shapes))
    except ValueError:
        raise UserError(f"shapes {shapes} do not fit each other") from None


def expanded(of: Operation, x: Signal, shape: Sizes) -> Signal:
    """A signal whose numbers are repeated to a shape that it broadcasts to."""
    if math.prod(shape) == math.prod(x.shape):
        return Signal(x.node, shape)
    node = aligned(of, x, shape)
    return Signal(of.call(torch.broadcast_to, node, (TRACED_SAMPLES, *core(shape))), shape)


def aligned(of: Operation, x: Signal, shape: Sizes) -> fx.Node:
    """A signal with the dimensions of `core(shape)`, to which it broadcasts."""
    own = (1,) * (len(shape) - len(x.shape)) + x.shape
    return of.formed(x, own[1:] if core(shape) == shape[1:] else own or (1,))
