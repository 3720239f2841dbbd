"""Classifiers of interval layers, and their descriptions in model files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibpcore.errors import UserError, first_line
from ibpcore.nn.composition import IntervalSequential
from ibpcore.nn.layers import LAYERS, IntervalLayer, check_supported, kind_of

LONGEST = 64
"""Elements of the largest tensor whose numbers a description repeats."""


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


class Tie(NamedTuple):
    """A tensor of a layer that belongs to, or is computed from, the module it was converted from.

    Attributes:
        layer, name: the layer and the name of its parameter or buffer.
        current: returns the tensor as the module has it now.
    """

    layer: IntervalLayer
    name: str
    current: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """The module that a network was converted from, whose tensors it follows.

    Layers with a twin share its tensors anyway.

    Attributes:
        ties: the tensors of the other layers.
        unchanged: whether everything that cannot be followed is as it was.
    """

    module: nn.Module
    ties: tuple[Tie, ...]
    unchanged: Callable[[], bool]

    def follow(self) -> None:
        """Gives the layers the tensors that the module has now.

        Raises:
            UserError: one of them cannot be followed.
        """
        try:
            unchanged, tensors = self.unchanged(), [tie.current() for tie in self.ties]
        except (AttributeError, RuntimeError, IndexError) as error:
            reason = first_line(error)
            raise UserError(f"a tensor of the module is missing or misfits: {reason}") from None
        if not unchanged:
            raise UserError(
                "the module has changed in a way that the network cannot follow, such as a tensor"
                " that is no buffer, a layer, its settings or a hook: convert the module again"
            )
        dtype = weight_like(self.module).dtype
        for (layer, name, _), now in zip(self.ties, tensors, strict=True):
            before = getattr(layer, name)
            if now is before:
                continue
            if now.shape != before.shape:
                shapes = f"{tuple(before.shape)} to {tuple(now.shape)}"
                raise UserError(f"a tensor of the module changed from {shapes}: convert it again")
            if now.dtype != dtype:
                raise UserError(f"a tensor of the module is {now.dtype}, but its weights {dtype}")
            kept = isinstance(now, nn.Parameter) or not isinstance(before, nn.Parameter)
            setattr(layer, name, now if kept else nn.Parameter(now, before.requires_grad))


class Network(Classifier):
    """A classifier of any interval layers, such as `convert` and `ibp import` make.

    A converted network follows its module: it uses the tensors that the module has at that time,
    and both move together. A deep copy of the network is independent of the module.

    Args:
        parts: the layers in order, not copied.
        in_shape: shape of an input without the batch, such as (channels, height, width) of an
            image, or (features,).
        source: what it was converted from.

    Raises:
        UserError: the layers do not map such inputs to logits.
    """

    def __init__(
        self,
        parts: Sequence[IntervalLayer],
        in_shape: Sequence[int],
        source: Source | None = None,
    ) -> None:
        super().__init__(*parts)
        self.source = source
        check_supported(self)
        self.in_shape = check_in_shape(in_shape)
        self.classes = _classes(self, self.in_shape)
        if source is None:  # views in a module may rely on the layout of its weights
            channels_last(self)

    def __iter__(self) -> Iterator[nn.Module]:
        # Logits, bounds, proofs, exports and descriptions all begin with the layers.
        self._follow()
        return super().__iter__()

    def _follow(self) -> None:
        if self.source is not None:
            self.source.follow()

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        if self.source is not None:
            self.source.module._apply(fn)
            self._follow()  # numbers of Python in full precision
        return super()._apply(fn, recurse)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._follow()  # for parameters and buffers
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._follow()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in every module.

        Raises:
            UserError: the module that this network follows computes other constants.
        """
        keys = super().load_state_dict(state_dict, strict, assign)
        ties = () if self.source is None else self.source.ties
        loaded = [getattr(layer, name) for layer, name, _ in ties]
        self._follow()
        for (layer, name, _), tensor in zip(ties, loaded, strict=True):
            # A device may compute them in another order.
            if not torch.allclose(getattr(layer, name), tensor, equal_nan=True):
                raise UserError(
                    "the weights hold a constant that the module computes, with other numbers:"
                    " load them into the module instead"
                )
        return keys

    def __copy__(self) -> Network:
        """A shallow copy has the same layers, and follows the module too."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        return {**vars(self), "source": None}

    def description(self) -> dict[str, Any]:
        parts = [described(part) for part in self.layers]
        return {"name": "network", "in_shape": list(self.in_shape), "layers": parts}

    @classmethod
    def from_description(cls, facts: dict[str, Any]) -> Network:
        """The network with this `description`, from which `name` has been removed.

        Raises: see `built`, and the constructor.
        """
        return cls([built(part) for part in facts["layers"]], facts["in_shape"])


def check_in_shape(in_shape: Any) -> tuple[int, ...]:
    """The shape of an input without the batch, as a tuple.

    Raises:
        UserError: it has no sizes, or one that is not a whole number of at least 1.
    """
    try:
        shape = tuple(index(size) for size in in_shape)
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 1:
        raise UserError(
            f"in_shape must be sizes such as (channels, height, width), got {in_shape!r}"
        )
    return shape


def channels_last(model: nn.Module) -> None:
    """Lays out the weights of convolutions so that these are up to four times faster on a CPU.

    Not other tensors of four dimensions, which would be replaced, nor those of five.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """A context that restores training or evaluation mode of all parts of `module` at its end."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def weight_like(model: nn.Module) -> Tensor:
    """An empty tensor of the type and device of the weights of `model`, or of its buffers.

    Without either it is float32, on the CPU.
    """
    tensors = chain(model.parameters(), model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0)).new_empty(0)


@torch.no_grad()
def _classes(model: nn.Module, in_shape: tuple[int, ...]) -> int:
    """The number of logits that `model` returns for two inputs of zeros.

    Two, since batch norm without running statistics takes no single one.
    """
    images = weight_like(model).new_zeros(2, *in_shape)
    try:
        with modes_kept(model):
            shape = model.eval()(images).shape
    except UserError:
        raise  # of a layer that has no sound rule for its settings
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the layers do not take images {in_shape}: {first_line(error)}") from None
    if len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
        raise UserError(f"for two images the layers give {tuple(shape)}, not logits (2, classes)")
    return int(shape[1])


def described(layer: IntervalLayer) -> dict[str, Any]:
    """JSON values from which `built` makes an equal layer, apart from its weights.

    Raises:
        UserError: the type of the layer does not state its `arguments`.
    """
    name = kind_of(layer)
    if LAYERS.get(name) is not type(layer):
        raise UserError(f"a layer of type {type(layer).__name__} cannot be saved")
    values = {name: getattr(layer, name) for name in layer.arguments}
    if "bias" in values:
        values["bias"] = values["bias"] is not None  # what the constructor expects
    return {"layer": name, **{name: _encoded(value) for name, value in values.items()}}


def _encoded(value: Any) -> Any:
    """`value` with descriptions in place of layers, and numbers or a shape in place of tensors."""
    if isinstance(value, list):
        return [_encoded(part) for part in value]
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= LONGEST else {"ones": list(value.shape)}
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
    """`value` with layers and tensors in place of descriptions, and tuples in place of lists."""
    if isinstance(value, list):
        return tuple(_decoded(part) for part in value)
    if isinstance(value, dict):
        return torch.ones(value["ones"]) if value.keys() == {"ones"} else built(value)
    return value
