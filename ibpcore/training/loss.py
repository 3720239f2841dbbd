"""The loss of a training step: clean pass, radii, interval passes, regularisers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibpcore.bounds.network import compiled, tensors_of, with_tensors
from ibpcore.bounds.operators import Operator, Relu
from ibpcore.data.batches import Batch
from ibpcore.distributed import Ranks, gathered
from ibpcore.nn.folding import clean_pass
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods import METHODS, CleanBatch
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.regularizers import activation_sums, l1_norm, warmup_regularizer
from ibpcore.training.slopes import ExpectedSlopes


class StepLoss(NamedTuple):
    """The loss of one rank's share of a batch.

    Attributes:
        loss: scalar; its mean over the ranks, and that of its gradient, are those of the
            whole batch.
        correct: number of this rank's samples that are classified correctly, a scalar.
        radii: sum of the radii at which they are trained, a scalar.
        slopes: (B,) see `ibpcore.training.methods.base.MethodLoss`.
    """

    loss: Tensor
    correct: Tensor
    radii: Tensor
    slopes: Tensor


class _PartLoss(NamedTuple):
    """A `MethodLoss` of some samples with `activation_sums` (None if no regulariser needs them)
    instead of activations, so that no bounds stay in memory; radii and slopes have no gradient."""

    loss: Tensor
    sums: Tensor | None
    radii: Tensor
    slopes: Tensor


class TrainingLoss(nn.Module):
    """The loss of a step as a module: DistributedDataParallel averages gradients of modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(model.parameters())
        # A tuple hides the model's buffers, which would otherwise be broadcast in each step:
        # they are computed from sums over all ranks and have the same bits on each.
        self._models = (model,)

    def forward(
        self,
        batch: Batch,
        expected: ExpectedSlopes,
        share: float,
        config: TrainConfig,
        ranks: Ranks,
    ) -> StepLoss:
        """The loss of a batch, of which each rank has a share.

        Batch norm, the regularisers and whatever else compares samples use the whole batch.

        Args:
            batch: this rank's share, for a model in training mode.
            expected: the slopes of the whole batch.
            share: scheduled share of the largest epsilon, in [0, 1].
            ranks: the ranks that share the batch.
        """
        (model,) = self._models
        weight = config.regularizer * (1 - share)
        clean = _clean_batch(model, batch, expected, weight > 0, config, ranks)
        epsilon = share * config.train_epsilon
        parts = [_part_loss(part, epsilon, config) for part in _split(clean, config)]
        losses = [
            _scaled(part.loss, len(part.radii) / len(batch.labels) * clean.weight) for part in parts
        ]
        terms = [*losses, *_penalties(model, parts, weight, config, ranks)]
        right = clean.logits.argmax(1) == batch.labels
        return StepLoss(
            terms[0] if len(terms) == 1 else torch.stack(terms).sum(),
            right.count_nonzero(),
            _joined([part.radii for part in parts]).sum(),
            _joined([part.slopes for part in parts]),
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """(B, ...) the parts of a batch, without an operator for a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """`factor * x`, without an operator for factor 1."""
    return x if factor == 1 else factor * x


def _clean_batch(
    model: nn.Module,
    batch: Batch,
    expected: ExpectedSlopes,
    regularized: bool,
    config: TrainConfig,
    ranks: Ranks,
) -> CleanBatch:
    """The batch after its clean pass, with the inputs of its ReLUs if it is `regularized`."""
    relu_inputs: list[Tensor] | None = [] if regularized else None

    def observe(operator: Operator, x: Tensor) -> None:
        if isinstance(operator, Relu) and relu_inputs is not None:
            relu_inputs.append(x)

    images, labels, samples = batch
    bounds = config.method != "standard"
    logits, network = clean_pass(model, images, observe=observe, ranks=ranks, bounds=bounds)
    return CleanBatch(
        compiled(network) if config.compile == "on" else network,
        logits,
        images,
        labels,
        expected.slopes if ranks.size == 1 else expected.slopes[ranks.share(len(samples))],
        relu_inputs,
        expected.deviation,
        ranks=ranks,
        weight=len(labels) * ranks.size / len(samples),
    )


def _split(batch: CleanBatch, config: TrainConfig) -> Iterator[CleanBatch]:
    """The batch in `accumulate` parts, whose sizes differ by at most one."""
    count = len(batch.labels)
    number = min(config.accumulate or 1, count)
    if number == 1:
        yield batch
        return
    for index in range(number):
        some = slice(count * index // number, count * (index + 1) // number)
        inputs = batch.relu_inputs
        yield batch._replace(
            logits=batch.logits[some],
            images=batch.images[some],
            labels=batch.labels[some],
            slopes=batch.slopes[some],
            relu_inputs=None if inputs is None else [x[some] for x in inputs],
        )


def _part_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> _PartLoss:
    """The method's loss; if there are several parts, each is bounded again in the backward pass."""
    if config.accumulate in (None, 1):
        return _method_loss(batch, epsilon, config)
    batch = batch._replace(at=step_radii(batch, epsilon, config))  # searched for only once
    parameters, relu_inputs = tensors_of(batch.network), batch.relu_inputs or []

    def again(logits: Tensor, *tensors: Tensor) -> _PartLoss:
        network = with_tensors(batch.network, tensors[: len(parameters)])
        inputs = None if batch.relu_inputs is None else list(tensors[len(parameters) :])
        given = batch._replace(network=network, logits=logits, relu_inputs=inputs)
        part = _method_loss(given, epsilon, config)
        # Detached: the reentrant checkpoint makes every tensor that is returned part of its graph,
        # and the batch's own slopes would lead its backward pass into itself, without end.
        return part._replace(radii=part.radii.detach(), slopes=part.slopes.detach())

    # The non-reentrant kind uses saved-tensor hooks, which `torch.func.vjp` does not support.
    outputs = checkpoint(again, batch.logits, *parameters, *relu_inputs, use_reentrant=True)
    part = _PartLoss(*outputs)
    # The reentrant checkpoint makes every tensor that is returned part of the graph.
    return part._replace(radii=part.radii.detach(), slopes=part.slopes.detach())


def _method_loss(batch: CleanBatch, epsilon: float, config: TrainConfig) -> _PartLoss:
    result = METHODS[config.method](batch, epsilon, config)
    seen = result.activations
    sums = None if seen is None else activation_sums(seen)
    return _PartLoss(result.loss, sums, result.radii, result.slopes)


def _penalties(
    model: nn.Module, parts: list[_PartLoss], weight: float, config: TrainConfig, ranks: Ranks
) -> Iterator[Tensor]:
    """The terms added to the method's loss: regularisers of the whole batch, and L1; scalars."""
    sums = [part.sums for part in parts if part.sums is not None]
    if sums:
        every = gathered(torch.cat(sums), ranks).flatten(0, 1)
        yield weight * warmup_regularizer(every)
    if config.l1 > 0:
        yield config.l1 * l1_norm(model)
