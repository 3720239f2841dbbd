"""What is inspected: a network in evaluation, some images, and the kind of ball."""

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
    """A network and the samples that it is inspected at.

    Attributes:
        model: in evaluation mode.
        network: folded from it.
        images: (B, C, H, W) in pixel units, of the type of the weights.
        labels: (B,).
        bounds: how balls are bounded.
    """

    model: nn.Module
    network: FoldedNetwork
    images: Tensor
    labels: Tensor
    bounds: BoundOptions

    def margins(self, epsilons: Tensor) -> Tensor:
        """R_cert by IBP at (B,) or (K, B) radii."""
        return margins(self.network, self.images, self.labels, epsilons, self.bounds)

    def at_zero(self) -> Tensor:
        """R(0), (B,)."""
        return clean_margins(self.network(self.images), self.labels)

    def at(self, rows: Tensor) -> Subject:
        """The same with these samples only."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])

    def exact(self) -> Subject:
        """The same in float64: a copy, by which rounding is told from what is real."""
        model = copy.deepcopy(self.model).double()
        return self._replace(model=model, network=fold(model), images=self.images.double())


def make_subject(model: nn.Module, images: Tensor, labels: Tensor, bounds: BoundOptions) -> Subject:
    """A `Subject`, from a copy of `model` in evaluation mode: the model stays as it is.

    Raises:
        UserError: the model does not take such images, or has no rule for a layer.
    """
    check_batch(images, labels, bounds.clip)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        network = fold(model)
        check_fit(network, images, labels)
    return Subject(model, network, images, labels.long(), bounds)
