"""Classifiers that can be saved: interval layers, described so that they can be built again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibpcore.errors import UserError, first_line
from ibpcore.nn import layers
from ibpcore.nn.layers import IntervalConcat, IntervalLayer, IntervalResidual, IntervalSequential


class Classifier(IntervalSequential):
    """Interval layers from images to logits, which know what they take and give.

    Attributes:
        in_shape: channels, height, width of an image.
        classes: number of logits, at least 2.
    """

    in_shape: tuple[int, int, int]
    classes: int

    def description(self) -> dict[str, Any]:
        """JSON values that the same network can be built of; `name` says by what."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        """A layer; a slice is an `IntervalSequential`, since no part of a classifier is one."""
        parts = list(self)[index]
        return IntervalSequential(*parts) if isinstance(index, slice) else parts


class Network(Classifier):
    """A classifier of any interval layers.

    Args:
        parts: the layers, in order; they are not copied.
        in_shape: channels, height, width of an image.

    Raises:
        UserError: the layers do not make logits of such images.
    """

    def __init__(self, parts: Sequence[IntervalLayer], in_shape: Sequence[int]) -> None:
        super().__init__(*parts)
        layers.check_supported(self)
        if len(in_shape) != 3 or min(in_shape) < 1:
            raise UserError(f"in_shape must be (channels, height, width), got {tuple(in_shape)}")
        self.in_shape = cast(tuple[int, int, int], tuple(in_shape))
        self.classes = _classes(self, self.in_shape)
        # Convolutions follow the layout of their weights: up to four times faster on a CPU.
        self.to(memory_format=torch.channels_last)

    def description(self) -> dict[str, Any]:
        parts = [described(cast(IntervalLayer, part)) for part in self]
        return {"name": "network", "in_shape": list(self.in_shape), "layers": parts}

    @classmethod
    def from_description(cls, facts: dict[str, Any]) -> Network:
        """From what `description` gave, without its name.

        Raises:
            UserError: a layer is unknown, or the layers do not fit each other.
            Whatever layers raise of values that they cannot be made of.
        """
        return cls([built(part) for part in facts["layers"]], facts["in_shape"])


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards all parts of the module are in training or evaluation as they were before."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.no_grad()
def _classes(model: nn.Module, in_shape: tuple[int, int, int]) -> int:
    """Logits that `model` makes of an image, found by trying."""
    tensor = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *in_shape, device=tensor.device, dtype=tensor.dtype)
    try:
        with modes_kept(model):
            shape = model.eval()(image).shape
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the layers do not take images {in_shape}: {first_line(error)}") from None
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
        raise UserError(f"the layers make {tuple(shape)} of an image, not logits (1, classes)")
    return int(shape[1])


def _has_bias(layer: Any) -> bool:
    return layer.bias is not None


def _numbers(name: str) -> Callable[[Any], list[float]]:
    return lambda layer: cast(Tensor, getattr(layer, name)).tolist()


ARGUMENTS: dict[str, dict[str, Callable[[Any], Any] | None]] = {
    "Conv2d": {
        "in_channels": None,
        "out_channels": None,
        "kernel_size": None,
        "stride": None,
        "padding": None,
        "dilation": None,
        "groups": None,
        "bias": _has_bias,
        "padding_mode": None,
    },
    "Linear": {"in_features": None, "out_features": None, "bias": _has_bias},
    "BatchNorm": {
        "num_features": None,
        "eps": None,
        "momentum": None,
        "affine": None,
        "track_running_stats": None,
    },
    "Normalize": {"mean": _numbers("mean"), "std": _numbers("std")},
    "Scale": {"channels": None, "scale": _numbers("scale"), "shift": _numbers("shift")},
    "ReLU": {},
    "LeakyReLU": {"negative_slope": None},
    "Sigmoid": {},
    "Tanh": {},
    "Flatten": {"start_dim": None, "end_dim": None},
    "Reshape": {"shape": None},
    "Permute": {"dims": None},
    "ZeroPad": {"padding": None},
    "Slice": {"ranges": None},
    "Upsample": {"factors": None},
    "AvgPool2d": {
        "kernel_size": None,
        "stride": None,
        "padding": None,
        "ceil_mode": None,
        "count_include_pad": None,
        "divisor_override": None,
    },
    "MaxPool2d": {
        "kernel_size": None,
        "stride": None,
        "padding": None,
        "dilation": None,
        "ceil_mode": None,
    },
    "Dropout": {"p": None},
}
"""Kinds of layers, named without `Interval`: arguments, and how to read them off a layer;
None for an attribute of the same name."""


def described(layer: IntervalLayer) -> dict[str, Any]:
    """JSON values that `built` makes such a layer of, its weights apart.

    Raises:
        UserError: the layer is not one of `ibpcore.nn.layers`.
    """
    if type(layer) is IntervalSequential:
        parts = [described(cast(IntervalLayer, part)) for part in layer]
        return {"layer": "Sequential", "layers": parts}
    if type(layer) is IntervalResidual:
        return {
            "layer": "Residual",
            "branch": described(layer.branch),
            "shortcut": described(layer.shortcut),
        }
    if type(layer) is IntervalConcat:
        parts = [described(branch) for branch in layer.branches]
        return {"layer": "Concat", "branches": parts, "dim": layer.dim}
    kind = type(layer).__name__.removeprefix("Interval")
    if type(layer) is not getattr(layers, f"Interval{kind}", None) or kind not in ARGUMENTS:
        raise UserError(f"a layer of type {type(layer).__name__} cannot be saved")
    arguments = {
        name: getattr(layer, name) if read is None else read(layer)
        for name, read in ARGUMENTS[kind].items()
    }
    return {"layer": kind, **arguments}


def built(facts: dict[str, Any]) -> IntervalLayer:
    """The layer that `described` told of, freshly initialised.

    Raises:
        UserError: it is unknown.
        Whatever the layer raises of values that it cannot be made of.
    """
    arguments = {name: _without_lists(value) for name, value in facts.items()}
    kind = arguments.pop("layer")
    if kind == "Sequential":
        return IntervalSequential(*[built(part) for part in facts["layers"]])
    if kind == "Residual":
        return IntervalResidual(built(facts["branch"]), built(facts["shortcut"]))
    if kind == "Concat":
        return IntervalConcat([built(part) for part in facts["branches"]], facts["dim"])
    if kind not in ARGUMENTS or arguments.keys() != ARGUMENTS[kind].keys():
        raise UserError(f"no layer is known that is described by {facts}")
    return cast(IntervalLayer, getattr(layers, f"Interval{kind}")(**arguments))


def _without_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
