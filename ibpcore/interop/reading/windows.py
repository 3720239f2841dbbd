"""The windows of convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx

from ibpcore.errors import UserError
from ibpcore.interop.reading.building import Signal
from ibpcore.interop.reading.operations import Operation
from ibpcore.interop.translating.site import Sizes


class Windows(NamedTuple):
    """One number for each side; padding is before and after it."""

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    starts: Sizes
    ends: Sizes

    @property
    def is_symmetric(self) -> bool:
        """Whether a layer can pad by itself."""
        return self.starts == self.ends and min(self.starts, default=0) >= 0

    @property
    def padding(self) -> Sizes:
        """For `IntervalZeroPad`: the last side first."""
        pairs = zip(reversed(self.starts), reversed(self.ends), strict=True)
        return tuple(number for pair in pairs for number in pair)

    def spans(self) -> Sizes:
        """The length of a window with its holes."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return tuple(hole * (kernel - 1) + 1 for kernel, hole in pairs)


def windows_of(of: Operation, sizes: Sequence[int], kernel: Sequence[int]) -> Windows:
    """The windows of a node for inputs with these sides.

    Raises:
        UserError: its settings do not fit.
    """
    sides = len(sizes)
    given = [of.attributes.get(name, [1] * sides) for name in ("strides", "dilations")]
    pads = of.attributes.get("pads", [0] * (2 * sides))
    stated = of.attributes.get("kernel_shape", kernel)
    if any(len(one) != sides for one in (kernel, *given)) or len(pads) != 2 * sides:
        raise UserError("its settings are for another number of dimensions")
    if tuple(stated) != tuple(kernel) or min((*kernel, *given[0], *given[1]), default=1) < 1:
        raise UserError("its settings do not fit")
    numbers = (*map(tuple, (kernel, *given)), tuple(pads[:sides]), tuple(pads[sides:]))
    found = Windows(*numbers)
    if _automatic(of) == "VALID":
        return found._replace(starts=(0,) * sides, ends=(0,) * sides)
    if _automatic(of) == "NOTSET":
        return found
    totals = [
        max((-(-size // stride) - 1) * stride + span - size, 0)
        for size, stride, span in zip(sizes, found.strides, found.spans(), strict=True)
    ]
    return _split(found, totals, more_at_end=_automatic(of) == "SAME_UPPER")


def transposed_windows(
    of: Operation, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[Windows, Sizes]:
    """The windows of a transposed convolution, whose padding is cut off, and what is added.

    Raises:
        UserError: its settings do not fit.
    """
    automatic = _automatic(of)
    how = {**of.attributes, "auto_pad": "NOTSET"}
    found = windows_of(replace(of, attributes=how), sizes, kernel)
    extra = tuple(of.attributes.get("output_padding", [0] * len(sizes)))
    wanted = of.attributes.get("output_shape")
    if wanted is None and automatic in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, found.strides, strict=True)]
    if len(extra) != len(sizes) or min(extra, default=0) < 0:
        raise UserError("its settings do not fit")
    if wanted is not None:
        whole = zip(sizes, found.strides, found.spans(), extra, strict=True)
        lengths = [(size - 1) * stride + span + more for size, stride, span, more in whole]
        totals = [a - b for a, b in zip(lengths, wanted[-len(sizes) :], strict=True)]
        found = _split(found, totals, more_at_end=automatic == "SAME_UPPER")
    elif automatic == "VALID":
        found = found._replace(starts=(0,) * len(sizes), ends=(0,) * len(sizes))
    if min((*found.starts, *found.ends), default=0) < 0:
        raise UserError("its settings do not fit")
    return found, extra


def _automatic(of: Operation) -> str:
    how = of.attributes.get("auto_pad", "NOTSET")
    if how not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise UserError(f"auto_pad {how!r} is unknown")
    return str(how)


def _split(windows: Windows, totals: Sequence[int], more_at_end: bool) -> Windows:
    """With the padding of each side in two halves."""
    less, more = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
    starts, ends = (less, more) if more_at_end else (more, less)
    return windows._replace(starts=starts, ends=ends)


def in_images(windows: Windows) -> Windows:
    """Windows along rows as windows of images of height 1."""
    fillers = zip((1, 1, 1, 0, 0), windows, strict=True)
    return Windows(*((filler, *numbers) for filler, numbers in fillers))


def of_rows_or_images(of: Operation, x: Signal, node: fx.Node) -> Signal:
    """Images (B, C, H, W) as the output for `x`, rows or images."""
    channels, *sides = of.builder.shape(node)
    return Signal(node, (1, channels, *sides[-(len(x.shape) - 2) :]))


def lowest_padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Padding by -infinity, for `F.pad`; it has a rule only in front of a maximum."""
    return F.pad(x, padding, value=-math.inf)
