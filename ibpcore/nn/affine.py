"""Interval layers with weights: convolutions, linear layers and batch norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds import operators as ops
from ibpcore.bounds.convolutions import TransposedConvolution
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.products import linear
from ibpcore.errors import UserError
from ibpcore.nn.batch_norm import Running, batch_normalized, shared_statistics
from ibpcore.nn.layers import Clean, IntervalLayer, Operators


def complete_sizes(layer: nn.modules.conv._ConvNd) -> None:
    """Repeats a stride, padding or dilation of one number, which torch accepts, for each side."""
    sides = len(layer.kernel_size)
    for name in ("stride", "padding", "dilation"):
        value = getattr(layer, name)
        if len(value) == 1 and not isinstance(value, str):
            setattr(layer, name, tuple(value) * sides)
            if name == "padding":
                layer._reversed_padding_repeated_twice = [value[0]] * (2 * sides)


class Convolution(IntervalLayer, nn.modules.conv._ConvNd):
    """Base class of convolutions along one or two dimensions, with all their options."""

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        complete_sizes(self)

    def operators(self) -> Operators:
        return (self.affine(),)

    def affine(self) -> ops.Affine:
        """The layer's operator."""
        # Autograd transposes convolutions with non-zero padding or padding given by name.
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return ops.Affine(self.weight, self.bias, self._conv_forward)
        kind = TransposedConvolution(self.stride, self.padding, self.dilation, self.groups)
        return ops.Affine(self.weight, self.bias, kind.forward, kind)


CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "bias", "padding_mode"),
)


class IntervalConv1d(Convolution, nn.Conv1d):
    """`nn.Conv1d` for intervals (B, in_channels, L), all its options."""

    twins = (nn.Conv1d,)
    arguments = CONVOLUTION


class IntervalConv2d(Convolution, nn.Conv2d):
    """`nn.Conv2d` for intervals: images (B, in_channels, H, W), all its options."""

    twins = (nn.Conv2d,)
    arguments = CONVOLUTION


class IntervalConvTranspose2d(IntervalLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` for intervals: images (B, in_channels, H, W), all its options.

    The size of the output is always that of `output_padding`, for tensors too.
    """

    twins = (nn.ConvTranspose2d,)
    arguments = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding"),
        *("groups", "bias", "dilation"),
    )

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        complete_sizes(self)

    def operators(self) -> Operators:
        # Copies, since a later optimiser step must not change a folded network.
        weight = exchanged(self.weight, self.groups).clone()
        bias = None if self.bias is None else self.bias.clone()
        return (ops.Affine(weight, bias, self._upsampled, self._transpose),)

    def _upsampled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        how: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return F.conv_transpose2d(x, exchanged(weight, self.groups), bias, *how)

    def _transpose(self, rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        how: Any = self.stride, self.padding, self.dilation, self.groups
        back = F.conv2d(rows, exchanged(weight, self.groups), None, *how)
        # For an output padding above the stride there are windows beyond the input.
        return back[:, :, : shape[2], : shape[3]]


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """A weight (groups * i, o, ...) as one of (groups * o, i, ...): channels out, or in, first."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class IntervalLinear(IntervalLayer, nn.Linear):
    """`nn.Linear` for intervals: (B, ..., in_features) to (B, ..., out_features)."""

    twins = (nn.Linear,)
    arguments = ("in_features", "out_features", "bias")

    def operators(self) -> Operators:
        return (ops.Affine(self.weight, self.bias, F.linear, lambda rows, w, _: rows @ w),)

    def applied(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class IntervalMatMul(IntervalLayer):
    """x @ weight + bias for intervals: (B, ..., in_features) to (B, ..., out_features).

    `convert` uses it for products with a parameter. It differs from `IntervalLinear` in the order
    of the weight's dimensions.

    Args:
        in_features, out_features: the shape of `weight`, which starts at 0, as does the bias.
        bias: whether there is one.
    """

    arguments = ("in_features", "out_features", "bias")
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def operators(self) -> Operators:
        # Copies, since a later optimiser step must not change a folded network.
        bias = None if self.bias is None else self.bias.clone()
        weight = self.weight.T.clone()
        return (ops.Affine(weight, bias, F.linear, lambda rows, w, _: rows @ w),)

    def forward(self, x: Any) -> Any:
        if isinstance(x, Interval):
            return super().forward(x)
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class IntervalBatchNorm(IntervalLayer, nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm1d`, `nn.BatchNorm2d` and `nn.SyncBatchNorm` for (B, num_features, ...).

    In evaluation it uses the running statistics. In training it uses the statistics of a
    clean batch, including their gradient; `clean` returns them as an operator for the interval
    passes of the same step. Interval passes never update the running statistics.
    """

    twins = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    arguments = ("num_features", "eps", "momentum", "affine", "track_running_stats")

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise UserError(f"IntervalBatchNorm takes (B, channels, ...), got {tuple(input.shape)}")

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.training or self.running_mean is None

    def operators(self) -> Operators:
        if self.uses_batch or self.running_mean is None or self.running_var is None:
            raise UserError(
                "batch norm that uses batch statistics needs a clean batch before an interval pass:"
                " let it track running statistics, and use evaluation mode"
            )
        return (self._channel_affine(self.running_mean, self.running_var),)

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        if not self.uses_batch:
            return super().clean(x, how)
        self._check_input_dim(x)
        if how.ranks.size == 1:
            running = self.running() if how.track else None
            output, *affine = batch_normalized(x, self.weight, self.bias, self.eps, running)
            operator = ops.ChannelAffine(*affine)
        else:
            count, mean, variance = shared_statistics(x, how.ranks)
            operator = self._channel_affine(mean, variance)
            output = operator(x)
            if how.track:
                self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        if how.observe is not None:
            how.observe(operator, x)
        return output, (operator,)

    def running(self) -> Running | None:
        """The running statistics, of one batch more; None if there are none."""
        batches = self.num_batches_tracked
        if self.running_mean is None or self.running_var is None or batches is None:
            return None
        batches.add_(1)
        # Momentum None stands for the average over all batches.
        momentum = 1 / float(batches) if self.momentum is None else self.momentum
        return Running(self.running_mean, self.running_var, momentum)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics; `variance` is the unbiased one."""
        running = self.running()
        if running is not None:
            running.mean.lerp_(mean, running.momentum)
            running.variance.lerp_(variance, running.momentum)

    def _channel_affine(self, mean: Tensor, variance: Tensor) -> ops.ChannelAffine:
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        return ops.ChannelAffine(scale, shift if self.bias is None else shift + self.bias)
