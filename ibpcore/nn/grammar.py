"""Architectures as text, such as "conv 32 3x3 s2, relu, linear 128, relu, linear 10".

Training builds new layers from a text, `ibp import` layers with the weights of a file. The
grammar is described in docs/architectures.md.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ibpcore import nn as il
from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.nn.layers import IntervalLayer

Shape = tuple[int, ...]
"""Of what a layer takes: channels, height, width of an image, or a number of features."""
Placed = tuple[list[IntervalLayer], Shape]
"""Layers, and the shape of their output."""

LONGEST, DEEPEST, LARGEST = 20_000, 8, 2**22
"""Characters of a text, residuals within residuals, and any number in it."""
MOST_VALUES = 2**28
"""Values that a layer may compute for an image: 1 GiB."""


class Weights(Protocol):
    """Makes the layers that have weights, in the order in which they are computed.

    Each raises UserError if the layer cannot be made.
    """

    def convolution(self, part: Convolution, channels: int) -> IntervalLayer: ...

    def linear(self, part: Linear, features: int) -> IntervalLayer: ...

    def batch_norm(self, part: BatchNorm, channels: int) -> list[IntervalLayer]:
        """One layer, or none if the batch norm is optional."""


class Part(Protocol):
    """A layer of an architecture, without weights."""

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        """Its layers for inputs of that shape.

        Raises:
            UserError: it does not take such inputs.
        """


@dataclass(frozen=True)
class Convolution:
    """Sizes are (height, width) in pixels.

    Attributes:
        width: number of its output channels; None if the file decides.
        groups: None if the file decides.
        bias: False if it has none.
    """

    width: int | None
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int | None = 1
    bias: bool = True

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        channels, *sides = _image(shape)
        outputs = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(
                sides, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        if min(outputs) < 1:
            raise UserError(f"its kernel is larger than its input of {sides[0]} x {sides[1]}")
        layer: Any = weights.convolution(self, channels)
        return [layer], (layer.out_channels, *outputs)


@dataclass(frozen=True)
class Linear:
    """It flattens images first.

    Attributes:
        width: number of its outputs; None if the file, or the number of classes, decides.
        bias: False if it has none.
    """

    width: int | None = None
    bias: bool = True

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        before: list[IntervalLayer] = [il.IntervalFlatten()] if len(shape) > 1 else []
        layer: Any = weights.linear(self, torch.Size(shape).numel())
        return [*before, layer], (layer.out_features,)


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm; an optional one is there only if the file has it."""

    optional: bool = False

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        return weights.batch_norm(self, shape[0]), shape


@dataclass(frozen=True)
class Weightless:
    """A layer without weights.

    Attributes:
        kind: the name of its twin in `torch.nn`.
        make: the layer for inputs of a shape.
    """

    kind: str
    make: Callable[[Shape], IntervalLayer] = field(compare=False)

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        layer = self.make(shape)
        output = layer.eval()(torch.empty(1, *shape, device="meta"))
        return [layer.train()], tuple(output.shape[1:])


@dataclass(frozen=True)
class Residual:
    """The sum of two branches, of which an empty one is the identity."""

    branches: tuple[LayerSequence, LayerSequence]

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        (left, to_left), (right, to_right) = (
            branch.placed(shape, weights) for branch in self.branches
        )
        if to_left != to_right:
            raise UserError(f"its branches give {to_left} and {to_right}, which have no sum")
        branches = il.IntervalSequential(*left), il.IntervalSequential(*right)
        return [il.IntervalResidual(*branches)], to_left


@dataclass(frozen=True)
class LayerSequence:
    """A sequence of layers, each with its text."""

    parts: tuple[tuple[str, Part], ...] = field(default=())

    def placed(self, shape: Shape, weights: Weights) -> Placed:
        """See `Part.placed`; errors name the layer."""
        layers: list[IntervalLayer] = []
        for text, part in self.parts:
            try:
                more, shape = part.placed(shape, weights)
            except REFUSED as error:
                raise UserError(f"{text!r}: {first_line(error)}") from None
            if torch.Size(shape).numel() > MOST_VALUES:
                raise UserError(f"{text!r} computes more than {MOST_VALUES} values for an image")
            layers += more
        return layers, shape

    def all_parts(self) -> Iterator[Part]:
        """All layers in order, with those of residuals in place of the residuals."""
        for _, part in self.parts:
            if isinstance(part, Residual):
                for branch in part.branches:
                    yield from branch.all_parts()
            else:
                yield part


def _image(shape: Shape) -> Shape:
    if len(shape) != 3:
        raise UserError(f"it takes images, but its input is {' x '.join(map(str, shape))}")
    return shape


Arguments = dict[str, tuple[float, ...]]
"""Of a layer: numbers without a letter as `numbers`, NxM as `kernel`, others by letter or word."""

NUMBER = re.compile(r"([spdg]?)([0-9]{1,7})(?:x([0-9]{1,7}))?|(0?\.[0-9]{1,9})|(nobias|g\?)")


def parse(text: str) -> LayerSequence:
    """The architecture that a text describes.

    Raises:
        UserError: it is not in the grammar; the message names the layer.
    """
    if len(text) > LONGEST:
        raise UserError(f"an architecture has at most {LONGEST} characters")
    tokens = deque(re.findall(r"[(),|]|[^\s(),|]+", text.lower()))
    found = _sequence(tokens, 0)
    if tokens:
        raise UserError(f"unexpected {tokens[0]!r} in the architecture")
    if not found.parts:
        raise UserError("the architecture is empty")
    return found


def _sequence(tokens: deque[str], depth: int) -> LayerSequence:
    """The layers up to the end, or to a `|` or `)`."""
    parts: list[tuple[str, Part]] = []
    while tokens and tokens[0] not in ")|":
        words = []
        while tokens and tokens[0] not in "(),|":
            words.append(tokens.popleft())
        if words == ["residual"] and tokens and tokens[0] == "(":
            parts.append(("residual", _residual(tokens, depth + 1)))
        else:
            parts.append((" ".join(words), _layer(words)))
        if not tokens or tokens[0] in ")|":
            break
        if tokens.popleft() != "," or not tokens or tokens[0] in "),|":
            raise UserError(f"a comma and a layer must follow {parts[-1][0]!r}")
    return LayerSequence(tuple(parts))


def _residual(tokens: deque[str], depth: int) -> Residual:
    if depth > DEEPEST:
        raise UserError(f"there are more than {DEEPEST} residuals within each other")
    tokens.popleft()
    left, right = _sequence(tokens, depth), LayerSequence()
    if tokens and tokens[0] == "|":
        tokens.popleft()
        right = _sequence(tokens, depth)
    if not tokens or tokens.popleft() != ")":
        raise UserError("residual needs two branches at most and a closing ')'")
    return Residual((left, right))


def _layer(words: list[str]) -> Part:
    text, name = " ".join(words), words[0] if words else ""
    if name not in WORDS:
        raise UserError(f"{text!r} is not a layer: the layers are {', '.join(WORDS)}, residual")
    given: Arguments = {}
    for word in words[1:]:
        key, values = _argument(word)
        if key in given and key != "numbers":
            raise UserError(f"{text!r} has two arguments for the same")
        given[key] = given.get(key, ()) + values
    try:
        part = WORDS[name](given)
    except ValueError as error:
        raise UserError(f"{text!r}: {first_line(error)}") from None
    if given:
        raise UserError(f"{text!r}: {name} takes no {' or '.join(given)}")
    return part


def _argument(word: str) -> tuple[str, tuple[float, ...]]:
    match = NUMBER.fullmatch(word)
    if match is None:
        raise UserError(f"{word!r} is no argument of a layer, such as 32, 3x3, s2, p1 or nobias")
    letter, first, second, fraction, flag = match.groups()
    if flag or fraction:
        return flag or "numbers", (float(fraction),) if fraction else ()
    values = tuple(int(number) for number in (first, second) if number is not None)
    if max(values) > LARGEST:
        raise UserError(f"{word!r} is above {LARGEST}")
    return letter or ("kernel" if second else "numbers"), values


def _take(given: Arguments, key: str, least: int, default: int) -> tuple[int, int]:
    """The two sizes (height, width) of an argument, which is removed."""
    values = [int(value) for value in given.pop(key, (default,))]
    if min(values) < least:
        raise ValueError(f"{key} must be at least {least}")
    return values[0], values[-1]


def _take_one(given: Arguments, key: str) -> int | None:
    """The number of an argument, which is removed; None if it is left out."""
    if key not in given:
        return None
    first, *others = given.pop(key)
    if others or first != int(first) or first < 1:
        raise ValueError(f"there must be one number, at least 1, for {key}")
    return int(first)


def _convolution(given: Arguments) -> Part:
    if "kernel" not in given:
        raise ValueError("a convolution needs the size of its kernel, as in conv 32 3x3")
    if "g" in given and "g?" in given:
        raise ValueError("its groups are given and left open")
    open_groups = given.pop("g?", None) is not None
    groups = _take_one(given, "g")
    return Convolution(
        width=_take_one(given, "numbers"),
        kernel=_take(given, "kernel", 1, 1),
        stride=_take(given, "s", 1, 1),
        padding=_take(given, "p", 0, 0),
        dilation=_take(given, "d", 1, 1),
        groups=None if open_groups else groups or 1,
        bias=given.pop("nobias", None) is None,
    )


def _linear(given: Arguments) -> Part:
    return Linear(_take_one(given, "numbers"), given.pop("nobias", None) is None)


def _kind(layer: type[IntervalLayer]) -> str:
    return layer.__name__.removeprefix("Interval")


def _pooling(kind: type[Any]) -> Callable[[Arguments], Part]:
    """Pooling; without a kernel it covers the whole image."""

    def of(given: Arguments) -> Part:
        if "kernel" not in given:
            return Weightless(_kind(kind), lambda shape: kind(_image(shape)[1:]))
        kernel = _take(given, "kernel", 1, 1)
        stride = _take(given, "s", 1, 1) if "s" in given else kernel
        padding = _take(given, "p", 0, 0)
        return Weightless(_kind(kind), lambda shape: kind(kernel, stride, padding))

    return of


def _pad(given: Arguments) -> Part:
    sides = [int(number) for number in given.pop("numbers", ())]
    if len(sides) not in (1, 4):
        raise ValueError("pad needs one number, or those for left, right, top and bottom")
    return Weightless("ZeroPad2d", lambda shape: il.IntervalZeroPad(sides * (4 // len(sides))))


def _plain(kind: type[Any], *defaults: float) -> Callable[[Arguments], Part]:
    """A layer that takes at most as many numbers as it has defaults."""

    def of(given: Arguments) -> Part:
        numbers = given.pop("numbers", defaults) if defaults else ()
        if len(numbers) != len(defaults):
            raise ValueError(f"there must be {len(defaults)} number")
        return Weightless(_kind(kind), lambda shape: kind(*numbers))

    return of


WORDS: dict[str, Callable[[Arguments], Part]] = {
    "conv": _convolution,
    "linear": _linear,
    "bn": lambda given: BatchNorm(),
    "bn?": lambda given: BatchNorm(optional=True),
    "relu": _plain(il.IntervalReLU),
    "leakyrelu": _plain(il.IntervalLeakyReLU, 0.01),
    "sigmoid": _plain(il.IntervalSigmoid),
    "tanh": _plain(il.IntervalTanh),
    "maxpool": _pooling(il.IntervalMaxPool2d),
    "avgpool": _pooling(il.IntervalAvgPool2d),
    "pad": _pad,
    "dropout": _plain(il.IntervalDropout, 0.5),
    "flatten": _plain(il.IntervalFlatten),
}
"""Makes a layer from its arguments, of which it removes those that it takes."""
