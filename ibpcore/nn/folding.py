"""From a model to the operators that bound it, with batch norm merged into convolutions."""

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
    """The network of operators for `model` in evaluation mode, for many fast bound passes.

    Batch norm uses the running statistics and is merged into the convolutions before it. Later
    changes of the model do not affect the result.

    Raises:
        UserError: a layer has no interval rule, or batch norm is in training mode.
    """
    return _copied(_folded(model, _interval_model(model).operators()))


def clean_pass(
    model: nn.Module,
    images: Tensor,
    track: bool = True,
    observe: CleanObserver | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    bounds: bool = True,
) -> tuple[Tensor, FoldedNetwork]:
    """Clean logits, and the network folded with the statistics of this batch.

    A training step calls it once: in training mode batch norm uses the statistics of `images`,
    and all interval passes through the returned network use the same ones, gradient included.

    Args:
        model: interval layers, in training or evaluation mode.
        images: (B, C, H, W) in pixel units.
        track: whether the running statistics are updated, as by a usual forward pass.
        observe: see `Clean`.
        ranks: the processes whose `images` together define the batch statistics.
        bounds: whether interval passes follow; if not, the network is empty.

    Returns:
        logits (B, classes) and the folded network. It shares the parameters that were not
        merged, so it must not be used after they change.
    """
    how = Clean(track, observe, ranks, bounds)
    logits, operators = _interval_model(model).clean(images, how)
    return logits, _folded(model, operators if bounds else ())


def _folded(model: nn.Module, operators: Sequence[Operator]) -> FoldedNetwork:
    return FoldedNetwork(mapped(merge(operators), _channels_last), origin=model)


def _channels_last(operator: Operator) -> Operator:
    """Convolutions use the memory format of their weights; this one is faster."""
    if isinstance(operator, Affine) and operator.weight.dim() == 4:
        weight = operator.weight
        if not weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.to(memory_format=torch.channels_last)
            return replace(operator, weight=weight, absolute=None)
    return operator


def _copied(network: FoldedNetwork) -> FoldedNetwork:
    """The network with copies of its parameters, which a later optimiser step cannot change.

    Otherwise the weight would be new but the cached |weight| old. Results of `merge` are no
    parameters and need no copy.
    """

    def copied(operator: Operator) -> Operator:
        if isinstance(operator, Affine) and operator.weight.is_leaf:
            bias = None if operator.bias is None else operator.bias.clone()
            return replace(operator, weight=operator.weight.clone(), bias=bias, absolute=None)
        return operator

    return replace(network, operators=mapped(network.operators, copied))


def _interval_model(model: nn.Module) -> IntervalLayer:
    check_supported(model)
    return cast(IntervalLayer, model)


def as_folded(model: nn.Module | FoldedNetwork, images: Tensor) -> FoldedNetwork:
    """The folded network of `model`; in training mode with the statistics of `images` (B, ...)."""
    if isinstance(model, FoldedNetwork):
        return model
    model = _interval_model(model)
    if model.training:
        return _copied(clean_pass(model, images, track=False)[1])
    return fold(model)
