"""Operators: layers as pure functions of a tensor or an interval, with fixed parameters.

A model is folded into operators once (`ibpcore.nn.folding`): batch norm is merged into the
affine operator before it, and |W| is computed only once. The operators then run at any number
of radii. They are values: running them stores no bounds.

For linear bounds (`ibpcore.bounds.crown`) a linear operator has a method `transposed`, and the
others have the two `lines` that enclose them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeAlias, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds import relaxations
from ibpcore.bounds.interval import Interval, between
from ibpcore.bounds.kernels import interval_relu
from ibpcore.bounds.products import interval_linear
from ibpcore.bounds.relaxations import Lines, Relaxation, clipped
from ibpcore.errors import UserError
from ibpcore.wording import counted

Signal = TypeVar("Signal", Tensor, Interval)


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> operation(x, weight, bias); |weight| is applied to the radius (eq. 16-17).

    Attributes:
        weight: (out, ...), output channels first.
        bias: (out,) or None.
        operation: linear in its first argument, e.g. `F.linear`.
        transpose: maps coefficients of the output (N, ...), the weight and the shape of the
            input (N, ...) to coefficients of the input. None for autograd, which takes two
            to four times as long.
        absolute: |weight|, if it is known.
    """

    weight: Tensor
    bias: Tensor | None
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transpose: Callable[[Tensor, Tensor, torch.Size], Tensor] | None = None
    absolute: Tensor | None = None

    @cached_property
    def weight_abs(self) -> Tensor:
        if self.absolute is not None:
            return self.absolute
        # The first pass may run without gradient (at a candidate radius), but the loss
        # pass shares this tensor and needs its graph.
        with torch.set_grad_enabled(self.weight.requires_grad):
            return with_strides_of(self.weight, self.weight.abs())

    def __call__(self, x: Signal) -> Signal:
        if not isinstance(x, Interval):
            return self.operation(x, self.weight, self.bias)
        if self.operation is F.linear and x.mid.dim() == 2:
            mid, rad = interval_linear(x.mid, x.rad, self.weight, self.weight_abs, self.bias)
        else:
            mid = self.operation(x.mid, self.weight, self.bias)
            rad = self.operation(x.rad, self.weight_abs, None)
        return Interval(mid=mid, rad=rad)

    def transposed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Maps coefficients (N, ...) of the output to those of the input, of `shape`."""
        if self.transpose is None:
            return _adjoint(lambda x: self.operation(x, self.weight, None), rows, shape)
        return self.transpose(rows, self.weight, shape)

    def multiplications(self, x: Tensor) -> int:
        """Number of multiplications for the input `x`, (B, ...)."""
        return self.operation(x, self.weight, None).numel() * self.weight[0].numel()

    def then(self, channels: ChannelAffine) -> Affine:
        """This operator and the channel-wise one after it, merged into one."""
        scale = channels.scale.view(-1, *[1] * (self.weight.dim() - 1))
        bias = channels.shift if self.bias is None else self.bias * channels.scale + channels.shift
        return replace(self, weight=self.weight * scale, bias=bias, absolute=None)


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """x -> scale * x + shift, elementwise; |scale| is applied to the radius.

    Attributes:
        scale, shift: (channels,) each, for dimension 1 of the input; or both of two or more
            dimensions and broadcast as usual, for numbers that differ within a channel.
    """

    scale: Tensor
    shift: Tensor

    @cached_property
    def scale_abs(self) -> Tensor:
        # See `Affine.weight_abs`.
        with torch.set_grad_enabled(self.scale.requires_grad):
            return self.scale.abs()

    def __call__(self, x: Signal) -> Signal:
        if isinstance(x, Interval):
            scale, scale_abs = (along_channels(s, x.mid) for s in (self.scale, self.scale_abs))
            return Interval(mid=self._applied(x.mid, scale), rad=x.rad * scale_abs)
        return self._applied(x, along_channels(self.scale, x))

    def _applied(self, x: Tensor, scale: Tensor) -> Tensor:
        # `addcmul` is one operator, but the gradient of a broadcast one takes twice as many.
        return (x * scale).add_(along_channels(self.shift, x))

    def transposed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Maps coefficients (N, ...) of the output to those of the input."""
        return rows * along_channels(self.scale, rows)

    @property
    def per_channel(self) -> bool:
        """Whether there is one number per channel."""
        return self.scale.dim() == 1

    def then(self, other: ChannelAffine) -> ChannelAffine:
        """This operator and another one after it, merged; both per channel or both not."""
        return ChannelAffine(
            self.scale * other.scale, torch.addcmul(other.shift, self.shift, other.scale)
        )


def with_strides_of(weight: Tensor, other: Tensor) -> Tensor:
    """`other`, computed from `weight` number by number, with the same strides.

    Those of sides of length 1 may differ. By them a convolution chooses the memory format of its
    output, which has to be the same for midpoint and radius: otherwise all that uses both is slow.
    """
    if other.stride() == weight.stride() or not weight.is_contiguous():
        return other
    return other.as_strided(weight.shape, weight.stride())


def along_channels(constant: Tensor, x: Tensor) -> Tensor:
    """`constant` in a shape that broadcasts against `x`, (B, channels, ...).

    Args:
        constant: (channels,), for dimension 1 of `x`; or of two or more dimensions, unchanged.

    Raises:
        UserError: `x` has a different number of channels, or another shape.
    """
    if constant.dim() != 1:
        if not _broadcasts(constant.shape, x.shape):
            raise UserError(
                f"a constant of shape {tuple(constant.shape)} does not fit {tuple(x.shape)}"
            )
        return constant
    if x.dim() < 2 or x.shape[1] != len(constant):
        raise UserError(
            f"a layer of {counted(len(constant), 'channel')} cannot read shape {tuple(x.shape)}"
        )
    return constant if x.dim() == 2 else constant.view(-1, *[1] * (x.dim() - 2))


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    """Whether `shape` broadcasts to each sample of a batch of shape `onto`, (B, ...)."""
    if len(shape) > len(onto) or (len(shape) == len(onto) and shape[0] != 1):
        return False
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return all(size in (1, other) for size, other in pairs)


@dataclass(frozen=True)
class Monotone:
    """A non-decreasing map, applied to both ends: activations and max pooling (eq. 18-19).

    Attributes:
        function: of a tensor (B, ...).
        lines: its linear relaxation, if elementwise; None to use its ends as constant bounds.
        other_lines: with another lower line. Whatever lies between two lower lines is one, too, so
            that the best of them can be searched for; None for a single choice.
    """

    function: Callable[[Tensor], Tensor]
    lines: Relaxation | None = None
    other_lines: Relaxation | None = None

    def __call__(self, x: Signal) -> Signal:
        return x.monotone(self.function) if isinstance(x, Interval) else self.function(x)


@dataclass(frozen=True)
class Relu:
    """relu: monotone too, with a dedicated kernel for intervals."""

    def __call__(self, x: Signal) -> Signal:
        if isinstance(x, Interval):
            mid, rad = interval_relu(x.mid, x.rad)
            return Interval(mid=mid, rad=rad)
        return F.relu(x)

    def lines(self, x: Interval) -> Lines:
        """See `ibpcore.bounds.relaxations.relu`, (B, ...)."""
        return relaxations.relu(x)

    def other_lines(self, x: Interval) -> Lines:
        """See `ibpcore.bounds.relaxations.relu_reversed`, (B, ...)."""
        return relaxations.relu_reversed(x)


RELU = Relu()


@dataclass(frozen=True, eq=False)
class PRelu:
    """max(x, 0) + slope * min(x, 0) in each channel; below slope 0 it is least at 0.

    Attributes:
        slope: (channels,) for dimension 1 of the input, or (1,) for all of it; of any sign.
    """

    slope: Tensor

    other_lines: ClassVar[None] = None

    def __call__(self, x: Signal) -> Signal:
        if not isinstance(x, Interval):
            return F.prelu(x, self.slope)
        start, end = F.prelu(x.lower, self.slope), F.prelu(x.upper, self.slope)
        least = torch.minimum(torch.minimum(start, end), F.prelu(clipped(0.0, x), self.slope))
        return between(least, torch.maximum(start, end))

    def lines(self, x: Interval) -> Lines:
        """See `ibpcore.bounds.relaxations.prelu`, (B, ...)."""
        slope = self.slope if len(self.slope) == 1 else along_channels(self.slope, x.mid)
        return relaxations.prelu(x, slope)


@dataclass(frozen=True, eq=False)
class Extremum:
    """max(x, constant) or min(x, constant) in each channel: monotone.

    Attributes:
        constant: (channels,), for dimension 1 of the input.
        function: `torch.maximum` or `torch.minimum`.
    """

    constant: Tensor
    function: Callable[[Tensor, Tensor], Tensor]

    other_lines: ClassVar[None] = None

    def __call__(self, x: Signal) -> Signal:
        if isinstance(x, Interval):
            return x.monotone(self)
        return self.function(x, along_channels(self.constant, x))

    def lines(self, x: Interval) -> Lines:
        """See `ibpcore.bounds.relaxations.clamp`, (B, ...)."""
        constant = along_channels(self.constant, x.mid)
        if self.function is torch.maximum:
            return relaxations.clamp(x, constant, torch.inf)
        return relaxations.clamp(x, -torch.inf, constant)


@dataclass(frozen=True)
class Unimodal:
    """A function of each number that decreases up to a point and increases after it.

    Attributes:
        function: of a tensor (B, ...).
        argmin: that point, rounded to float64.
        minimum: its value there, rounded down; not above 0.
        relaxation: its lines, from an input interval and the output interval.
    """

    function: Callable[[Tensor], Tensor]
    argmin: float
    minimum: float
    relaxation: Callable[[Interval, Interval], Lines]

    other_lines: ClassVar[None] = None

    def __call__(self, x: Signal) -> Signal:
        if not isinstance(x, Interval):
            return self.function(x)
        start, end = self.function(x.lower), self.function(x.upper)
        # Values that are computed near the minimum may lie below it.
        lowest = self.minimum * (1 + 8 * torch.finfo(start.dtype).eps)
        inside = (x.lower <= self.argmin) & (x.upper >= self.argmin)
        lower = torch.where(inside, lowest, torch.minimum(start, end))
        return between(lower, torch.maximum(start, end))

    def lines(self, x: Interval) -> Lines:
        """Its linear relaxation over x, (B, ...)."""
        return self.relaxation(x, self(x))


@dataclass(frozen=True)
class NonnegativeLinear:
    """A linear map without negative weights, such as a reshape or average pooling."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Signal) -> Signal:
        return x.apply(self.function) if isinstance(x, Interval) else self.function(x)

    def transposed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Maps coefficients (N, ...) of the output to those of the input, of `shape`."""
        return _adjoint(self.function, rows, shape)


def _adjoint(function: Callable[[Tensor], Tensor], rows: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of a linear `function`, applied to `rows` by autograd; differentiable."""
    return torch.func.vjp(function, rows.new_zeros(shape))[1](rows)[0]


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of two branches with the same input, such as a residual block."""

    branch: tuple[Operator, ...]
    shortcut: tuple[Operator, ...]

    @property
    def branches(self) -> tuple[tuple[Operator, ...], ...]:
        return self.branch, self.shortcut

    def over(self, branches: Sequence[tuple[Operator, ...]]) -> Sum:
        """The sum of other branches."""
        return Sum(*branches)

    def join(self, parts: Sequence[Signal]) -> Signal:
        """The sum of the branches' outputs, both of one shape (B, ...)."""
        branch, shortcut = parts
        # The backward propagation of linear bounds does not undo a broadcast.
        if branch.shape != shortcut.shape:
            raise UserError(
                f"the branch of a residual returns {tuple(branch.shape)}, its shortcut"
                f" {tuple(shortcut.shape)}: both must have one shape"
            )
        return branch + shortcut


@dataclass(frozen=True, eq=False)
class Product:
    """The product of two branches with the same input, such as a gate and what it scales."""

    first: tuple[Operator, ...]
    second: tuple[Operator, ...]

    @property
    def branches(self) -> tuple[tuple[Operator, ...], ...]:
        return self.first, self.second

    def over(self, branches: Sequence[tuple[Operator, ...]]) -> Product:
        """The product of other branches."""
        return Product(*branches)

    def join(self, parts: Sequence[Signal]) -> Signal:
        """The product of the branches' outputs, both of one shape (B, ...)."""
        first, second = parts
        if first.shape != second.shape:
            raise UserError(
                f"the factors of a product return {tuple(first.shape)} and"
                f" {tuple(second.shape)}: both must have one shape"
            )
        return first * second


@dataclass(frozen=True, eq=False)
class Concatenation:
    """The outputs of several branches with the same input, concatenated.

    Attributes:
        dim: the dimension of concatenation, at least 1.
    """

    branches: tuple[tuple[Operator, ...], ...]
    dim: int

    def over(self, branches: Sequence[tuple[Operator, ...]]) -> Concatenation:
        """The concatenation of other branches."""
        return Concatenation(tuple(branches), self.dim)

    def join(self, parts: Sequence[Signal]) -> Signal:
        """The branches' outputs, (B, ...), concatenated along `dim`."""
        if isinstance(parts[0], Interval):
            mid = torch.cat([part.mid for part in parts], self.dim)
            return Interval(mid=mid, rad=torch.cat([part.rad for part in parts], self.dim))
        return torch.cat(cast(list[Tensor], parts), self.dim)


Fork: TypeAlias = Sum | Product | Concatenation
Nonlinear: TypeAlias = Monotone | Relu | PRelu | Extremum | Unimodal
Simple: TypeAlias = Affine | ChannelAffine | Nonlinear | NonnegativeLinear
"""Operators that are no fork."""
Operator: TypeAlias = Simple | Fork
Observer: TypeAlias = Callable[[Operator, Interval], None]


def run(operators: Sequence[Operator], x: Signal, observe: Observer | None = None) -> Signal:
    """Runs `operators` on `x`, (B, ...); `observe` is called with each and its input interval.

    It is called with the operators in the branches of a fork, but not with the fork.
    """
    for operator in operators:
        if isinstance(operator, Fork):
            # One expression, so that no part stays alive afterwards.
            x = operator.join([run(branch, x, observe) for branch in operator.branches])
            continue
        if observe is not None and isinstance(x, Interval):
            observe(operator, x)
        x = operator(x)
    return x


def mapped(
    operators: Sequence[Operator], function: Callable[[Operator], Operator]
) -> tuple[Operator, ...]:
    """`function` applied to every operator, including those in the branches of a `Fork`."""
    return tuple(
        operator.over([mapped(branch, function) for branch in operator.branches])
        if isinstance(operator, Fork)
        else function(operator)
        for operator in operators
    )


def merge(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """The same map with elementwise affine operators merged into each other and into convolutions.

    They are not merged into linear layers. These have more weights than activations, so
    merging in every training step would cost more than it saves. With more than two
    dimensions, a linear layer also acts on the last one and not on the channels.
    """
    merged: list[Operator] = []
    for operator in operators:
        if isinstance(operator, Fork):
            operator = operator.over([merge(branch) for branch in operator.branches])
        last = merged[-1] if merged else None
        if isinstance(operator, ChannelAffine) and _takes(last, operator):
            merged[-1] = last.then(operator)
        else:
            merged.append(operator)
    return tuple(merged)


def _takes(last: Operator | None, operator: ChannelAffine) -> TypeGuard[Affine | ChannelAffine]:
    """Whether `operator` is merged into `last`, the one before it."""
    if isinstance(last, ChannelAffine):
        return last.per_channel == operator.per_channel
    return isinstance(last, Affine) and last.operation is not F.linear and operator.per_channel
