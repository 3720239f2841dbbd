"""From a model to the steps that bound it: batch norm merged, |W| computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.errors import UserError
from ibpcore.layers import IntervalLayer, check_supported
from ibpcore.steps import Affine, Observer, Signal, Step, Sum, merge, run


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """A network at fixed parameters and batch statistics, ready for many passes.

    Attributes:
        steps: affine, channel-wise, monotone, ... in order of execution.
    """

    steps: tuple[Step, ...]

    def __call__(self, x: Signal, observe: Observer | None = None) -> Signal:
        """Logits for a tensor (B, ...), an `Interval` of logits for an `Interval`."""
        return run(self.steps, x, observe)


def fold(model: nn.Module) -> FoldedNetwork:
    """`model` in evaluation, its batch norm (running statistics) folded away.

    Raises:
        UserError: a layer has no interval rule, or batch norm is in training mode.
    """
    return _folded(_interval_model(model).steps())


def clean_pass(
    model: nn.Module, images: Tensor, track: bool = True
) -> tuple[Tensor, FoldedNetwork]:
    """Clean logits, and the network folded with the statistics of this very batch.

    In training mode batch norm uses the statistics of `images`, and so does the folded
    network, gradient included: every interval pass of a step shares them.

    Args:
        model: interval layers, in training or evaluation mode.
        images: (B, C, H, W) in pixel units.
        track: update the running statistics as any forward pass in training does.

    Returns:
        logits (B, classes) and the folded network.
    """
    logits, steps = _interval_model(model).clean(images, track)
    return logits, _folded(steps)


def _folded(steps: Sequence[Step]) -> FoldedNetwork:
    return FoldedNetwork(tuple(_snapshot(step) for step in merge(steps)))


def _snapshot(step: Step) -> Step:
    """The step with parameters of its own, so that a later optimiser step cannot reach it.

    Otherwise the weight would be new and the |weight| computed before it old. What `merge`
    made is its own already.
    """
    if isinstance(step, Sum):
        return Sum(*(tuple(map(_snapshot, part)) for part in (step.branch, step.shortcut)))
    if isinstance(step, Affine) and step.weight.is_leaf:
        bias = None if step.bias is None else step.bias.clone()
        return Affine(step.weight.clone(), bias, step.operation)
    return step


def _interval_model(model: nn.Module) -> IntervalLayer:
    check_supported(model)
    return cast(IntervalLayer, model)


def final_linear(network: FoldedNetwork) -> tuple[tuple[Step, ...], Affine]:
    """The steps before the last linear layer, and that layer, for elision.

    Raises:
        UserError: the network does not end in a linear layer.
    """
    last = network.steps[-1] if network.steps else None
    if not (isinstance(last, Affine) and last.operation is F.linear):
        raise UserError(
            "elision merges the last linear layer, but the model does not end in an"
            " IntervalLinear: pass elide=False"
        )
    return network.steps[:-1], last
