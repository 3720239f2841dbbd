"""A place in a trace that is to be translated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

from torch import Tensor, fx, nn

from ibpcore.errors import UserError
from ibpcore.interop.tracing import PLACE, Trace, TracedSignal, operation, where
from ibpcore.nn.affine import complete_sizes
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Tie, weight_like

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


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the images.

    Attributes:
        node: the node that computes it from tensors of the module.
        value: its numbers where it is used, in that shape.
        form: gives the value of the node the shape of `value`.
        any_shape: whether only the order of its numbers matters where it is used.
    """

    node: fx.Node
    value: Tensor
    form: Callable[[Tensor], Tensor] = lambda value: value
    any_shape: bool = False

    def formed(self, form: Callable[[Tensor], Tensor]) -> Constant:
        """The constant in another shape."""
        return Constant(self.node, form(self.value), lambda value: form(self.form(value)))


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
        unsupported = "" if PLACE in self.node.meta else f"unsupported {kind} "
        why = reason or REASONS.get(name, UNKNOWN)
        return UserError(f"{unsupported}{where(self.node)}: {why}")

    def tied(self, layer: IntervalLayer, **constants: Constant) -> IntervalLayer:
        """`layer` with `constants` in place of its tensors of these names, which it follows.

        A tensor of the module that holds the same numbers in the same order is used itself, in
        its own shape, so that training reaches it.

        Raises:
            UserError: one is computed from parameters, which training would not reach.
        """
        for name, constant in constants.items():
            owner = self.trace.owner(constant.node, constant.value)
            shape = None if owner is None else self.trace.values[owner].shape
            if owner is not None and (constant.any_shape or shape == constant.value.shape):
                current = partial(self.trace.now, owner)
            elif self.trace.is_trained(constant.node):
                raise self.unsupported(f"its {name} is computed from parameters that are trained")
            else:
                current = partial(_computed, self.trace, constant)
            tensor = current()
            if not self.trace.is_registered(constant.node):
                current = partial(_beside, self.trace, current)
            if name in layer._parameters and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(layer, name, tensor)
            self.trace.ties.append(Tie(layer, name, current))
        return layer

    def numbered(self, layer: IntervalLayer, **numbers: float) -> IntervalLayer:
        """`layer` with these numbers as its buffers, in the type that the module has."""
        for name, number in numbers.items():
            current = partial(_number, self.trace, layer, name, number)
            self.trace.ties.append(Tie(layer, name, current))
        return layer

    def fixed(self, constant: Constant) -> Tensor:
        """The numbers of a constant that the layers will not follow: it must not change."""
        self.trace.fixed[constant.node] = self.trace.now(constant.node).clone()
        return constant.value

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
        return Constant(node, value) if isinstance(value, Tensor) else value


def _computed(trace: Trace, constant: Constant) -> Tensor:
    return constant.form(trace.now(constant.node))


def _number(trace: Trace, layer: IntervalLayer, name: str, number: float) -> Tensor:
    before, like = getattr(layer, name), weight_like(trace.root)
    same = (before.dtype, before.device) == (like.dtype, like.device)
    return cast(Tensor, before) if same else like.new_tensor(number)


def _beside(trace: Trace, current: Callable[[], Tensor]) -> Tensor:
    """A tensor that is not registered in its module, so that it does not move with the module."""
    return current().to(weight_like(trace.root))


def twin(kind: type[IntervalLayer], module: nn.Module) -> IntervalLayer:
    """A layer of that kind that shares all attributes with `module`, its `torch.nn` twin."""
    layer = kind.__new__(kind)
    # They share the dictionary of parameters: to replace a parameter replaces it in both.
    vars(layer).update(vars(module))
    if isinstance(layer, nn.modules.conv._ConvNd):
        complete_sizes(layer)
    return layer
