"""The interface of all training methods, and building blocks that several share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.ibp import differences, largest_difference, robust_logits
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.registry import BOUNDS
from ibpcore.distributed import SINGLE_PROCESS, Ranks, summed
from ibpcore.roots.base import ZERO, constant
from ibpcore.training.config import TrainConfig
from ibpcore.training.regularizers import Activations, point_sums
from ibpcore.training.slopes import FIRST_DEVIATION

INFINITY = constant(torch.inf)


class CleanBatch(NamedTuple):
    """A batch with the results of its clean pass.

    Attributes:
        network: folded with the statistics of this batch, including their gradient.
        logits: (B, classes), clean.
        images: (B, C, H, W) in pixel units.
        labels: (B,).
        slopes: (B,) the slopes to expect, NaN for a sample that was never visited.
        relu_inputs: the inputs of the ReLU layers in the clean pass, in order, each (B, ...);
            None if no regulariser needs the activations.
        deviation: of the slopes, see `ibpcore.training.slopes.ExpectedSlopes`.
        at: the radii of the step, if known.
        ranks: the processes that share the batch.
        weight: B relative to its mean over the ranks. The mean over the ranks of weight
            times a mean over these samples is the mean over the whole batch.
    """

    network: FoldedNetwork
    logits: Tensor
    images: Tensor
    labels: Tensor
    slopes: Tensor
    relu_inputs: list[Tensor] | None = None
    deviation: Tensor | float = FIRST_DEVIATION
    at: StepRadii | None = None
    ranks: Ranks = SINGLE_PROCESS
    weight: float = 1.0

    def differences(self) -> Tensor:
        """(B, classes) f_i - f_y of the clean logits."""
        return differences(self.logits, self.labels)

    def mean_of_all(self, mean: Tensor) -> Tensor:
        """The mean over the whole batch, from the scalar `mean` over these B samples."""
        return summed(self.weight * mean, self.ranks) / self.ranks.size


class MethodLoss(NamedTuple):
    """The result of a method for one batch.

    Attributes:
        loss: scalar, with gradient, without the regularisers.
        radii: (B,) radii that were trained at, in pixel units.
        slopes: (B,) slopes (R(r) - R(0)) / r, those expected where none was found.
        activations: the input of the regularisers, if they need one.
    """

    loss: Tensor
    radii: Tensor
    slopes: Tensor
    activations: Activations | None = None


Method = Callable[[CleanBatch, float, TrainConfig], MethodLoss]
"""(batch, scheduled epsilon, configuration) -> loss."""


class Searched(NamedTuple):
    """What a search for radii saw.

    Attributes:
        at_zero: (B,) R(0).
        evaluated: (B,) whether R was evaluated beyond 0.
    """

    at_zero: Tensor
    evaluated: Tensor


class StepRadii(NamedTuple):
    """The radii that a step trains at, for all methods.

    Attributes:
        radii: (B,) in pixel units, 0 outside `rows`.
        rows: (n,) samples with a ball to bound or attack; None for all.
        search: how they were found, if the next search can start from it.
    """

    radii: Tensor
    rows: Tensor | None
    search: Searched | None = None

    def of(self, values: Tensor) -> Tensor:
        """(n, ...) those of `rows`, of the values (B, ...) of all samples."""
        return values if self.rows is None else values.index_select(0, self.rows)


def kappa_at(epsilon: float, config: TrainConfig) -> float:
    """Weight of the standard loss, which may change with epsilon (Gowal et al. 2018)."""
    if config.initial_kappa is None:
        return config.kappa
    share = epsilon / config.train_epsilon
    return config.initial_kappa + share * (config.kappa - config.initial_kappa)


def total_loss(batch: CleanBatch, robust: Tensor, epsilon: float, config: TrainConfig) -> Tensor:
    """kappa * standard + (1 - kappa) * robust loss, both scalars (eq. 11)."""
    kappa = kappa_at(epsilon, config)
    if kappa == 0:
        return robust
    return kappa * F.cross_entropy(batch.logits, batch.labels) + (1 - kappa) * robust


def on_rows(at: StepRadii, clean: Callable[[], Tensor], inside: Callable[[], Tensor]) -> Tensor:
    """(B, ...): the result of `inside`, (n, ...), for `at.rows`, and of `clean` elsewhere.

    At radius 0 a ball is a point, so every bound and every attack gives the clean value.
    """
    if at.rows is None:
        return inside()
    return clean().index_copy(0, at.rows, inside()) if len(at.rows) > 0 else clean()


def observed(batch: CleanBatch, at: StepRadii) -> Activations | None:
    """An observer for the interval pass over `at.rows`, if a regulariser needs one.

    It takes the inputs of the ReLU layers from the batch.
    """
    if batch.relu_inputs is None:
        return None
    activations = Activations()
    if at.rows is not None and len(at.rows) < len(at.radii):
        marked = torch.zeros_like(at.radii, dtype=torch.int8).index_fill(0, at.rows, 1)
        # Their number is known, whereas a boolean index would make the host wait on CUDA.
        others = marked.argsort(stable=True)[: len(at.radii) - len(at.rows)]
        activations.points = [point_sums(x.index_select(0, others)) for x in batch.relu_inputs]
    # Nothing else reads them, and their memory is needed for the interval pass.
    batch.relu_inputs.clear()
    return activations


def bounded_logits(
    batch: CleanBatch, at: StepRadii, config: TrainConfig, observe: Activations | None
) -> Tensor:
    """(B, classes) bounds on f_i - f_y over each sample's ball, by `config.train_bound`."""
    options = config.bound_options

    def inside() -> Tensor:
        images, labels, radii = (at.of(x) for x in (batch.images, batch.labels, at.radii))
        balls = (batch.network, images, labels, radii, options)
        if options.bound == "ibp":
            return robust_logits(*balls, observe)
        if observe is not None:
            robust_logits(*balls, observe)  # the regularisers are about IBP's intervals
        return BOUNDS[options.bound].robust_logits(*balls)

    return on_rows(at, batch.differences, inside)


@torch.no_grad()
def slopes_to(batch: CleanBatch, robust: Tensor, at: StepRadii) -> Tensor:
    """(R(r) - R(0)) / r, (B,), from bounds (B, classes) at the radii of a search.

    The expected slope where that is not finite and positive.
    """
    if at.search is None:
        return batch.slopes
    rise = largest_difference(robust, batch.labels) - at.search.at_zero
    return _positive(rise / at.radii, batch.slopes)


@torch.no_grad()
def secants(batch: CleanBatch, at: StepRadii) -> Tensor:
    """`slopes_to` without bounds at the radii, (B,): R is 0 there.

    Where a radius is epsilon instead of a root, this overestimates the slope.
    """
    if at.search is None:
        return batch.slopes
    # What was not evaluated would only confirm what was expected.
    found = _positive(-at.search.at_zero / at.radii, batch.slopes)
    return torch.where(at.search.evaluated, found, batch.slopes)


def _positive(slopes: Tensor, others: Tensor) -> Tensor:
    """`slopes` where they are finite and positive, `others` elsewhere, each (B,)."""
    slopes = slopes.to(others.dtype)
    return torch.where((slopes > ZERO) & (slopes < INFINITY), slopes, others)
