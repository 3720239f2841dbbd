"""Interval layers made of other layers: chains, sums and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds.interval import Interval
from ibpcore.errors import UserError
from ibpcore.nn.layers import Clean, IntervalLayer, Operators


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
        for layer in self.layers:
            x, further = layer.clean(x, how)
            operators += further
        return x, operators


class IntervalResidual(IntervalLayer):
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

    def operators(self) -> Operators:
        return (ops.Sum(self.branch.operators(), self.shortcut.operators()),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        branch, branch_operators = self.branch.clean(x, how)
        shortcut, shortcut_operators = self.shortcut.clean(x, how)
        return branch + shortcut, (ops.Sum(branch_operators, shortcut_operators),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return self.branch(x) + self.shortcut(x)


class IntervalConcat(IntervalLayer):
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

    @property
    def branches(self) -> list[IntervalLayer]:
        return [cast(IntervalLayer, branch) for branch in self._modules.values()]

    def operators(self) -> Operators:
        return (ops.Concatenation(tuple(branch.operators() for branch in self.branches), self.dim),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        parts, operators = zip(*(branch.clean(x, how) for branch in self.branches), strict=True)
        return torch.cat(parts, self.dim), (ops.Concatenation(operators, self.dim),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return torch.cat([branch(x) for branch in self.branches], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
