"""The graph of interval layers that is built from the nodes of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ibpcore.errors import UserError
from ibpcore.interop.tracing import PLACE, TRACED_SAMPLES, Trace, TracedSignal
from ibpcore.interop.translating.site import Sizes
from ibpcore.nn.layers import IntervalLayer

MOST_VALUES = 2**26
"""Numbers of a tensor that a node may compute for an input, or of a constant."""


@dataclass(frozen=True, eq=False)
class Signal:
    """A tensor that depends on the input.

    Attributes:
        node: its output (B, ...) holds the numbers for each of B inputs, in their order.
        shape: of the tensor in the file, for one input.
    """

    node: fx.Node
    shape: Sizes


Value: TypeAlias = Signal | np.ndarray
"""What a name in a file stands for: a tensor that depends on the input, or a constant."""


def core(shape: Sizes) -> Sizes:
    """The usual shape, without the batch, for the numbers of a tensor of one input.

    A first dimension of size 1 is taken for that of the batch.
    """
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape or (1,)


def check_size(numbers: int) -> None:
    """Raises UserError if a tensor of so many numbers is empty, or too large for a memory."""
    if not 1 <= numbers <= MOST_VALUES:
        raise UserError(f"a tensor has {numbers} numbers, not between 1 and {MOST_VALUES}")


class Builder:
    """Collects nodes, and computes the shapes of their outputs without any numbers.

    Args:
        shape: of an input, without the batch.
        dtype: of all numbers, float32 or float64.
    """

    def __init__(self, shape: Sizes, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.examples: dict[fx.Node, Tensor] = {}
        check_size(math.prod(shape))
        images = torch.empty(TRACED_SAMPLES, *shape, dtype=dtype, device="meta")
        self.images = self._added(self.graph.placeholder("images"), images, "the input")

    def layer(self, layer: IntervalLayer, x: fx.Node, place: str) -> fx.Node:
        """A node that applies a layer, in evaluation mode."""
        name = str(len(self.examples))
        self.root.add_module(name, layer.eval())
        state = {key: tensor.to("meta") for key, tensor in layer.state_dict().items()}
        output = functional_call(layer, state, (self.examples[x],))
        return self._added(self.graph.call_module(name, (x,)), output, place)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], place: str) -> fx.Node:
        """A node that calls a function that `ibpcore.interop` translates, with these arguments."""
        given = fx.map_arg(args, lambda node: self.examples[node])
        node = self.graph.call_function(function, args)
        return self._added(node, function(*given), place)

    def _added(self, node: fx.Node, output: Tensor, place: str) -> fx.Node:
        check_size(output.numel() // TRACED_SAMPLES)
        node.meta[PLACE] = place
        self.examples[node] = output
        return node

    def shape(self, node: fx.Node) -> Sizes:
        """Shape of the output of a node, without the batch."""
        return tuple(self.examples[node].shape[1:])

    def formed(self, x: fx.Node, shape: Sequence[int], place: str) -> fx.Node:
        """A node with the numbers of `x` in this shape, `x` itself if it has it."""
        if self.shape(x) == tuple(shape):
            return x
        return self.call(torch.reshape, (x, (TRACED_SAMPLES, *shape)), place)

    def trace(self, logits: fx.Node) -> Trace:
        """All nodes, of which this one returns the logits."""
        output = self.graph.output(logits)
        self.examples[output] = self.examples[logits]
        values = {
            node: TracedSignal(tuple(example.shape), example.dtype, example.device)
            for node, example in self.examples.items()
        }
        return Trace(self.root, values, output, torch.empty(0, dtype=self.dtype), ())
