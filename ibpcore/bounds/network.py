"""`FoldedNetwork`: a list of operators at fixed parameters, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    NonnegativeLinear,
    Observer,
    Operator,
    Relu,
    Signal,
    mapped,
    run,
)
from ibpcore.errors import UserError


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """A network at fixed parameters and batch statistics, ready for many passes.

    Attributes:
        operators: affine, channel-wise, monotone, ... in order of execution.
        footprints: sizes of intermediate results, by image shape, see `ibpcore.bounds.chunking`.
        compiled: passes are compiled, see `ibpcore.bounds.kernels`. `fold` makes none that are.
    """

    operators: tuple[Operator, ...]
    footprints: dict[Any, tuple[int, int]] = field(default_factory=dict)
    compiled: bool = False

    def __call__(self, x: Signal, observe: Observer | None = None) -> Signal:
        """Logits for a tensor (B, ...), an `Interval` of logits for an `Interval`."""
        return run(self.operators, x, observe)


def final_linear(network: FoldedNetwork) -> tuple[tuple[Operator, ...], Affine]:
    """The operators before the last linear layer, and that layer, for elision.

    Raises:
        UserError: the network does not end in a linear layer.
    """
    operators = network.operators
    if operators and isinstance(operators[-1], ChannelAffine) and _is_linear(operators[-2:-1]):
        operators = (*operators[:-2], cast(Affine, operators[-2]).then(operators[-1]))
    if not _is_linear(operators[-1:]):
        raise UserError(
            "elision merges the last linear layer, but the model does not end in an"
            " IntervalLinear: pass elide=False"
        )
    return operators[:-1], cast(Affine, operators[-1])


def _is_linear(operators: Sequence[Operator]) -> bool:
    return any(
        isinstance(operator, Affine) and operator.operation is F.linear for operator in operators
    )


def detached(network: FoldedNetwork) -> FoldedNetwork:
    """The network with constant parameters, for gradients with respect to images alone."""
    return replace(network, operators=mapped(network.operators, _detached))


def _detached(operator: Operator) -> Operator:
    if isinstance(operator, Affine):
        bias = None if operator.bias is None else operator.bias.detach()
        return replace(operator, weight=operator.weight.detach(), bias=bias)
    if isinstance(operator, ChannelAffine):
        return ChannelAffine(operator.scale.detach(), operator.shift.detach())
    return operator


def tensors_of(network: FoldedNetwork) -> list[Tensor]:
    """Its parameters, in order: what `with_tensors` takes."""
    found: list[Tensor] = []

    def seen(operator: Operator) -> Operator:
        found.extend(getattr(operator, name) for name in _tensors_in(operator))
        return operator

    mapped(network.operators, seen)
    return found


def with_tensors(network: FoldedNetwork, tensors: Sequence[Tensor]) -> FoldedNetwork:
    """The network with other parameters, in the order of `tensors_of`."""
    others = iter(tensors)

    def replaced(operator: Operator) -> Operator:
        names = _tensors_in(operator)
        values: dict[str, Any] = {name: next(others) for name in names}
        return replace(operator, **values) if names else operator

    return replace(network, operators=mapped(network.operators, replaced))


def _tensors_in(operator: Operator) -> list[str]:
    return [x.name for x in fields(operator) if isinstance(getattr(operator, x.name), Tensor)]


def compiled(network: FoldedNetwork) -> FoldedNetwork:
    """The network with its passes compiled or, where somebody observes them, their kernels."""
    return replace(network, operators=mapped(network.operators, _for_compiler), compiled=True)


def _for_compiler(operator: Operator) -> Operator:
    if isinstance(operator, Affine):
        _ = operator.weight_abs  # computed once here, not in each of the compiled passes
    return Relu(True) if isinstance(operator, Relu) else operator


def in_bfloat16(network: FoldedNetwork) -> FoldedNetwork:
    """The network with all but its first and last affine operator computed in bfloat16.

    Not sound, and never used for certificates: it says quickly where to look.
    """
    places = [i for i, operator in enumerate(network.operators) if isinstance(operator, Affine)]
    if len(places) < 3:
        return network
    first, last = places[0] + 1, places[-1]
    usual = cast(Affine, network.operators[last]).weight.dtype
    down = NonnegativeLinear(partial(torch.Tensor.to, dtype=torch.bfloat16))
    up = NonnegativeLinear(partial(torch.Tensor.to, dtype=usual))
    inner = mapped(network.operators[first:last], _in_bfloat16)
    operators = (*network.operators[:first], down, *inner, up, *network.operators[last:])
    return replace(network, operators=operators)


def _in_bfloat16(operator: Operator) -> Operator:
    if isinstance(operator, Affine):
        bias = None if operator.bias is None else operator.bias.bfloat16()
        return replace(operator, weight=operator.weight.bfloat16(), bias=bias)
    if isinstance(operator, ChannelAffine):
        return ChannelAffine(operator.scale.bfloat16(), operator.shift.bfloat16())
    return operator
