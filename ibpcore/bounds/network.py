"""`FoldedNetwork`: a list of operators with fixed parameters, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    Fork,
    Nonlinear,
    Observer,
    Operator,
    Signal,
    mapped,
    run,
)
from ibpcore.errors import UserError
from ibpcore.precision import without_autocast


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
        """Logits for a tensor (B, ...), an `Interval` of logits for an `Interval`.

        Autocast affects logits only.
        """
        execute = without_autocast(run) if isinstance(x, Interval) else run
        return execute(self.operators, x, observe)


def final_linear(network: FoldedNetwork, elide: bool) -> tuple[tuple[Operator, ...], Affine | None]:
    """The operators before the last linear layer, and that layer, to be merged into margins.

    All operators and None without `elide`, or for a network with another last layer.
    """
    operators = network.operators
    last = operators[-1] if operators else None
    if isinstance(last, ChannelAffine) and last.per_channel and _is_linear(operators[-2:-1]):
        operators = (*operators[:-2], cast(Affine, operators[-2]).then(last))
    if not elide or not _is_linear(operators[-1:]):
        return network.operators, None
    return operators[:-1], cast(Affine, operators[-1])


def split(network: FoldedNetwork, size: int) -> tuple[FoldedNetwork, FoldedNetwork]:
    """The network in two parts, cut after a nonlinear operator; the second has `size` of them.

    A fork is not cut: where one has more nonlinear operators than are left, all of them belong to
    the second part. The first part is empty if the second has all nonlinear operators.

    Raises:
        UserError: the network has fewer.
    """
    numbers = [_nonlinear(operator) for operator in network.operators]
    if sum(numbers) == 0:
        raise UserError("a network without nonlinear layers has no classifier to attack")
    if sum(numbers) < size:
        raise UserError(
            f"classifier_size must be at most {sum(numbers)}, the number of nonlinear layers of"
            f" the network, but is {size}"
        )
    place = max(i for i in range(len(numbers)) if sum(numbers[i:]) >= size)
    while place > 0 and numbers[place - 1] == 0:
        place -= 1
    parts = network.operators[:place], network.operators[place:]
    first, second = (replace(network, operators=part, origin=Origin()) for part in parts)
    return first, second


def _nonlinear(operator: Operator) -> int:
    if isinstance(operator, Fork):
        return sum(_nonlinear(inner) for branch in operator.branches for inner in branch)
    return int(isinstance(operator, Nonlinear))


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
    """The network with compiled passes."""

    def prepared(operator: Operator) -> Operator:
        if isinstance(operator, Affine):
            _ = operator.weight_abs  # computed once here, not in each of the compiled passes
        return operator

    return replace(network, operators=mapped(network.operators, prepared), compiled=True)
