"""What is inspected: a network in evaluation mode, some images and how they are bounded."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.ibp import clean_margins, margins
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn.folding import fold


class Subject(NamedTuple):
    """A network and the samples on which it is inspected.

    Attributes:
        model: in evaluation mode.
        network: folded from it.
        images: (B, C, H, W) in pixel units, with the type of the weights.
        labels: (B,).
        bounds: how balls are bounded.
    """

    model: nn.Module
    network: FoldedNetwork
    images: Tensor
    labels: Tensor
    bounds: BoundOptions

    @property
    def problem(self) -> tuple[FoldedNetwork, Tensor, Tensor]:
        """Network, images and labels: the first arguments of all bounds."""
        return self.network, self.images, self.labels

    def margins(self, epsilons: Tensor) -> Tensor:
        """R_cert by IBP at (B,) or (K, B) radii in pixel units."""
        return margins(*self.problem, epsilons, self.bounds)

    def at_zero(self) -> Tensor:
        """R(0), (B,)."""
        return clean_margins(self.network(self.images), self.labels)

    def at(self, rows: Tensor) -> Subject:
        """The subject with the samples `rows`, (n,), only."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])

    def exact(self) -> Subject:
        """A copy in float64, to distinguish rounding errors from real effects."""
        model = copy.deepcopy(self.model).double()
        return self._replace(model=model, network=fold(model), images=self.images.double())


def make_subject(model: nn.Module, images: Tensor, labels: Tensor, bounds: BoundOptions) -> Subject:
    """A `Subject` of images (B, C, H, W), labels (B,) and a copy of `model` in evaluation mode.

    Raises:
        UserError: the model does not accept such images, or a layer has no interval rule.
    """
    check_batch(images, labels, bounds.clip)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        network = fold(model)
        check_fit(network, images, labels)
    return Subject(model, network, images, labels.long(), bounds)
