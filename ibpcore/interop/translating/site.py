"""A place in a trace that is to be translated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.tracing import Trace, TracedSignal, operation, where
from ibpcore.nn.layers import IntervalLayer

Layers: TypeAlias = list[IntervalLayer]
Sizes: TypeAlias = tuple[int, ...]
Translation: TypeAlias = Callable[..., Layers]
"""A function of a `Site` and either a module, or the arguments of an operation by its names."""

DATA_DEPENDENT = "its statistics depend on the perturbed input, so it is not a fixed affine map"
LOGITS = "a classifier must return logits: leave it out"
REASONS = {
    **dict.fromkeys(("GroupNorm", "group_norm", "LayerNorm", "layer_norm"), DATA_DEPENDENT),
    **dict.fromkeys(("InstanceNorm1d", "InstanceNorm2d", "instance_norm"), DATA_DEPENDENT),
    **dict.fromkeys(("Softmax", "softmax", "LogSoftmax", "log_softmax"), LOGITS),
    "batch_norm": "use nn.BatchNorm1d or nn.BatchNorm2d",
}
UNKNOWN = "no interval rule is known for it"


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the images.

    Attributes:
        shape: its shape where it is used, e.g. after a `view`.
        tensor: the same numbers in any shape; an attribute of the module is kept, not copied.
        transposed: whether it is used as `tensor.T`.
    """

    shape: Sizes
    tensor: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """A node of a trace that is to be translated, and the shapes at it."""

    trace: Trace
    node: fx.Node

    @property
    def shape(self) -> Sizes:
        """Shape of its output, batch included."""
        return cast(TracedSignal, self.trace.values[self.node]).shape

    @property
    def given(self) -> Sizes:
        """Shape of its first input that depends on the images, batch included."""
        return cast(TracedSignal, self.trace.values[self.trace.signals(self.node)[0]]).shape

    @property
    def moves(self) -> bool:
        """Whether its output has another type or device than its first such input."""
        ends = self.trace.signals(self.node)[0], self.node
        before, after = (cast(TracedSignal, self.trace.values[end]) for end in ends)
        return (before.dtype, before.device) != (after.dtype, after.device)

    def unsupported(self, reason: str | None = None) -> UserError:
        """An error that names the node, its place in the module and the reason."""
        module = self.node.op == "call_module"
        name = type(self.trace.module(self.node)).__name__ if module else operation(self.node)
        kind = "layer" if module else "operation"
        return UserError(
            f"unsupported {kind} {where(self.node)}: {reason or REASONS.get(name, UNKNOWN)}"
        )

    def scale(self, given: Sizes, scale: Any = 1.0, shift: Any = 0.0) -> IntervalLayer:
        """The layer scale * x + shift for x of shape `given`; both are numbers or tensors."""
        like = self.trace.like
        how: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        numbers = (
            n if isinstance(n, nn.Parameter) else torch.as_tensor(n, **how) for n in (scale, shift)
        )
        return il.IntervalScale(given[1], *numbers)

    def concatenated(self, parts: list[fx.Node]) -> int:
        """The dimension, at least 1, along which `parts` are concatenated.

        Raises:
            UserError: one part is constant, or it is the dimension of the batch.
        """
        given: dict[str, Any] = dict(zip(("tensors", "dim"), self.node.args, strict=False))
        given |= self.node.kwargs
        if list(given["tensors"]) != parts:
            raise self.unsupported("a part of it does not depend on the images")
        dim = int(given.get("dim", given.get("axis", 0)))
        dim += len(self.shape) * (dim < 0)  # that of the output, for `stack` too
        if dim == 0:
            raise self.unsupported("it mixes the images of a batch")
        return dim

    def arguments(self) -> tuple[Any, Any]:
        """Its arguments and keyword arguments: a `TracedSignal`, a `Constant` or another value."""
        return cast(tuple[Any, Any], fx.map_arg((self.node.args, self.node.kwargs), self._resolved))

    def _resolved(self, node: fx.Node) -> Any:
        value = self.trace.values[node]
        if not isinstance(value, Tensor):
            return value
        source = node
        while source.op == "call_method" and source.target in ("view", "reshape", "unsqueeze"):
            source = cast(fx.Node, source.args[0])
        if source.op == "get_attr":
            return Constant(tuple(value.shape), cast(Tensor, self.trace.values[source]))
        source = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else node
        stored = self.trace.values[source]
        if source.op == "get_attr" and stored.dim() == value.dim() == 2:
            turned = stored.T
            if (turned.data_ptr(), turned.stride()) == (value.data_ptr(), value.stride()):
                return Constant(tuple(value.shape), stored, transposed=True)
        if any(isinstance(self.trace.values[other], nn.Parameter) for other in _ancestors(node)):
            raise self.unsupported("one of its constants is computed from parameters")
        return Constant(tuple(value.shape), value)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found = {node}
    return found.union(*(_ancestors(other) for other in node.all_input_nodes))


def twin(kind: type[IntervalLayer], module: nn.Module) -> IntervalLayer:
    """A layer of that kind that shares all attributes with `module`, its `torch.nn` twin."""
    layer = kind.__new__(kind)
    # They share the dictionary of parameters: to replace a parameter replaces it in both.
    vars(layer).update(vars(module))
    return layer
