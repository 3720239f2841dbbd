"""Transposed convolutions: from coefficients of a convolution's output to those of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_CHANNELS = 8
"""Up to so many channels of the input, oneDNN transposes far more slowly than it convolves."""


@dataclass(frozen=True)
class TransposedConvolution:
    """The transpose of a convolution along one or two sides, with zeros as padding.

    Attributes:
        stride, padding, dilation: for each side.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, rows: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Coefficients (N, in, ...), of `shape`, for `rows` (N, out, ...)."""
        return self._transposed(rows, weight, self.padding, shape[2:])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution itself: (N, in, ...) to (N, out, ...)."""
        nothing = [0] * len(self.stride)
        how = (self.stride, self.padding, self.dilation, False, nothing, self.groups)
        return torch.convolution(x, weight, bias, *how)

    def gradients(
        self, output: Tensor, x: Tensor, weight: Tensor, need_x: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of `x`, unless it is not needed, and of `weight`, from that of the output."""
        nothing = [0] * len(self.stride)
        how = (self.stride, self.padding, self.dilation, False, nothing, self.groups)
        wanted = [need_x, True, False]
        grads = torch.ops.aten.convolution_backward(output, x, weight, None, *how, wanted)
        return grads[0], grads[1]

    def with_padding(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The same, (N, in, ...), of all that `rows` (N, out, ...) read, padding too."""
        size = self.reach(weight, rows.shape[2:])
        # Small images are faster with channels first.
        return self._transposed(rows.contiguous(), weight, (0,) * len(size), size)

    def reach(self, weight: Tensor, size: Sequence[int]) -> tuple[int, ...]:
        """How much of each side of the input `size` neighbours in the output read."""
        sides = zip(size, weight.shape[2:], self.stride, self.dilation, strict=True)
        return tuple((n - 1) * stride + (k - 1) * dilation + 1 for n, k, stride, dilation in sides)

    def kernels(self, weight: Tensor) -> Tensor:
        """(out, in, ...) the coefficients of all that one number of each output channel reads."""
        out, size = len(weight), self.reach(weight, [1] * len(self.stride))
        full = weight.new_zeros(out, self.groups, weight.shape[1], *size)
        channel = torch.arange(out, device=weight.device)
        group = torch.div(channel * self.groups, out, rounding_mode="floor")
        steps = [slice(None, None, dilation) for dilation in self.dilation]
        full[cast(Any, (channel, group, slice(None), *steps))] = weight
        return full.flatten(1, 2)

    def _transposed(
        self, rows: Tensor, weight: Tensor, padding: Sequence[int], size: Sequence[int]
    ) -> Tensor:
        """As `torch.nn.grad.conv2d_input`, whose own gradient takes three times as long."""
        plain = self.groups == 1 and set(self.dilation) == {1}
        if plain and len(size) == 2 and weight.shape[1] <= FEW_CHANNELS:
            return _interleaved(rows, weight, self.stride, padding, size)
        # Rows and columns at the end that no window covers, for a stride above 1.
        reach = self.reach(weight, rows.shape[2:])
        rest = [n + 2 * p - r for n, p, r in zip(size, padding, reach, strict=True)]
        transposed: Any = F.conv_transpose1d if len(size) == 1 else F.conv_transpose2d
        return cast(
            Tensor,
            transposed(rows, weight, None, self.stride, padding, rest, self.groups, self.dilation),
        )


def _interleaved(
    rows: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> Tensor:
    """A transposed convolution along two sides, as one convolution without strides.

    The places i * stride + k of the output, for each k, form an image of their own. It is the
    convolution of `rows` with each weight at j * stride + k, last one first.
    """
    (down, across), (height, width) = stride, weight.shape[2:]
    taps = -(-height // down), -(-width // across)
    parts = F.pad(weight, (0, taps[1] * across - width, 0, taps[0] * down - height))
    parts = parts.unflatten(3, (taps[1], across)).unflatten(2, (taps[0], down)).flip(2, 4)
    # (out, in, taps, down, taps, across) to (in * down * across, out, taps, taps)
    kernel = parts.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
    # Of what lies beyond both ends, whole strides are not computed and the rest is cut off.
    around: list[int] = []
    cut: list[int] = []
    for n, k, s, p, t in zip(size, rows.shape[2:], stride, padding, taps, strict=True):
        beyond = (k + t - 1) * s - p - n
        spared = max(0, min(p // s, beyond // s, t - 1))
        around.append(t - 1 - spared)
        cut = [spared * s - p, spared * s - beyond, *cut]
    # One name for all three, so that only two of them are alive at a time.
    found = F.conv2d(rows, kernel, None, 1, around)
    found = found.unflatten(1, (-1, down, across)).permute(0, 1, 4, 2, 5, 3)
    found = found.flatten(4, 5).flatten(2, 3)
    return F.pad(found, cut) if any(cut) else found
