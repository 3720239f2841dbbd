"""Rules of pools and of means, sums and maxima over dimensions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.building import Signal, Value
from ibpcore.interop.reading.operations import Operation, Rule, axis_of
from ibpcore.interop.reading.windows import (
    Windows,
    in_images,
    lowest_padded,
    of_rows_or_images,
    windows_of,
)


def _windows(of: Operation, x: Signal) -> Windows:
    """The windows of a pool, in images for rows too, with the padding that they reach."""
    kernel = of.attributes["kernel_shape"]
    found = windows_of(of, x.shape[2:], kernel)
    if of.attributes.get("ceil_mode", 0):
        found = found._replace(ends=_reached(found, x.shape[2:]))
    found = in_images(found) if len(kernel) == 1 else found
    if len(found.kernel) != 2 or min(*found.starts, *found.ends) < 0:
        raise UserError("only pools of images and rows have an interval rule")
    return found


def _reached(windows: Windows, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The padding at the end of each side that the last windows of `ceil_mode` reach.

    Raises:
        UserError: one lies in it as a whole: what ONNX computes then depends on the version.
    """
    ends = []
    sides = zip(sizes, windows.spans(), windows.strides, windows.starts, windows.ends, strict=True)
    for size, span, stride, start, end in sides:
        count = -(-(size + start + end - span) // stride) + 1
        if (count - 1) * stride >= size + start:
            raise UserError("its ceil_mode has a window that lies in the padding")
        ends.append(max((count - 1) * stride + span - size - start, end))
    return tuple(ends)


def _image(of: Operation, x: Signal) -> fx.Node:
    """Images (B, C, H, W), of rows too."""
    channels, *above, width = of.builder.shape(of.image(x, [3, 4]))
    return of.formed(x, (channels, *(above or [1]), width))


def _read_average_pool(of: Operation) -> Value:
    x = of.signal()
    windows, node = _windows(of, x), _image(of, x)
    if set(windows.dilations) != {1}:
        raise UserError("an average with dilation has no interval rule")
    kernel: Any = windows.kernel
    strides: Any = windows.strides
    counts_padding = bool(of.attributes.get("count_include_pad", 0))
    if counts_padding and of.attributes.get("ceil_mode", 0):
        given = windows_of(of, x.shape[2:], of.attributes["kernel_shape"])
        if given.ends != windows.ends[-len(given.ends) :]:
            raise UserError("what its ceil_mode divides by depends on the version of ONNX")
    low = all(2 * pad <= size for pad, size in zip(windows.starts, kernel, strict=True))
    if windows.is_symmetric and low:
        how: Any = windows.strides, windows.starts, False, counts_padding
        return of_rows_or_images(of, x, of.layer(il.IntervalAvgPool2d(kernel, *how), node))
    sizes = of.builder.shape(node)[1:]
    node = of.layer(il.IntervalZeroPad(windows.padding), node)
    if counts_padding:
        return of_rows_or_images(of, x, of.layer(il.IntervalAvgPool2d(kernel, strides), node))
    node = of.layer(il.IntervalAvgPool2d(kernel, strides, divisor_override=1), node)
    ones = F.pad(torch.ones(1, 1, *sizes, dtype=of.builder.dtype), windows.padding)
    counts: Tensor = F.avg_pool2d(ones, kernel, strides, divisor_override=1)
    if not bool(counts.all()):
        raise UserError("one of its windows lies in the padding")
    channels = of.builder.shape(node)[0]
    divisor = counts.expand(1, *of.builder.shape(node)).clone()
    return of_rows_or_images(of, x, of.layer(il.IntervalDivide(channels, divisor), node))


def _read_max_pool(of: Operation) -> Value:
    x = of.signal()
    windows = _windows(of, x)
    if x.node.target is lowest_padded:
        x, windows = _unpadded(of, x, windows)
    node = _image(of, x)
    how: Any = windows.strides, windows.starts, windows.dilations
    low = all(2 * pad <= size for pad, size in zip(windows.starts, windows.kernel, strict=True))
    if not (windows.is_symmetric and low):
        node, how = _repeated(of, windows, node), (windows.strides, 0, windows.dilations)
    return of_rows_or_images(of, x, of.layer(il.IntervalMaxPool2d(windows.kernel, *how), node))


def _unpadded(of: Operation, x: Signal, windows: Windows) -> tuple[Signal, Windows]:
    """What was padded by -infinity, and windows with that as further padding."""
    source, numbers = cast(tuple[fx.Node, Sequence[int]], x.node.args)
    sides = [*zip(numbers[0::2], numbers[1::2], strict=True)][::-1]
    before, after = zip(*[(0, 0)] * (2 - len(sides)), *sides, strict=True)
    starts = tuple(map(operator.add, windows.starts, before[-2:]))
    ends = tuple(map(operator.add, windows.ends, after[-2:]))
    shape = (1, *of.builder.shape(source))
    if any((*before[:-2], *after[:-2])) or len(shape) != len(x.shape):
        raise UserError("padding by -infinity has a rule only along the sides of images")
    return Signal(source, shape), windows._replace(starts=starts, ends=ends)


def _repeated(of: Operation, windows: Windows, node: fx.Node) -> fx.Node:
    """Images with numbers in place of padding that each window holds anyway.

    That changes no maximum, whereas zeros would.
    """
    for side in (0, 1):
        kernel, stride, hole, start, end = (numbers[side] for numbers in windows)
        size = of.builder.shape(node)[1 + side]
        steps = range(0, size + start + end - hole * (kernel - 1), stride)
        for first in steps:
            if not any(0 <= first - start + hole * at < size for at in range(kernel)):
                raise UserError("one of its windows lies in the padding")
        places = [_inside(place, size, hole) for place in range(-start, size + end)]
        if start or end:
            node = of.layer(il.IntervalIndexSelect(places, 2 + side), node)
    return node


def _inside(place: int, size: int, step: int) -> int:
    """The nearest place in range(size) whole steps away; 0 if there is none."""
    if place < 0:
        place %= step
    elif place >= size:
        place -= -(-(place - size + 1) // step) * step
    return place if 0 <= place < size else 0


def _reduction(function: Callable[..., Any]) -> Rule:
    """The rule of a mean, a sum or a maximum over dimensions."""

    def read(of: Operation) -> Value:
        x, axes = of.signal(), of.option("axes", 1)
        if not axes:
            if of.attributes.get("noop_with_empty_axes", 0):
                return x
            axes = [*range(len(x.shape))]
        over = {axis_of(axis, len(x.shape)) for axis in axes}
        kept = [1 if at in over else size for at, size in enumerate(x.shape)]
        if not of.attributes.get("keepdims", 1):
            kept = [size for at, size in enumerate(x.shape) if at not in over]
        large = [axis for axis in over if x.shape[axis] > 1]
        if not large:
            return Signal(x.node, tuple(kept))
        node, dims = of.along(x, large)
        return Signal(of.call(function, node, tuple(dims), True), tuple(kept))

    return read


def _global(function: Callable[..., Any]) -> Rule:
    """The rule of a pool to one number for each channel."""

    def read(of: Operation) -> Value:
        x = of.signal()
        node = of.image(x)
        dims = tuple(range(2, len(x.shape)))
        ones = (1,) * len(dims)
        return Signal(of.call(function, node, dims, True), (*x.shape[:2], *ones))

    return read


RULES: dict[str, Rule] = {
    "AveragePool": _read_average_pool,
    "MaxPool": _read_max_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
}
