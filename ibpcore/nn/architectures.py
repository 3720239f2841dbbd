"""Names for the usual networks of certified training, and new networks of an architecture.

The names are abbreviations of texts. These leave open what a file of weights says: all widths,
and the places of batch norm. A file says neither strides and padding nor the places of ReLUs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.nn.grammar import BatchNorm, Convolution, LayerSequence, Linear, parse
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Network
from ibpcore.wording import counted

MOST_BLOCKS = 9
"""Blocks in each stage of a residual network."""
MOST_PARAMETERS = 2**30
"""Of a new network: 4 GiB."""


def _sequential(*convolutions: str, linear: int = 2) -> str:
    """Convolutions and linear layers, with ReLU and perhaps batch norm after all but the last."""
    affine = [*(f"conv {convolution}" for convolution in convolutions), *["linear"] * linear]
    return ", bn?, relu, ".join(affine)


def _stages(block: str, first: tuple[str, str], other: str) -> tuple[str, ...]:
    """Residual networks of three stages with equally many blocks, as those of Shi et al.

    Args:
        block: the branch of a block, with {s} for its stride.
        first: the shortcut of the first block, if that is narrower than its output, or not.
        other: the shortcut of the first block of the others, which halve the images.
    """
    return tuple(
        f"conv 3x3 p1, bn?, relu, {''.join(_blocks(block, shortcut, 's1', number))}"
        f"{_blocks(block, other, 's2', number) * 2}linear, bn?, relu, linear"
        for number in range(1, MOST_BLOCKS + 1)
        for shortcut in first
    )


def _blocks(block: str, shortcut: str, stride: str, number: int) -> str:
    first, other = block.format(s=stride), block.format(s="s1")
    return f"residual({first} | {shortcut}), relu, " + f"residual({other}), relu, " * (number - 1)


SAME, HALF, DOWN = "3x3 p1", "3x3 s2 p1", "4x4 s2 p1"
START = (SAME, SAME, HALF)
"""The first convolutions of the networks of Shi et al.; the others are all SAME."""
WIDE = "conv 3x3 {s} p1, bn?, relu, conv 3x3 p1, bn?"
GROUPED = "conv 1x1, bn?, relu, conv 3x3 {s} p1 g?, bn?, relu, conv 1x1, bn?"
PROJECTED = "conv 1x1 s1, bn?", "conv 1x1 s2, bn?"
VNN_BLOCKS = f"residual({WIDE.format(s='s2')} | {PROJECTED[1]}), relu, residual({WIDE}), relu, "

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "cnn3": (_sequential("5x5 s2 p2", DOWN, linear=1),),
    "cnn4": (_sequential("5x5 s2 p2", DOWN),),
    "cnn5": (_sequential(SAME, DOWN, DOWN),),
    "cnn6": (_sequential(*START, SAME),),
    # For larger images some programs use stride 2 in the fifth convolution too.
    "cnn7": (_sequential(*START, SAME, SAME), _sequential(*START, SAME, HALF)),
    "cnn8": (_sequential(*START, *[SAME] * 3),),
    "cnn9": (_sequential(*START, *[SAME] * 4),),
    "cnn11": (_sequential(*START, *[SAME] * 6),),
    "cnn13": (_sequential(*START, *[SAME] * 8),),
    "crown-ibp2": (_sequential(DOWN, DOWN),),
    "crown-ibp3": tuple(_sequential(side, side, "4x4 s4") for side in ("3x3 p1", "5x5 p1")),
    "crown-ibp4": (_sequential(SAME, DOWN, SAME, DOWN, linear=3),),
    "dm-small": (_sequential("4x4 s2", "4x4"),),
    "dm-medium": (_sequential(*["3x3", "4x4 s2"] * 2, linear=3),),
    "dm-large": (_sequential("3x3", "3x3", "3x3 s2", "3x3", "3x3"),),
    "eran-small": (_sequential("4x4 s2", "4x4 s2"),),
    "marabou": (_sequential("4x4 s2", "4x4 s2", linear=3),),
    "oval-deep": (_sequential(DOWN, SAME, SAME, DOWN),),
    "resnet2b": (f"conv {HALF}, bn?, relu, {VNN_BLOCKS.format(s='s1')}linear, relu, linear",),
    "resnet4b": (f"conv {HALF}, bn?, relu, {VNN_BLOCKS.format(s='s1') * 2}linear, relu, linear",),
    "wide-resnet": _stages(WIDE, ("", PROJECTED[0]), PROJECTED[1]),
    "resnext": _stages(GROUPED, ("", PROJECTED[0]), PROJECTED[1]),
}
"""By name: the texts of an architecture, of which the weights and the size of images decide.

`crown-ibp*` are the small networks of Zhang et al. by number of convolutions (their large one is
a cnn7), `dm-*` those of Gowal et al. without padding, `eran-small`, `marabou` and `oval-deep` those
of these verifiers, `resnet*b` those of VNN-COMP, and the other residual ones those of Shi et al.
`mlpN` is an MLP of N linear layers."""


def variants(text: str) -> tuple[LayerSequence, ...]:
    """The architectures that a name or a text in the grammar stands for.

    Raises:
        UserError: it is neither.
    """
    if match := re.fullmatch("mlp([1-9][0-9]?)", text):
        return (parse(_sequential(linear=int(match[1]))),)
    if text in ARCHITECTURES:
        return tuple(map(parse, ARCHITECTURES[text]))
    try:
        return (parse(text),)
    except UserError as error:
        if re.search("[ ,(]", text) or not text:
            raise
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{error}; the named architectures are {known}, mlpN") from None


def is_name(text: str) -> bool:
    """Whether `text` is an abbreviation."""
    return text in ARCHITECTURES or re.fullmatch("mlp[1-9][0-9]?", text) is not None


class NewWeights:
    """Newly initialised layers, as PyTorch initialises them.

    Args:
        architecture: the whole network.
        classes: number of outputs of its last layer, if that leaves its width open.
    """

    def __init__(self, architecture: LayerSequence, classes: int) -> None:
        self._last, self._classes = architecture.parts[-1][1], classes

    def convolution(self, part: Convolution, channels: int) -> IntervalLayer:
        if part.width is None or part.groups is None:
            raise UserError("in a new network it needs its width and groups, as in conv 32 3x3")
        return il.IntervalConv2d(
            *(channels, part.width, part.kernel, part.stride, part.padding, part.dilation),
            *(part.groups, part.bias),
        )

    def linear(self, part: Linear, features: int) -> IntervalLayer:
        width = self._classes if part.width is None and part is self._last else part.width
        if width is None:
            raise UserError("in a new network it needs its width, as in linear 128")
        return il.IntervalLinear(features, width, part.bias)

    def batch_norm(self, part: BatchNorm, channels: int) -> list[IntervalLayer]:
        if part.optional:
            raise UserError("a new network has bn, or nothing in its place")
        return [il.IntervalBatchNorm(channels)]


def new_network(
    text: str,
    in_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Network:
    """A new network of an architecture, behind normalisation.

    Args:
        text: the architecture; its last layer may be a `linear` without a width.
        in_shape: channels, height, width of an image.
        mean, std: normalisation of each channel in pixel units; empty for none.

    Raises:
        UserError: the text is not in the grammar, its layers do not fit together or to the
            images, or the number of logits is not `classes`.
    """
    architecture, *_ = variants(text)
    weights = NewWeights(architecture, classes)
    with torch.device("meta"):  # checks everything without memory
        layers, shape = architecture.placed(in_shape, weights)
    if shape != (classes,):
        given = " x ".join(map(str, shape))
        raise UserError(f"the architecture gives {given} values for {counted(classes, 'class')}")
    parameters = il.IntervalSequential(*layers).parameters()
    if sum(parameter.numel() for parameter in parameters) > MOST_PARAMETERS:
        raise UserError(f"the architecture has more than {MOST_PARAMETERS} parameters")
    layers, _ = architecture.placed(in_shape, weights)
    if mean:
        layers.insert(0, il.IntervalNormalize(mean, std))
    return Network(layers, in_shape)
