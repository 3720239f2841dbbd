"""Interval layers: `torch.nn` layers that also accept an `Interval`.

An interval layer has the parameter names of its `torch.nn` twin, so state dicts can be
exchanged unchanged. It defines its bounds by a tuple of *operators*
(`ibpcore.bounds.operators`) and stores no bounds itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds import relaxations
from ibpcore.bounds.interval import Interval
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.errors import UserError, first_line, is_out_of_memory
from ibpcore.nn.batch_norm import batch_normalized, shared_statistics

Operators = tuple[ops.Operator, ...]
CleanObserver = Callable[[ops.Operator, Tensor], None]

LAYERS: dict[str, type[IntervalLayer]] = {}
"""Layers that can be saved, by class name without `Interval`."""
TWINS: dict[type[nn.Module], type[IntervalLayer]] = {}
"""The interval layer for each supported type of `torch.nn`."""


class Clean(NamedTuple):
    """Settings of a forward pass with a clean batch.

    Attributes:
        track: whether batch norm updates its running statistics.
        observe: called with the operator and the input (B, ...) of each layer that has exactly
            one operator.
        ranks: the processes whose batches together define the batch statistics.
    """

    track: bool = True
    observe: CleanObserver | None = None
    ranks: Ranks = SINGLE_PROCESS


def _register(table: dict[Any, type[IntervalLayer]], key: Any, layer: type[IntervalLayer]) -> None:
    """Enters a layer; only its own module may replace it, or files would load as other layers."""
    known = table.get(key, layer)
    if known.__module__ != layer.__module__:
        raise UserError(f"{layer.__name__} would replace {known.__module__}.{known.__name__}")
    table[key] = layer


class IntervalLayer(nn.Module):
    """Base class of all interval layers; a subclass implements `operators`.

    `operators` and `clean` assume that the whole model has passed `check_supported`, which
    interval calls and `ibpcore.nn.folding` ensure. A subclass that defines `arguments` is
    registered, so that networks of it can be saved.

    Attributes:
        arguments: names of the constructor arguments, each also an attribute of the layer.
            Tensors are saved as numbers, and `bias` as whether there is one.
        twins: the `torch.nn` types that the layer can replace.
    """

    arguments: ClassVar[tuple[str, ...]]
    twins: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Only what the class itself states: subclasses may compute something else.
        for twin in vars(cls).get("twins", ()):
            _register(TWINS, twin, cls)
        if "arguments" in vars(cls):
            _register(LAYERS, cls.__name__.removeprefix("Interval"), cls)

    @classmethod
    def of(cls, **arguments: Any) -> IntervalLayer:
        """A newly initialised layer, from a value for each name in `arguments`."""
        return cls(**arguments)

    def operators(self) -> Operators:
        """The layer as pure operators with its current parameters.

        Raises:
            UserError: the layer needs a clean batch first (batch norm in training mode), or one
                of its settings has no sound interval rule.
        """
        raise NotImplementedError

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        """The output for a clean batch `x` (B, ...), and the operators that bound this batch."""
        operators = self.operators()
        if how.observe is not None and len(operators) == 1:
            how.observe(operators[0], x)
        return self(x), operators

    def forward(self, x: Any) -> Any:
        """The output of the twin for a tensor, sound bounds on it for an `Interval`."""
        if isinstance(x, Interval):
            check_supported(self)
            return bounded(self.operators(), x)
        return super().forward(x)


def bounded(operators: Operators, x: Interval) -> Interval:
    """Bounds on the outputs of `operators` for inputs in `x`, (B, ...).

    Raises:
        UserError: their shape or type does not fit.
    """
    try:
        return ops.run(operators, x)
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"an interval of shape {tuple(x.shape)}, {x.mid.dtype}, does not fit the model:"
            f" {first_line(error)}"
        ) from None


class ByOperators(IntervalLayer):
    """Base class of layers that apply their operators to tensors as well.

    `inplace` therefore has no effect; it would overwrite the input of a residual's shortcut.
    """

    def forward(self, x: Any) -> Any:
        return ops.run(self.operators(), x)


class IntervalConv2d(IntervalLayer, nn.Conv2d):
    """`nn.Conv2d` for intervals: images (B, in_channels, H, W), all its options."""

    twins = (nn.Conv2d,)
    arguments = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "bias", "padding_mode"),
    )

    def operators(self) -> Operators:
        # Autograd transposes convolutions with non-zero padding or padding given by name.
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        transpose = self._transpose if plain else None
        return (ops.Affine(self.weight, self.bias, self._conv_forward, transpose),)

    def _transpose(self, rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """As `torch.nn.grad.conv2d_input`, whose own gradient takes three times as long."""
        padding = cast(tuple[int, ...], self.padding)
        geometry = zip(self.stride, padding, self.dilation, self.kernel_size, strict=True)
        # Rows and columns at the end that no window covers, for a stride above 1.
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
    """`nn.Linear` for intervals: (B, ..., in_features) to (B, ..., out_features)."""

    twins = (nn.Linear,)
    arguments = ("in_features", "out_features", "bias")

    def operators(self) -> Operators:
        return (ops.Affine(self.weight, self.bias, F.linear, lambda rows, w, _: rows @ w),)


class IntervalBatchNorm(IntervalLayer, nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d` and `nn.BatchNorm2d` for intervals (B, num_features, ...).

    In evaluation it uses the running statistics. In training it uses the statistics of a
    clean batch, including their gradient; `clean` returns them as an operator for the interval
    passes of the same step. Interval passes never update the running statistics.
    """

    twins = (nn.BatchNorm1d, nn.BatchNorm2d)
    arguments = ("num_features", "eps", "momentum", "affine", "track_running_stats")

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3, 4):
            raise UserError(f"IntervalBatchNorm takes 2 to 4 dimensions, got {tuple(input.shape)}")

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def operators(self) -> Operators:
        if self._uses_batch or self.running_mean is None or self.running_var is None:
            raise UserError(
                "batch norm that uses batch statistics needs a clean batch before an interval pass:"
                " call model.eval() and let it track running statistics, or call"
                " certified_margins(model, images, ...) with the model in training mode"
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
        # Momentum None stands for the average over all batches.
        momentum: Any = 1 / batches.to(mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)

    def _channel_affine(self, mean: Tensor, variance: Tensor) -> ops.ChannelAffine:
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        return ops.ChannelAffine(scale, shift if self.bias is None else shift + self.bias)


class IntervalNormalize(ByOperators):
    """(x - mean) / std for each channel: normalisation as the first layer of a model.

    With it the model takes pixels in [0, 1], and epsilon is in pixel units.

    Args:
        mean, std: one number per channel, in pixel units.

    Raises:
        UserError: the lengths differ, or a std is not positive.
    """

    arguments = ("mean", "std")
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError("mean and std need one entry per channel, every std above 0")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def operators(self) -> Operators:
        return (ops.ChannelAffine(1 / self.std, -self.mean / self.std),)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class IntervalScale(ByOperators):
    """scale * x + shift with one number for all channels or one per channel.

    `convert` uses it for additions of, and multiplications by, constants and parameters.

    Args:
        channels: size of dimension 1 of the input.
        scale, shift: numbers, or tensors of any shape with 1 or `channels` elements. An
            `nn.Parameter` is used as it is, not copied.

    Raises:
        UserError: one of them has another number of elements.
    """

    arguments = ("channels", "scale", "shift")
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
        # Copies: a later optimiser step must not change a folded network.
        return (ops.ChannelAffine(self._each(self.scale), self._each(self.shift)),)

    def _each(self, value: Tensor) -> Tensor:
        return value.flatten().repeat(self.channels // value.numel())

    def extra_repr(self) -> str:
        return f"{self.channels}"


class IntervalReLU(ByOperators, nn.ReLU):
    """`nn.ReLU` for intervals of any shape."""

    twins = (nn.ReLU,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.RELU,)


class IntervalLeakyReLU(ByOperators, nn.LeakyReLU):
    """`nn.LeakyReLU` for intervals of any shape; `negative_slope` must not be below 0."""

    twins = (nn.LeakyReLU,)
    arguments = ("negative_slope",)

    def operators(self) -> Operators:
        if self.negative_slope < 0:
            raise UserError("IntervalLeakyReLU needs negative_slope >= 0")
        slope = self.negative_slope
        function = partial(F.leaky_relu, negative_slope=slope)
        return (ops.Monotone(function, partial(relaxations.leaky_relu, negative_slope=slope)),)


class IntervalSigmoid(IntervalLayer, nn.Sigmoid):
    """`nn.Sigmoid` for intervals of any shape."""

    twins = (nn.Sigmoid,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(torch.sigmoid, relaxations.sigmoid),)


class IntervalTanh(IntervalLayer, nn.Tanh):
    """`nn.Tanh` for intervals of any shape."""

    twins = (nn.Tanh,)
    arguments = ()

    def operators(self) -> Operators:
        return (ops.Monotone(torch.tanh, relaxations.tanh),)


class IntervalFlatten(IntervalLayer, nn.Flatten):
    """`nn.Flatten` for intervals."""

    twins = (nn.Flatten,)
    arguments = ("start_dim", "end_dim")

    def operators(self) -> Operators:
        return (ops.NonnegativeLinear(partial(nn.Flatten.forward, self)),)


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


class IntervalAvgPool2d(IntervalLayer, nn.AvgPool2d):
    """`nn.AvgPool2d` for intervals of images (B, C, H, W)."""

    twins = (nn.AvgPool2d,)
    arguments = (
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    )

    def operators(self) -> Operators:
        if self.divisor_override is not None and self.divisor_override < 0:
            raise UserError("IntervalAvgPool2d needs divisor_override > 0")
        return (ops.NonnegativeLinear(partial(nn.AvgPool2d.forward, self)),)


class IntervalMaxPool2d(IntervalLayer, nn.MaxPool2d):
    """`nn.MaxPool2d` for intervals of images (B, C, H, W); it is monotone in every input."""

    twins = (nn.MaxPool2d,)
    arguments = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

    def operators(self) -> Operators:
        if self.return_indices:
            raise UserError("IntervalMaxPool2d does not return indices")
        return (ops.Monotone(partial(nn.MaxPool2d.forward, self)),)


class IntervalDropout(IntervalLayer, nn.Dropout):
    """`nn.Dropout` for tensors, the identity for intervals.

    Bounds hold for the network in evaluation, where dropout does nothing. `inplace` has no
    effect.
    """

    twins = (nn.Dropout,)
    arguments = ("p",)

    def operators(self) -> Operators:
        return ()

    def forward(self, x: Any) -> Any:
        return x if isinstance(x, Interval) else F.dropout(x, self.p, self.training)


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


def check_supported(model: nn.Module) -> None:
    """Raises a UserError that names the first module of `model` without an interval rule.

    Modules with forward hooks, or with a `forward` set on the object, are refused too, since
    bounds would ignore them.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be an nn.Module, not {type(model).__name__}")
    for place, module in model.named_modules():
        if not isinstance(module, IntervalLayer):
            kind, twin = type(module), TWINS.get(type(module))
            advice = f"use {twin.__name__}" if twin else "no interval rule is known for it"
            raise UserError(f"unsupported layer {place or 'model'!r} ({kind.__name__}): {advice}")
        # A `forward` of the object hides that of its class.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UserError(
                f"layer {place or 'model'!r} has forward hooks or a forward of its own, which"
                " bounds would ignore: remove them first"
            )
