"""Normalisations that training code of other repositories applies outside the model."""

from __future__ import annotations

from typing import NamedTuple


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
