"""Normalisations that training code of other repositories applies outside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.nn.constants import Constants
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.rearrangements import Rearrangement
from ibpcore.wording import counted


class Normalization(NamedTuple):
    """(x - mean) / std for each channel, in pixel units; both are empty for none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Images(NamedTuple):
    """Shape of an image (channels, height, width) and number of classes of a data set."""

    in_shape: tuple[int, int, int]
    classes: int


KNOWN_DATASETS = {
    "mnist": Images((1, 28, 28), 10),
    "cifar10": Images((3, 32, 32), 10),
    "tinyimagenet": Images((3, 64, 64), 200),
}
COLOURS = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tinyimagenet": Normalization((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
PLAIN = {"mnist": Normalization(), **COLOURS}
SCALED = {"mnist": Normalization((0.1307,), (0.3081,)), **COLOURS}
SOURCES = {
    "fastibp": PLAIN,
    "expressive-losses": PLAIN,
    "sabr": PLAIN,
    "crown-ibp": PLAIN,
    "ctbench": SCALED,
    "ctrain": SCALED,
}
"""By repository and data set, copied from their code."""


def per_channel(given: Normalization, channels: int) -> Normalization:
    """A normalisation with one number for each channel; empty if it is the identity.

    Raises:
        UserError: it has another number of channels, or a standard deviation is not above 0.
    """
    if any(len(values) not in (0, 1, channels) for values in given):
        raise UserError(
            f"its normalisation has {counted(len(given.mean), 'channel')}, the images {channels}"
        )
    if not all(value > 0 for value in given.std):
        raise UserError("a standard deviation must be above 0")
    if set(given.mean) <= {0} and set(given.std) <= {1}:
        return Normalization()
    return Normalization(*(values * channels if len(values) == 1 else values for values in given))


def is_normalizing(layers: Sequence[IntervalLayer]) -> bool:
    """Whether the first layer that computes with the pixels is a normalisation."""
    moving = Rearrangement, il.IntervalFlatten
    first = next((layer for layer in layers if not isinstance(layer, moving)), None)
    return isinstance(first, il.IntervalNormalize | il.IntervalBatchNorm | Constants)
