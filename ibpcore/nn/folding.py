"""From a model to the operators that bound it: batch norm merged, |W| computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import Affine, Operator, mapped, merge
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.nn.layers import Clean, CleanObserver, IntervalLayer, check_supported


def fold(model: nn.Module) -> FoldedNetwork:
    """`model` in evaluation, its batch norm (running statistics) folded away.

    Raises:
        UserError: a layer has no interval rule, or batch norm is in training mode.
    """
    return _folded(model, _interval_model(model).operators())


def clean_pass(
    model: nn.Module,
    images: Tensor,
    track: bool = True,
    observe: CleanObserver | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[Tensor, FoldedNetwork]:
    """Clean logits, and the network folded with the statistics of this very batch.

    In training mode batch norm uses the statistics of `images`, and so does the folded
    network, gradient included: every interval pass of a step shares them.

    Args:
        model: interval layers, in training or evaluation mode.
        images: (B, C, H, W) in pixel units.
        track: update the running statistics as any forward pass in training does.
        observe: is shown each operator and the batch that its layer reads.
        ranks: whose `images` together are the batch that the statistics are of.

    Returns:
        logits (B, classes) and the folded network.
    """
    logits, operators = _interval_model(model).clean(images, Clean(track, observe, ranks))
    return logits, _folded(model, operators)


def _folded(model: nn.Module, operators: Sequence[Operator]) -> FoldedNetwork:
    return FoldedNetwork(mapped(merge(operators), _snapshot), origin=model)


def _snapshot(operator: Operator) -> Operator:
    """The operator with parameters of its own, so that a later optimiser step cannot reach it.

    Otherwise the weight would be new and the |weight| computed before it old. What `merge`
    made is its own already.
    """
    if isinstance(operator, Affine):
        weight, bias = operator.weight, operator.bias
        if weight.is_leaf:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        if weight.dim() == 4:
            # Convolutions follow the layout of their weights; this one is the faster.
            weight = weight.to(memory_format=torch.channels_last)
        return replace(operator, weight=weight, bias=bias)
    return operator


def _interval_model(model: nn.Module) -> IntervalLayer:
    check_supported(model)
    return cast(IntervalLayer, model)


def as_folded(model: nn.Module | FoldedNetwork, images: Tensor) -> FoldedNetwork:
    """The folded network of `model`; in training mode with the statistics of `images`."""
    if isinstance(model, FoldedNetwork):
        return model
    return clean_pass(model, images, track=False)[1] if model.training else fold(model)
