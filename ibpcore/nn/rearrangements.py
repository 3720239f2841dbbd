"""Interval layers that move, drop or repeat numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ibpcore.bounds import operators as ops
from ibpcore.errors import UserError
from ibpcore.nn.layers import ByOperators, IntervalLayer, Operators


class IntervalFlatten(IntervalLayer, nn.Flatten):
    """`nn.Flatten` for intervals."""

    twins = (nn.Flatten,)
    arguments = ("start_dim", "end_dim")

    def operators(self) -> Operators:
        return (ops.NonnegativeLinear(self.applied),)

    def applied(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.dim() == 4 and not x.is_contiguous():
            return _Flattened.apply(x, self.start_dim, self.end_dim)
        return nn.Flatten.forward(self, x)


class _Flattened(torch.autograd.Function):
    """`torch.flatten` of images, whose gradient has their memory format.

    Operators on two formats, as of a gradient and a saved relu, take up to twenty times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, start_dim: int, end_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        return x.flatten(start_dim, end_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x).copy_(grad.view(x.shape)), None, None


class Rearrangement(ByOperators):
    """Base class of layers with one argument that move, drop or repeat numbers: `rearranged`."""

    def rearranged(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def operators(self) -> Operators:
        return (ops.NonnegativeLinear(self.rearranged),)

    def extra_repr(self) -> str:
        return f"{getattr(self, *self.arguments)}"


class IntervalReshape(Rearrangement):
    """Reshapes each sample, as `nn.Unflatten` or `x.reshape(len(x), *shape)` does.

    Args:
        shape: the new shape of a sample, without the batch dimension.
    """

    arguments = ("shape",)

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def rearranged(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


class IntervalPermute(Rearrangement):
    """`torch.permute` for intervals.

    Args:
        dims: the new order of all dimensions; the first must be 0, the batch.

    Raises:
        UserError: it is not such an order.
    """

    arguments = ("dims",)

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        if sorted(self.dims) != list(range(len(self.dims))) or self.dims[0] != 0:
            raise UserError(f"dims must be 0 followed by the others in any order, got {self.dims}")

    def rearranged(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class IntervalZeroPad(Rearrangement):
    """Pads the input with zeros, as `nn.ZeroPad2d` does; their radius is 0.

    Args:
        padding: as for `F.pad`, starting with the last dimension; negative numbers crop.
    """

    arguments = ("padding",)

    def __init__(self, padding: Sequence[int]) -> None:
        super().__init__()
        self.padding = tuple(padding)

    def rearranged(self, x: Tensor) -> Tensor:
        if len(self.padding) > 2 * (x.dim() - 1):
            raise UserError(f"padding {self.padding} would add images to {tuple(x.shape)}")
        return F.pad(x, self.padding)


class IntervalSlice(Rearrangement):
    """Selects a part of each sample, as `x[:, start:stop:step, ...]` does.

    Args:
        ranges: (start, stop, step) for each dimension but the batch; step at least 1.
    """

    arguments = ("ranges",)

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.ranges = [list(numbers) for numbers in ranges]

    def rearranged(self, x: Tensor) -> Tensor:
        index = (slice(None), *(slice(*numbers) for numbers in self.ranges))
        return x[index]


class IntervalIndexSelect(ByOperators):
    """Selects places along one dimension in any order, as `torch.index_select` does.

    Args:
        indices: the places, each at least 0.
        dim: the dimension, at least 1.

    Raises:
        UserError: an index or `dim` is out of this range, or there are no indices.
    """

    arguments = ("indices", "dim")

    def __init__(self, indices: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        self.indices, self.dim = list(indices), dim
        if dim < 1 or min(self.indices, default=-1) < 0:
            raise UserError(f"indices must be at least 0 and dim at least 1, got {indices}, {dim}")

    def selected(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, torch.tensor(self.indices, device=x.device))

    def operators(self) -> Operators:
        return (ops.NonnegativeLinear(self.selected),)

    def extra_repr(self) -> str:
        return f"{self.indices}, dim={self.dim}"


class IntervalUpsample(Rearrangement):
    """`nn.Upsample` of mode "nearest" by whole factors, for images (B, C, H, W).

    Args:
        factors: how often each row and each column is repeated, at least 1.

    Raises:
        UserError: they are not two such numbers.
    """

    twins = (nn.Upsample,)
    arguments = ("factors",)

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        if len(self.factors) != 2 or min(self.factors) < 1:
            raise UserError(f"factors must be two numbers of at least 1, got {self.factors}")

    def rearranged(self, x: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.factors, x.shape[2:]
        spread = x[:, :, :, None, :, None].expand(-1, -1, -1, rows, -1, columns)
        return spread.reshape(*x.shape[:2], height * rows, width * columns)
