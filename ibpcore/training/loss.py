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


class StepLoss(NamedTuple):
    """What a rank makes of its samples of a batch.

    Attributes:
        loss: scalar; the mean over the ranks is the loss of the whole batch, gradient
            included.
        value: that of this rank's samples, without gradient.
        correct: how many of these are classified correctly, a scalar.
        radii: sum of the radii they were trained at, a scalar.
        slopes: what to remember of each, see `ibpcore.training.methods.base.MethodLoss`.
    """

    loss: Tensor
    value: Tensor
    correct: Tensor
    radii: Tensor
    slopes: Tensor


class _Part(NamedTuple):
    """What a method made of some samples, with nothing that keeps their bounds in memory.

    Attributes:
        loss: their mean, a scalar.
        sums: for the regularisers, see `activation_sums`; empty for none.
        radii, slopes: see `ibpcore.training.methods.base.MethodLoss`; without gradient.
    """

    loss: Tensor
    sums: Tensor
    radii: Tensor
    slopes: Tensor


def step_loss(
    model: nn.Module,
    batch: Batch,
    slopes: Tensor,
    share: float,
    config: TrainConfig,
    ranks: Ranks,
) -> StepLoss:
    """The loss of a batch, of which this rank has a share.

    Batch norm, the regularisers, and what else compares samples, see the whole batch.

    Args:
        model: in training mode.
        batch: this rank's share.
        slopes: (N,) of every image of the data set.
        share: scheduled share of epsilon_max, in [0, 1].
        ranks: who shares the batch.
    """
    weight = config.regularizer * (1 - share)
    relu_inputs: list[Tensor] | None = [] if weight > 0 else None

    def observe(operator: Operator, x: Tensor) -> None:
        if isinstance(operator, Relu) and relu_inputs is not None:
            relu_inputs.append(x)

    images, labels, samples = batch
    remembered = slopes[samples]
    logits, network = clean_pass(model, images, observe=observe, ranks=ranks)
    clean = CleanBatch(
        compiled(network) if config.compile else network,
        logits,
        images,
        labels,
        remembered[ranks.share(len(samples))],
        relu_inputs,
        remembered,
        ranks=ranks,
        weight=len(labels) * ranks.size / len(samples),
    )
    parts = [_part(part, share * config.epsilon_max, config) for part in _parts(clean, config)]
    losses = [part.loss * (len(part.radii) / len(labels)) for part in parts]
    mean = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    extra = _penalties(model, parts, weight, config, ranks)
    return StepLoss(
        clean.weight * mean + extra,
        (mean + extra).detach(),
        (logits.detach().argmax(1) == labels).sum(),
        torch.cat([part.radii for part in parts]).sum(),
        torch.cat([part.slopes for part in parts]),
    )


def _parts(batch: CleanBatch, config: TrainConfig) -> Iterator[CleanBatch]:
    """The batch after its clean pass, cut into `accumulate` parts, of sizes alike."""
    count = len(batch.labels)
    number = min(config.accumulate, count)
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


def _part(batch: CleanBatch, epsilon: float, config: TrainConfig) -> _Part:
    """What the method makes of it; of several parts each is bounded again for its gradient."""
    if config.accumulate == 1:
        return _method(batch, epsilon, config)
    batch = batch._replace(at=step_radii(batch, epsilon, config))  # sought once
    parameters, relu_inputs = tensors_of(batch.network), batch.relu_inputs or []

    def again(logits: Tensor, *tensors: Tensor) -> _Part:
        network = with_tensors(batch.network, tensors[: len(parameters)])
        inputs = None if batch.relu_inputs is None else list(tensors[len(parameters) :])
        given = batch._replace(network=network, logits=logits, relu_inputs=inputs)
        return _method(given, epsilon, config)

    # The other kind hooks into saved tensors, with which `torch.func.vjp` does not go.
    part = _Part(*checkpoint(again, batch.logits, *parameters, *relu_inputs, use_reentrant=True))
    return part._replace(radii=part.radii.detach(), slopes=part.slopes.detach())


def _method(batch: CleanBatch, epsilon: float, config: TrainConfig) -> _Part:
    result = METHODS[config.method](batch, epsilon, config)
    seen = result.activations
    sums = result.loss.new_zeros(0) if seen is None else activation_sums(seen)
    # Detached, since of whatever tensor it is given back autograd makes a part of its graph.
    return _Part(result.loss, sums, result.radii.detach(), result.slopes.detach())


def _penalties(
    model: nn.Module, parts: list[_Part], weight: float, config: TrainConfig, ranks: Ranks
) -> Tensor | float:
    """What is added to the methods' losses: regularisers of the whole batch, and L1."""
    total: Tensor | float = 0.0
    if parts[0].sums.numel() > 0:
        every = gathered(torch.cat([part.sums for part in parts]), ranks).flatten(0, 1)
        total = total + weight * warmup_regularizer(every)
    if config.l1 > 0:
        total = total + config.l1 * l1_norm(model)
    return total
