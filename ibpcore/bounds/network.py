"""`FoldedNetwork`: a list of operators with fixed parameters, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    Observer,
    Operator,
    Relu,
    Signal,
    mapped,
    run,
)
from ibpcore.errors import UserError


class Origin:
    """The origin of a network that was not folded from a model."""


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """A network with fixed parameters and batch statistics, prepared for many passes.

    Attributes:
        operators: affine, channel-wise, monotone, ... in order of execution.
        origin: the model it was folded from; networks of one origin have the same sizes.
        compiled: whether its passes are compiled; the function `compiled` sets it.
    """

    operators: tuple[Operator, ...]
    origin: object = field(default_factory=Origin)
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
    """The network with constant parameters, for gradients with respect to images only."""
    return replace(network, operators=mapped(network.operators, _detached))


def _detached(operator: Operator) -> Operator:
    values: dict[str, Any] = {n: getattr(operator, n).detach() for n in _tensors_in(operator)}
    return replace(operator, **values) if values else operator


def tensors_of(network: FoldedNetwork) -> list[Tensor]:
    """The parameters of all operators, in the order that `with_tensors` expects."""
    found: list[Tensor] = []

    def seen(operator: Operator) -> Operator:
        found.extend(getattr(operator, name) for name in _tensors_in(operator))
        return operator

    mapped(network.operators, seen)
    return found


def with_tensors(network: FoldedNetwork, tensors: Sequence[Tensor]) -> FoldedNetwork:
    """The network with other parameters, in the order and with the shapes of `tensors_of`."""
    others = iter(tensors)

    def replaced(operator: Operator) -> Operator:
        names = _tensors_in(operator)
        values: dict[str, Any] = {name: next(others) for name in names}
        return replace(operator, **values) if names else operator

    return replace(network, operators=mapped(network.operators, replaced))


def _tensors_in(operator: Operator) -> list[str]:
    return [x.name for x in fields(operator) if isinstance(getattr(operator, x.name), Tensor)]


def compiled(network: FoldedNetwork) -> FoldedNetwork:
    """The network with compiled passes; passes with an observer only use compiled kernels."""
    return replace(network, operators=mapped(network.operators, _for_compiler), compiled=True)


def _for_compiler(operator: Operator) -> Operator:
    if isinstance(operator, Affine):
        _ = operator.weight_abs  # computed once here, not in each of the compiled passes
    return Relu(True) if isinstance(operator, Relu) else operator
