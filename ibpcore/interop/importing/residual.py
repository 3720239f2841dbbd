"""Interval layers with the tensors of a file, for a residual architecture."""

from __future__ import annotations

from itertools import count

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.importing import parts
from ibpcore.interop.importing.architectures import Convolution, Residual
from ibpcore.interop.importing.state_dicts import FoundLayer
from ibpcore.nn.layers import IntervalLayer

STEM = "conv1"
STRIDES = (1, 2, 2)
"""Of the first block in the stages `layer1`, `layer2`, `layer3`, which have equally many blocks."""


class Store:
    """The layers of a file by name, each of which must be taken exactly once.

    Attributes:
        normalized: whether batch norm follows every convolution; otherwise there is none.
    """

    def __init__(self, found: list[FoundLayer]) -> None:
        prefixes = [layer.name[: -len(STEM)] for layer in found if layer.name.endswith(STEM)]
        start = min(prefixes, key=len, default="")  # `module.` of a wrapper, or nothing
        self._left = {layer.name.removeprefix(start): layer for layer in found}
        norms = [parts.is_batch_norm(layer) for layer in found]
        self.normalized = any(norms)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> FoundLayer:
        if name not in self._left:
            raise UserError(f"{name} is missing")
        return self._left.pop(name)

    def check_empty(self) -> None:
        for name in self._left:
            raise UserError(f"{name} is superfluous")


def residual_layers(
    found: list[FoundLayer], architecture: Residual, in_shape: parts.ImageShape
) -> list[IntervalLayer]:
    """All layers of a residual network, with the weights of the file.

    Args:
        found: the layers of the file, without normalisation.
        in_shape: channels, height, width of the input of the first layer.

    Raises:
        UserError: a layer is missing or superfluous, or a tensor has another shape.
    """
    store = Store(found)
    channels, height, width = in_shape
    layers, channels = _convolved(store, STEM, "bn1", channels, Convolution(3, 1, 1))
    layers.append(il.IntervalReLU())
    blocks = next(number for number in count(1) if f"layer1.{number}.conv1" not in store)
    for stage, stride in enumerate(STRIDES, 1):
        for number in range(blocks):
            name, step = f"layer{stage}.{number}", 1 if number else stride
            block, channels = _block(store, name, architecture, channels, step)
            layers += [block, il.IntervalReLU()]
        height, width = -(-height // stride), -(-width // stride)
    hidden, norm, last = architecture.head
    first = store.take(hidden)
    layers += [il.IntervalFlatten(), parts.make_linear(first, channels * height * width)]
    features = first.tensors["weight"].shape[0]
    if store.normalized:
        layers.append(parts.make_batch_norm(store.take(norm), features))
    layers += [il.IntervalReLU(), parts.make_linear(store.take(last), features)]
    store.check_empty()
    return layers


def _block(
    store: Store, name: str, architecture: Residual, inputs: int, stride: int
) -> tuple[IntervalLayer, int]:
    """A residual block, and the number of its output channels."""
    branch: list[IntervalLayer] = []
    channels = inputs
    for number, kernel in enumerate(architecture.kernels, 1):
        # The first kernel that is wider than 1 has the stride.
        strided = kernel > 1 and 3 not in architecture.kernels[: number - 1]
        geometry = Convolution(kernel, stride if strided else 1, kernel // 2)
        names = f"{name}.conv{number}", f"{name}.bn{number}"
        if branch:
            branch.append(il.IntervalReLU())
        grouped = architecture.grouped and kernel > 1
        layers, channels = _convolved(store, *names, channels, geometry, grouped)
        branch += layers
    shortcut = None
    if stride > 1 or channels != inputs:
        names = f"{name}.{architecture.shortcut}.0", f"{name}.{architecture.shortcut}.1"
        layers, _ = _convolved(store, *names, inputs, Convolution(1, stride, 0))
        shortcut = il.IntervalSequential(*layers)
    return il.IntervalResidual(il.IntervalSequential(*branch), shortcut), channels


def _convolved(
    store: Store, name: str, norm: str, inputs: int, geometry: Convolution, grouped: bool = False
) -> tuple[list[IntervalLayer], int]:
    """A convolution with its batch norm, and the number of its output channels."""
    found = store.take(name)
    layers = [parts.make_convolution(found, inputs, geometry, grouped)]
    outputs = found.tensors["weight"].shape[0]
    if store.normalized:
        layers.append(parts.make_batch_norm(store.take(norm), outputs))
    return layers, outputs
