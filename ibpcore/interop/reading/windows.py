"""The windows of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ibpcore.errors import UserError
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
    how = of.attributes.get("auto_pad", "NOTSET")
    if how == "VALID":
        return found._replace(starts=(0,) * sides, ends=(0,) * sides)
    if how == "NOTSET":
        return found
    if how not in ("SAME_UPPER", "SAME_LOWER"):
        raise UserError(f"auto_pad {how!r} is unknown")
    totals = [
        max((-(-size // stride) - 1) * stride + span - size, 0)
        for size, stride, span in zip(sizes, found.strides, found.spans(), strict=True)
    ]
    less, more = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
    starts, ends = (less, more) if how == "SAME_UPPER" else (more, less)
    return found._replace(starts=starts, ends=ends)
