"""Interval layers with the tensors of a file, for a sequential architecture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.importing.architectures import Convolution, Sequential
from ibpcore.interop.importing.state_dicts import FoundLayer
from ibpcore.nn.layers import IntervalLayer

AFFINE, RUNNING_STATISTICS = {"weight", "bias"}, {"running_mean", "running_var"}
ImageShape = tuple[int, int, int]


class Block(NamedTuple):
    """A convolution or linear layer, with the batch norm that follows it, if any."""

    affine: FoundLayer
    norm: FoundLayer | None = None

    @property
    def is_convolution(self) -> bool:
        return self.affine.tensors["weight"].dim() == 4


def layers_of(
    found: list[FoundLayer], name: str, architecture: Sequential, in_shape: ImageShape
) -> list[IntervalLayer]:
    """All layers of a sequential network, with the weights of the file.

    Args:
        found: the layers of the file, without normalisation.
        name: of the architecture, for messages.
        in_shape: channels, height, width of the input of the first layer.

    Raises:
        UserError: a layer is missing or superfluous, or a tensor has another shape.
    """
    blocks = _blocks(found)
    geometry = _geometry(blocks, name, architecture, in_shape)
    placed: list[tuple[IntervalLayer, FoundLayer | None]] = []
    inputs = in_shape[0]
    for i, block in enumerate(blocks):
        if i < len(geometry):
            placed.append((make_convolution(block.affine, inputs, geometry[i]), block.affine))
        else:
            if i == len(geometry):
                placed.append((il.IntervalFlatten(), None))
                inputs = block.affine.tensors["weight"].shape[1]  # as `_geometry` has checked
            placed.append((make_linear(block.affine, inputs), block.affine))
        inputs = block.affine.tensors["weight"].shape[0]
        if block.norm is not None:
            placed.append((make_batch_norm(block.norm, inputs), block.norm))
        placed.append((il.IntervalReLU(), None))
    del placed[-1]  # after the logits
    _check_numbers(placed, name)
    return [layer for layer, _ in placed]


def is_batch_norm(layer: FoundLayer) -> bool:
    """Whether the layer is a batch norm; otherwise it is a convolution or a linear layer.

    Raises:
        UserError: it is neither, or a tensor is missing.
    """
    names, weight = set(layer.tensors), layer.tensors.get("weight")
    if names & RUNNING_STATISTICS or (weight is not None and weight.dim() == 1):
        whole = RUNNING_STATISTICS if names <= RUNNING_STATISTICS else AFFINE | RUNNING_STATISTICS
        if missing := whole - names:
            raise UserError(f"{layer.name} lacks {' and '.join(sorted(missing))}")
        if names <= AFFINE | RUNNING_STATISTICS:
            return True
    elif weight is not None and weight.dim() in (2, 4) and names <= AFFINE:
        return False
    raise UserError(f"{layer.name}, with {', '.join(sorted(names))}, is not a known layer")


def _blocks(found: list[FoundLayer]) -> list[Block]:
    blocks: list[Block] = []
    for layer in found:
        if not is_batch_norm(layer):
            blocks.append(Block(layer))
        elif not blocks or blocks[-1].norm is not None:
            raise UserError(f"{layer.name} is a batch norm that follows no affine layer")
        else:
            blocks[-1] = blocks[-1]._replace(norm=layer)
    return blocks


def _geometry(
    blocks: list[Block], name: str, architecture: Sequential, in_shape: ImageShape
) -> tuple[Convolution, ...]:
    """The first alternative for the convolutions that fits the first linear layer."""
    kinds = [block.is_convolution for block in blocks]
    convolutions = len(architecture.convolutions[0])
    if kinds != [True] * convolutions + [False] * architecture.linear:
        raise UserError(
            f"{name} has {convolutions} convolutions and then {architecture.linear} linear layers,"
            f" the file {sum(kinds)} convolutions and {len(kinds) - sum(kinds)} linear layers"
        )
    if blocks[-1].norm is not None:
        raise UserError(f"{blocks[-1].norm.name} is a batch norm after the last layer")
    channels = blocks[convolutions - 1].affine.tensors["weight"].shape[0]
    last = (channels if convolutions else in_shape[0], *in_shape[1:])
    first = blocks[convolutions].affine
    given = [_features(last, geometry) for geometry in architecture.convolutions]
    taken = first.tensors["weight"].shape[1]
    if taken not in given:
        raise UserError(
            f"{first.name}.weight takes {taken} features, but {name} computes"
            f" {' or '.join(map(str, given))} from images {tuple(in_shape)}: is that their size, or"
            " are they cropped?"
        )
    return architecture.convolutions[given.index(taken)]


def _features(shape: ImageShape, geometry: tuple[Convolution, ...]) -> int:
    """Number of features after the convolutions, whose output has `shape[0]` channels."""
    channels, height, width = shape
    for kernel, stride, padding in geometry:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    return channels * max(height, 0) * max(width, 0)


def make_convolution(
    found: FoundLayer, inputs: int, geometry: Convolution, grouped: bool = False
) -> IntervalLayer:
    """A convolution of `inputs` channels; if `grouped`, its weight defines the groups."""
    weight = _weight(found)
    outputs, share = weight.shape[0], weight.shape[1] if grouped and weight.dim() > 1 else inputs
    fits = share > 0 and inputs % share == 0 and outputs % max(inputs // share, 1) == 0
    with torch.device("meta"):
        groups, bias = inputs // share if fits else 1, "bias" in found.tensors
        layer = il.IntervalConv2d(inputs, outputs, *geometry, groups=groups, bias=bias)
    return _filled(layer, found)


def _weight(found: FoundLayer) -> Tensor:
    if is_batch_norm(found):
        raise UserError(f"{found.name} is a batch norm, not a convolution or linear layer")
    return found.tensors["weight"]


def make_linear(found: FoundLayer, inputs: int) -> IntervalLayer:
    """A linear layer of `inputs` features."""
    outputs = _weight(found).shape[0]
    with torch.device("meta"):
        layer = il.IntervalLinear(inputs, outputs, "bias" in found.tensors)
    return _filled(layer, found)


def make_batch_norm(found: FoundLayer, channels: int) -> IntervalLayer:
    """A batch norm of `channels` channels."""
    if not is_batch_norm(found):
        raise UserError(f"{found.name} is not a batch norm")
    if bool((found.tensors["running_var"] < 0).any()):
        raise UserError(f"{found.name}.running_var holds variances below 0")
    with torch.device("meta"):
        layer = il.IntervalBatchNorm(channels, affine="weight" in found.tensors)
    return _filled(layer, found)


def _filled(layer: IntervalLayer, found: FoundLayer) -> IntervalLayer:
    state: dict[str, Any] = {"num_batches_tracked": torch.tensor(0)}
    for name, tensor in layer.state_dict().items():
        if name in found.tensors:
            state[name] = found.tensors[name].detach().clone()
            shape, expected = tuple(state[name].shape), tuple(tensor.shape)
            if shape != expected:
                raise UserError(f"{found.name}.{name} is {shape}, but should be {expected}")
    layer.load_state_dict({name: state[name] for name in layer.state_dict()}, assign=True)
    return layer


def _check_numbers(placed: list[tuple[IntervalLayer, FoundLayer | None]], name: str) -> None:
    """Raises UserError unless the numbers of the layers allow for those without weights.

    This detects a missing batch norm, or a network without ReLUs.
    """
    start: int | None = None  # the number at place 0, according to the first numbered layer
    for place, (_, found) in enumerate(placed):
        if found is None or found.number is None:
            continue
        start = found.number - place if start is None else start
        expected = start + place
        if found.number != expected:
            raise UserError(
                f"{found.name} would be number {expected} if {name} had the layers of the file:"
                " there is another layer before it, or one is missing"
            )
