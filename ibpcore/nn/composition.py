"""Interval layers made of other layers: chains, sums, products and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds.interval import Interval
from ibpcore.errors import UserError
from ibpcore.nn.layers import Clean, IntervalLayer, Operators
from ibpcore.nn.normalized import paired


class IntervalSequential(IntervalLayer, nn.Sequential):
    """`nn.Sequential` of interval layers; an empty one is the identity."""

    twins = (nn.Sequential,)
    arguments = ("layers",)

    @classmethod
    def of(cls, **arguments: Any) -> IntervalLayer:
        return cls(*arguments["layers"])

    @property
    def layers(self) -> list[IntervalLayer]:
        return [cast(IntervalLayer, layer) for layer in self]

    def operators(self) -> Operators:
        return tuple(chain.from_iterable(layer.operators() for layer in self.layers))

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        operators: Operators = ()
        for layer in paired(self.layers):
            x, further = layer.clean(x, how)
            operators += further
        return x, operators


class Fork(IntervalLayer):
    """Base class of layers that join the outputs of branches for the same input: `joint`."""

    @property
    def branches(self) -> list[IntervalLayer]:
        return [cast(IntervalLayer, branch) for branch in self._modules.values()]

    def joint(self, branches: Sequence[Operators]) -> ops.Fork:
        """The operator that joins branches with these operators."""
        raise NotImplementedError

    def operators(self) -> Operators:
        return (self.joint([branch.operators() for branch in self.branches]),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        parts, operators = zip(*(branch.clean(x, how) for branch in self.branches), strict=True)
        joint = self.joint(operators)
        return joint.join(parts), (joint,)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        parts = [branch(x) for branch in self.branches]
        return self.joint([()] * len(parts)).join(parts)


class IntervalResidual(Fork):
    """The residual sum branch(x) + shortcut(x).

    Args:
        branch: an interval layer, usually an `IntervalSequential`.
        shortcut: another one whose output has the same shape; None for the identity.
    """

    arguments = ("branch", "shortcut")

    def __init__(self, branch: IntervalLayer, shortcut: IntervalLayer | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = IntervalSequential() if shortcut is None else shortcut

    def joint(self, branches: Sequence[Operators]) -> ops.Fork:
        return ops.Sum(*branches)


class IntervalProduct(Fork):
    """The product first(x) * second(x), such as a squeeze-and-excitation block.

    Args:
        first: an interval layer, usually an `IntervalSequential`.
        second: another one whose output has the same shape; None for the identity.
    """

    arguments = ("first", "second")

    def __init__(self, first: IntervalLayer, second: IntervalLayer | None = None) -> None:
        super().__init__()
        self.first = first
        self.second = IntervalSequential() if second is None else second

    def joint(self, branches: Sequence[Operators]) -> ops.Fork:
        return ops.Product(*branches)


class IntervalConcat(Fork):
    """The outputs of several branches for the same input, concatenated (`torch.cat`).

    Args:
        branches: interval layers, usually `IntervalSequential`s; an empty one is the identity.
        dim: the dimension of the concatenation, at least 1; 1 for the channels.

    Raises:
        UserError: there are no branches, or `dim` is below 1.
    """

    arguments = ("branches", "dim")

    def __init__(self, branches: Sequence[IntervalLayer], dim: int = 1) -> None:
        super().__init__()
        if not branches or dim < 1:
            raise UserError("a concatenation needs branches and a dimension of at least 1")
        self.dim = dim
        for number, branch in enumerate(branches):
            self.add_module(str(number), branch)

    def joint(self, branches: Sequence[Operators]) -> ops.Fork:
        return ops.Concatenation(tuple(branches), self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
