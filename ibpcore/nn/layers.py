"""Interval layers: each is its `torch.nn` twin and can be called with an `Interval`.

Parameter names are the twin's, so state dicts move between both unchanged. A layer
tells how it bounds by giving *operators* (`ibpcore.bounds.operators`); it keeps no bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds import relaxations
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import (
    RELU,
    Affine,
    ChannelAffine,
    Concatenation,
    Monotone,
    NonnegativeLinear,
    Operator,
    Sum,
    run,
)
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.errors import UserError
from ibpcore.nn.batch_norm import batch_normalized, shared_statistics

Operators = tuple[Operator, ...]
CleanObserver = Callable[[Operator, Tensor], None]


class Clean(NamedTuple):
    """How a clean batch is taken through a model.

    Attributes:
        track: let batch norm update its running statistics.
        observe: is shown the operator of each layer that has one, and what it reads.
        ranks: whose batches together give batch norm its statistics.
    """

    track: bool = True
    observe: CleanObserver | None = None
    ranks: Ranks = SINGLE_PROCESS


class IntervalLayer(nn.Module):
    """What an interval layer adds to its twin: `operators`, and `clean` built on it.

    Both take it that `check_supported` has passed on the whole model, which every way in
    sees to: an interval call and `ibpcore.nn.folding`.
    """

    def operators(self) -> Operators:
        """The layer as pure operators, with the parameters it has now.

        Raises:
            UserError: the layer needs a clean batch first (batch norm in training mode).
        """
        raise NotImplementedError

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        """Output for a clean batch (B, ...), and the operators that bound this batch."""
        operators = self.operators()
        if how.observe is not None and len(operators) == 1:
            how.observe(operators[0], x)
        return self(x), operators

    def forward(self, x: Any) -> Any:
        """A tensor gives the twin's output; an `Interval` its sound bounds."""
        if isinstance(x, Interval):
            check_supported(self)
            return run(self.operators(), x)
        return super().forward(x)


class ByOperators(IntervalLayer):
    """A layer that takes tensors through its operators too.

    So `inplace` has no effect: it would change what a residual's shortcut reads.
    """

    def forward(self, x: Any) -> Any:
        return run(self.operators(), x)


class IntervalConv2d(IntervalLayer, nn.Conv2d):
    """`nn.Conv2d` on intervals, with its stride, padding, dilation and groups."""

    def operators(self) -> Operators:
        # Padding by other values, or so as to keep the size, is left to autograd.
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        transpose = self._transpose if plain else None
        return (Affine(self.weight, self.bias, self._conv_forward, transpose),)

    def _transpose(self, rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Not `torch.nn.grad.conv2d_input`, whose own gradient takes three times as long."""
        padding = cast(tuple[int, ...], self.padding)
        geometry = zip(self.stride, padding, self.dilation, self.kernel_size, strict=True)
        # Rows and columns at the end that no window reaches, for a stride above 1.
        rest = [
            size - ((out - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, out, (stride, pad, dilation, kernel) in zip(
                shape[-2:], rows.shape[-2:], geometry, strict=True
            )
        ]
        return F.conv_transpose2d(
            rows, weight, None, self.stride, padding, rest, self.groups, self.dilation
        )


class IntervalLinear(IntervalLayer, nn.Linear):
    """`nn.Linear` on intervals."""

    def operators(self) -> Operators:
        return (Affine(self.weight, self.bias, F.linear, lambda rows, weight, _: rows @ weight),)


class IntervalBatchNorm(IntervalLayer, nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d` and `nn.BatchNorm2d` on intervals: the channels are dimension 1.

    In evaluation the running statistics. In training the statistics of a clean batch,
    gradient included, which `clean` passes on to the interval passes of the same step;
    interval passes never change the running statistics.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3, 4):
            raise UserError(f"IntervalBatchNorm takes 2 to 4 dimensions, got {tuple(input.shape)}")

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def operators(self) -> Operators:
        if self._uses_batch or self.running_mean is None or self.running_var is None:
            raise UserError(
                "batch norm that uses batch statistics has none for a lone interval pass: call"
                " model.eval() and let it track running statistics, or give"
                " certified_margins(model, images, ...) a model in training mode"
            )
        return (self._channel_affine(self.running_mean, self.running_var),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        if not self._uses_batch:
            return super().clean(x, how)
        self._check_input_dim(x)
        if how.ranks.size == 1:
            count: Any = x.numel() // x.shape[1]
            output, mean, variance = batch_normalized(x, self.weight, self.bias, self.eps)
            operator = self._channel_affine(mean, variance)
        else:
            count, mean, variance = shared_statistics(x, how.ranks)
            operator = self._channel_affine(mean, variance)
            output = operator(x)
        if how.track:
            self._track(mean.detach(), variance.detach(), count)
        if how.observe is not None:
            how.observe(operator, x)
        return output, (operator,)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Updates the running statistics as `nn.BatchNorm2d` does, with the unbiased variance."""
        batches = self.num_batches_tracked
        if self.running_mean is None or self.running_var is None or batches is None:
            return
        batches.add_(1)
        # Without a momentum the average over all batches.
        momentum: Any = 1 / batches.to(mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)

    def _channel_affine(self, mean: Tensor, variance: Tensor) -> ChannelAffine:
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        return ChannelAffine(scale, shift if self.bias is None else shift + self.bias)


class IntervalNormalize(ByOperators):
    """(x - mean) / std for each channel, as a layer: epsilon stays in pixel units.

    Args:
        mean, std: one number a channel, in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError("mean and std need one entry a channel, and every std above 0")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def operators(self) -> Operators:
        return (ChannelAffine(1 / self.std, -self.mean / self.std),)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class IntervalScale(ByOperators):
    """scale * x + shift, by constants: one number for all channels, or one each.

    Args:
        channels: size of dimension 1 of the input.
        scale, shift: numbers or tensors of one element or of `channels`, in any shape; a
            parameter stays one, and is not copied.

    Raises:
        UserError: one has another number of elements.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, scale: Any = 1.0, shift: Any = 0.0) -> None:
        super().__init__()
        self.channels = channels
        for name, value in (("scale", scale), ("shift", shift)):
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.get_default_dtype())
            if value.numel() not in (1, channels):
                raise UserError(f"{name} has {value.numel()} elements, not 1 or {channels}")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def operators(self) -> Operators:
        # New tensors: a later step of an optimiser must not reach what is folded of them.
        return (ChannelAffine(self._each(self.scale), self._each(self.shift)),)

    def _each(self, value: Tensor) -> Tensor:
        return value.flatten().repeat(self.channels // value.numel())

    def extra_repr(self) -> str:
        return f"{self.channels}"


class IntervalReLU(ByOperators, nn.ReLU):
    """`nn.ReLU` on intervals."""

    def operators(self) -> Operators:
        return (RELU,)


class IntervalLeakyReLU(ByOperators, nn.LeakyReLU):
    """`nn.LeakyReLU` on intervals; a negative slope below 0 would not be monotone."""

    def operators(self) -> Operators:
        if self.negative_slope < 0:
            raise UserError("IntervalLeakyReLU needs negative_slope >= 0")
        slope = self.negative_slope
        function = partial(F.leaky_relu, negative_slope=slope)
        return (Monotone(function, partial(relaxations.leaky_relu, negative_slope=slope)),)


class IntervalSigmoid(IntervalLayer, nn.Sigmoid):
    """`nn.Sigmoid` on intervals."""

    def operators(self) -> Operators:
        return (Monotone(torch.sigmoid, relaxations.sigmoid),)


class IntervalTanh(IntervalLayer, nn.Tanh):
    """`nn.Tanh` on intervals."""

    def operators(self) -> Operators:
        return (Monotone(torch.tanh, relaxations.tanh),)


class IntervalFlatten(IntervalLayer, nn.Flatten):
    """`nn.Flatten` on intervals."""

    def operators(self) -> Operators:
        return (NonnegativeLinear(partial(nn.Flatten.forward, self)),)


class IntervalReshape(ByOperators):
    """The same numbers of each sample in another shape.

    Args:
        shape: of a sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def operators(self) -> Operators:
        return (NonnegativeLinear(lambda x: x.reshape(len(x), *self.shape)),)

    def extra_repr(self) -> str:
        return f"{self.shape}"


class IntervalPermute(ByOperators):
    """`torch.permute` on intervals.

    Args:
        dims: of which the first is 0, so that samples stay apart.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        if sorted(self.dims) != list(range(len(self.dims))) or self.dims[0] != 0:
            raise UserError(f"dims must be 0 and then the others in any order, got {self.dims}")

    def operators(self) -> Operators:
        return (NonnegativeLinear(lambda x: x.permute(self.dims)),)

    def extra_repr(self) -> str:
        return f"{self.dims}"


class IntervalZeroPad(ByOperators):
    """Zeros around the input, which are no more than that: their radius is 0.

    Args:
        padding: as `F.pad` takes it, the last dimension first; below 0 it cuts off.
    """

    def __init__(self, padding: Sequence[int]) -> None:
        super().__init__()
        self.padding = tuple(padding)

    def operators(self) -> Operators:
        return (NonnegativeLinear(self._padded),)

    def _padded(self, x: Tensor) -> Tensor:
        if len(self.padding) > 2 * (x.dim() - 1):
            raise UserError(f"padding {self.padding} would add images to {tuple(x.shape)}")
        return F.pad(x, self.padding)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class IntervalSlice(ByOperators):
    """A part of each sample.

    Args:
        ranges: start, stop and step for each dimension but the first; step at least 1.
    """

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.ranges = [list(numbers) for numbers in ranges]

    def operators(self) -> Operators:
        index = (slice(None), *(slice(*numbers) for numbers in self.ranges))
        return (NonnegativeLinear(lambda x: x[index]),)

    def extra_repr(self) -> str:
        return f"{self.ranges}"


class IntervalUpsample(ByOperators):
    """`nn.Upsample` to the nearest, by whole factors: each number several times.

    Args:
        factors: how often each row and each column stands there.
    """

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        if len(self.factors) != 2 or min(self.factors) < 1:
            raise UserError(f"factors must be two numbers from 1, got {self.factors}")

    def operators(self) -> Operators:
        return (NonnegativeLinear(self._repeated),)

    def _repeated(self, x: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.factors, x.shape[2:]
        spread = x[:, :, :, None, :, None].expand(-1, -1, -1, rows, -1, columns)
        return spread.reshape(*x.shape[:2], height * rows, width * columns)

    def extra_repr(self) -> str:
        return f"{self.factors}"


class IntervalAvgPool2d(IntervalLayer, nn.AvgPool2d):
    """`nn.AvgPool2d` on intervals."""

    def operators(self) -> Operators:
        if self.divisor_override is not None and self.divisor_override < 0:
            raise UserError("IntervalAvgPool2d needs divisor_override > 0")
        return (NonnegativeLinear(partial(nn.AvgPool2d.forward, self)),)


class IntervalMaxPool2d(IntervalLayer, nn.MaxPool2d):
    """`nn.MaxPool2d` on intervals: non-decreasing in every input."""

    def operators(self) -> Operators:
        if self.return_indices:
            raise UserError("IntervalMaxPool2d does not return indices")
        return (Monotone(partial(nn.MaxPool2d.forward, self)),)


class IntervalDropout(IntervalLayer, nn.Dropout):
    """`nn.Dropout` on clean batches; the identity for intervals.

    Bounds are those of the network in evaluation, where dropout does nothing. `inplace`
    has no effect.
    """

    def operators(self) -> Operators:
        return ()

    def forward(self, x: Any) -> Any:
        return x if isinstance(x, Interval) else F.dropout(x, self.p, self.training)


def _joined(parts: Iterable[Operators]) -> Operators:
    return tuple(operator for part in parts for operator in part)


class IntervalSequential(IntervalLayer, nn.Sequential):
    """`nn.Sequential` of interval layers."""

    def operators(self) -> Operators:
        return _joined(cast(IntervalLayer, layer).operators() for layer in self)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        parts = []
        for layer in self:
            x, operators = cast(IntervalLayer, layer).clean(x, how)
            parts.append(operators)
        return x, _joined(parts)


class IntervalResidual(IntervalLayer):
    """branch(x) + shortcut(x), the residual sum.

    Args:
        branch: an interval layer, often an `IntervalSequential`.
        shortcut: likewise; the identity when left out.
    """

    def __init__(self, branch: IntervalLayer, shortcut: IntervalLayer | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = IntervalSequential() if shortcut is None else shortcut

    def operators(self) -> Operators:
        return (Sum(self.branch.operators(), self.shortcut.operators()),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        branch, branch_operators = self.branch.clean(x, how)
        shortcut, shortcut_operators = self.shortcut.clean(x, how)
        return branch + shortcut, (Sum(branch_operators, shortcut_operators),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return self.branch(x) + self.shortcut(x)


class IntervalConcat(IntervalLayer):
    """What several branches make of x, side by side.

    Args:
        branches: interval layers, often `IntervalSequential`s; an empty one is the identity.
        dim: along which they lie, 1 for the channels.
    """

    def __init__(self, branches: Sequence[IntervalLayer], dim: int = 1) -> None:
        super().__init__()
        if not branches or dim < 1:
            raise UserError("a concatenation needs branches, and a dimension from 1")
        self.dim = dim
        for number, branch in enumerate(branches):
            self.add_module(str(number), branch)

    @property
    def branches(self) -> list[IntervalLayer]:
        return [cast(IntervalLayer, branch) for branch in self._modules.values()]

    def operators(self) -> Operators:
        return (Concatenation(tuple(branch.operators() for branch in self.branches), self.dim),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        parts, operators = zip(*(branch.clean(x, how) for branch in self.branches), strict=True)
        return torch.cat(parts, self.dim), (Concatenation(operators, self.dim),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return torch.cat([branch(x) for branch in self.branches], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def check_supported(model: nn.Module) -> None:
    """Raises UserError naming the first part of `model` that has no interval rule."""
    for place, module in model.named_modules():
        if not isinstance(module, IntervalLayer):
            kind = type(module).__name__
            stem = "BatchNorm" if kind in ("BatchNorm1d", "BatchNorm2d") else kind
            twin = f"Interval{stem}"
            advice = f"use {twin}" if twin in globals() else "no interval rule is known for it"
            raise UserError(f"unsupported layer {place or 'model'!r} ({kind}): {advice}")
        # A `forward` of the object hides that of its class.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UserError(
                f"layer {place or 'model'!r} has forward hooks or a forward of its own, which its"
                " bounds would not see: remove them first"
            )
