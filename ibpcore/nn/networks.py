"""Classifiers of interval layers, and their descriptions in model files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore.errors import UserError, first_line
from ibpcore.nn.composition import IntervalSequential
from ibpcore.nn.layers import LAYERS, IntervalLayer, check_supported


class Classifier(IntervalSequential):
    """Base class of all models that can be saved: interval layers from images to logits.

    Attributes:
        in_shape: shape of an input without the batch: channels, height, width of an image.
        classes: number of logits, at least 2.
    """

    in_shape: tuple[int, ...]
    classes: int

    def description(self) -> dict[str, Any]:
        """JSON values from which the same architecture can be built.

        Its entry `name` is a key of `ibpcore.nn.checkpoint.BUILDERS`.
        """
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        """A layer, or for a slice an `IntervalSequential`: a part is not a classifier."""
        parts = list(self)[index]
        return IntervalSequential(*parts) if isinstance(index, slice) else parts


class Network(Classifier):
    """A classifier of any interval layers, such as `convert` and `ibp import` make.

    Args:
        parts: the layers in order, not copied.
        in_shape: shape of an input without the batch, such as (channels, height, width) of an
            image, or (features,).

    Raises:
        UserError: the layers do not map such inputs to logits.
    """

    def __init__(self, parts: Sequence[IntervalLayer], in_shape: Sequence[int]) -> None:
        super().__init__(*parts)
        check_supported(self)
        self.in_shape = input_shape(in_shape)
        self.classes = _classes(self, self.in_shape)
        channels_last(self)

    def description(self) -> dict[str, Any]:
        parts = [described(part) for part in self.layers]
        return {"name": "network", "in_shape": list(self.in_shape), "layers": parts}

    @classmethod
    def from_description(cls, facts: dict[str, Any]) -> Network:
        """The network with this `description`, from which `name` has been removed.

        Raises: see `built`, and the constructor.
        """
        return cls([built(part) for part in facts["layers"]], facts["in_shape"])


def channels_last(model: nn.Module) -> None:
    """Lays out the weights of convolutions so that these are up to four times faster on a CPU.

    Not other tensors of four dimensions, which would be replaced, nor those of five.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)


def input_shape(sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of an input without the batch; raises UserError unless it is one."""
    shape = tuple(sizes)
    if not shape or min(shape) < 1:
        raise UserError(
            f"in_shape must be sizes of at least 1, such as (channels, height, width), got {shape}"
        )
    return shape


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """A context that restores training or evaluation mode of all parts of `module` at its end."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.no_grad()
def _classes(model: nn.Module, in_shape: tuple[int, ...]) -> int:
    """The number of logits that `model` returns for an input of zeros."""
    tensor = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *in_shape, device=tensor.device, dtype=tensor.dtype)
    try:
        with modes_kept(model):
            shape = model.eval()(image).shape
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the layers do not take images {in_shape}: {first_line(error)}") from None
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
        raise UserError(f"for an image the layers give {tuple(shape)}, not logits (1, classes)")
    return int(shape[1])


def described(layer: IntervalLayer) -> dict[str, Any]:
    """JSON values from which `built` makes an equal layer, apart from its weights.

    Raises:
        UserError: the type of the layer does not state its `arguments`.
    """
    name = type(layer).__name__.removeprefix("Interval")
    if LAYERS.get(name) is not type(layer):
        raise UserError(f"a layer of type {type(layer).__name__} cannot be saved")
    values = {name: getattr(layer, name) for name in layer.arguments}
    if "bias" in values:
        values["bias"] = values["bias"] is not None  # what the constructor expects
    return {"layer": name, **{name: _encoded(value) for name, value in values.items()}}


def _encoded(value: Any) -> Any:
    """`value` with descriptions in place of layers, and numbers in place of tensors."""
    if isinstance(value, list):
        return [_encoded(part) for part in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return described(value) if isinstance(value, IntervalLayer) else value


def built(facts: dict[str, Any]) -> IntervalLayer:
    """A newly initialised layer from its description by `described`.

    Raises:
        UserError: no such layer is known.
        Whatever the layer raises for values that do not fit.
    """
    arguments = {name: _decoded(value) for name, value in facts.items()}
    kind = LAYERS.get(arguments.pop("layer"))
    if kind is None or arguments.keys() != set(kind.arguments):
        raise UserError(f"no layer is known that is described by {facts}")
    return kind.of(**arguments)


def _decoded(value: Any) -> Any:
    """`value` with layers in place of descriptions, and tuples in place of lists."""
    if isinstance(value, list):
        return tuple(_decoded(part) for part in value)
    return built(value) if isinstance(value, dict) else value
