"""Windows: parts of feature maps, outside of which a row of coefficients is zero.

A number behind convolutions depends on a part of each feature map before them. Its row is
nothing but the weight of the last convolution, and grows with each one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.convolutions import TransposedConvolution

LARGEST_SHARE = 0.75
"""Windows that are larger than this share of a feature map cost as much as all of it."""


class Windows(NamedTuple):
    """Windows in the feature maps (B, C, ...) of B samples, which may reach beyond their ends.

    Attributes:
        cells: (B, W) int64, the number of each window in a grid, flattened.
        grid: how many windows there are along each side.
        size: of a window along each side.
        stride: from one window to the next.
        start: of the first window.
        clean: whether rows are zero beyond the ends of the feature map.
    """

    cells: Tensor
    grid: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: tuple[int, ...]
    clean: bool

    @staticmethod
    def of_numbers(cells: Tensor, grid: Sequence[int]) -> Windows:
        """Windows of single numbers, `cells` (B, W), in feature maps (B, C, *grid)."""
        one = (1,) * len(grid)
        return Windows(cells, tuple(grid), one, one, (0,) * len(grid), clean=True)

    def before(self, convolution: TransposedConvolution, weight: Tensor) -> Windows:
        """What the windows in the output of a convolution read of its input."""
        stride, padding = convolution.stride, convolution.padding
        return self._replace(
            size=convolution.reach(weight, self.size),
            stride=tuple(own * s for own, s in zip(self.stride, stride, strict=True)),
            start=tuple(own * s - p for own, s, p in zip(self.start, stride, padding, strict=True)),
            clean=False,
        )

    def covers(self, sides: Sequence[int]) -> bool:
        """Whether all of a feature map with these sides costs no more than a window."""
        return prod(self.size) > LARGEST_SHARE * prod(sides)

    def cut(self, *maps: Tensor) -> list[Tensor]:
        """Windows (B * W, C, *size) of each of `maps`, (B, C, ...); 0 beyond their ends."""
        sample = torch.arange(len(self.cells), device=self.cells.device) * prod(self._ends())
        index = (sample[:, None, None] + self._places()).flatten()
        padding = self._padding(maps[0].shape[2:])
        found = []
        for x in maps:
            table = F.pad(x, padding).movedim(1, -1).reshape(-1, x.shape[1])
            part = table.index_select(0, index)
            found.append(part.view(self.cells.numel(), *self.size, -1).movedim(-1, 1))
        return found

    def whole(self, rows: Tensor, sides: Sequence[int]) -> Tensor:
        """Rows (B, R, C, *size) as rows (B, R, C, *sides) of the whole feature map."""
        batch, count, channels = rows.shape[:3]
        ends, windows = self._ends(), self.cells.shape[1]
        number = torch.arange(batch * count, device=rows.device).view(batch, windows, -1, 1)
        index = (number * prod(ends) + self._places()[:, :, None]).flatten()
        table = rows.new_zeros(batch * count * prod(ends), channels)
        table.index_copy_(0, index, rows.movedim(2, -1).reshape(-1, channels))
        full = table.view(batch * count, *ends, channels).movedim(-1, 1)
        padding = [-number for number in self._padding(sides)]
        return F.pad(full, padding).unflatten(0, (batch, count))

    def cleaned(self, rows: Tensor, sides: Sequence[int]) -> Tensor:
        """Rows (B, R, C, *size), with zeros beyond the ends of the feature map."""
        inside = self.cut(rows.new_ones(len(rows), 1, *sides))[0]
        return self.by_window(rows).mul(inside[:, None]).view_as(rows)

    def by_window(self, rows: Tensor) -> Tensor:
        """(B, R, ...) as (B * W, R / W, ...), the rows of each window."""
        count = self.cells.shape[1]
        return rows.unflatten(1, (count, rows.shape[1] // count)).flatten(0, 1)

    def joined(self, other: Windows) -> Windows | None:
        """Windows around these and `other` ones of the same cells; None if their strides differ."""
        if self.stride != other.stride:
            return None
        start = tuple(map(min, self.start, other.start))
        ends = [
            max(a + n, b + m)
            for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        ]
        size = tuple(end - first for end, first in zip(ends, start, strict=True))
        return self._replace(size=size, start=start, clean=self.clean and other.clean)

    def widened(self, rows: Tensor, to: Windows) -> Tensor:
        """Rows (B, R, C, *size) as rows in the windows `to` around these."""
        padding: list[int] = []
        for own, size, start, end in zip(self.start, self.size, to.start, to.size, strict=True):
            padding = [own - start, start + end - own - size, *padding]
        return F.pad(rows, padding)

    def _ends(self) -> tuple[int, ...]:
        """Sides of the smallest map that all windows of the grid fit into."""
        sides = zip(self.grid, self.stride, self.size, strict=True)
        return tuple((count - 1) * stride + size for count, stride, size in sides)

    def _padding(self, sides: Sequence[int]) -> list[int]:
        """The padding of a feature map to that size, last side first; negative to cut it off."""
        padding: list[int] = []
        for start, end, side in zip(self.start, self._ends(), sides, strict=True):
            padding = [-start, end + start - side, *padding]
        return padding

    def _places(self) -> Tensor:
        """(B, W, prod(size)) the numbers of each window in a flattened map of sides `_ends`."""
        first, inner = torch.zeros_like(self.cells), self.cells.new_zeros(1)
        rest, step = self.cells, 1
        sides = zip(self.grid, self.stride, self.size, self._ends(), strict=True)
        for count, stride, size, end in reversed([*sides]):
            first = first + rest % count * (stride * step)
            steps = torch.arange(size, device=inner.device) * step
            inner = (steps[:, None] + inner).flatten()
            rest, step = rest // count, step * end
        return first[..., None] + inner
