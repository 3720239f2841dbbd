"""Translation of pooling, resizing and means."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Layers, Site, Sizes, Translation
from ibpcore.nn.layers import IntervalLayer

Pool: TypeAlias = Callable[[Any, Any], IntervalLayer]
"""Makes a pooling layer for images with a kernel and a stride."""


def _translate_max_pool(
    site: Site,
    input: TracedSignal,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Layers:
    if return_indices:
        raise site.unsupported("it returns indices")
    return [il.IntervalMaxPool2d(kernel_size, stride, padding, dilation, False, ceil_mode)]


def _translate_adaptive(
    pool: Pool,
    site: Site,
    input: TracedSignal,
    output_size: Any = None,
    return_indices: bool = False,
) -> Layers:
    """To any size, by windows as PyTorch chooses them."""
    if return_indices:
        raise site.unsupported("it returns indices")
    if len(site.given) == 3:
        channels, length = site.given[1:]
        return _in_rows(site, _resized(pool, (channels, 1, length), (1, site.shape[2])))
    return _resized(pool, _image(site), site.shape[2:])


def _image(site: Site) -> Sizes:
    """The shape of an input image."""
    if len(site.given) != 4:
        raise site.unsupported("it has an interval rule only for batches of images")
    return site.given[1:]


def _in_rows(site: Site, layers: Layers) -> Layers:
    """Layers for images (B, C, 1, L) that are applied to (B, C, L)."""
    channels, length = site.given[1:]
    return [il.IntervalReshape((channels, 1, length)), *layers, il.IntervalReshape(site.shape[1:])]


def _resized(pool: Pool, image: Sizes, wanted: Sizes) -> Layers:
    """Pooling of images of shape `image`, (C, H, W), to (height, width)."""
    channels, *given = image
    if given == [*wanted]:
        return []
    if _is_multiple(image, wanted):
        return [il.IntervalUpsample((wanted[0] // given[0], wanted[1] // given[1]))]
    rows, columns = (_windows(old, new) for old, new in zip(given, wanted, strict=True))
    (height, down), (width, right) = _spacing(rows), _spacing(columns)
    if down and right:
        return [pool((height, width), (down, right))]
    lower = (channels, wanted[0], given[1])
    return [*_along(pool, rows, 1, image), *_along(pool, columns, 2, lower)]


def _is_multiple(image: Sizes, wanted: Sizes) -> bool:
    return all(new % old == 0 for old, new in zip(image[1:], wanted, strict=True))


Windows: TypeAlias = list[tuple[int, int]]
"""Starts and ends along one side."""


def _windows(size: int, count: int) -> Windows:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _spacing(windows: Windows) -> tuple[int, int]:
    """Length of the windows and the step between them; 0 for the step if they are not alike."""
    lengths = {end - start for start, end in windows}
    steps = {b[0] - a[0] for a, b in pairwise(windows)} or {windows[0][1]}
    return max(lengths), steps.pop() if len(lengths) == len(steps) == 1 else 0


def _along(pool: Pool, windows: Windows, side: int, image: Sizes) -> Layers:
    """Pooling of images of shape `image` along one side alone, 1 or 2."""

    def pooled(length: int, step: int) -> IntervalLayer:
        return pool((length, 1), (step, 1)) if side == 1 else pool((1, length), (1, step))

    length, step = _spacing(windows)
    if step:
        return [pooled(length, step)]
    branches: Layers = []
    for start, end in windows:
        ranges = [[0, size, 1] for size in image]
        ranges[side] = [start, end, 1]
        part = il.IntervalSlice(ranges)
        branches.append(il.IntervalSequential(part, pooled(end - start, end - start)))
    return [il.IntervalConcat(branches, side + 1)]


def _translate_interpolate(
    site: Site,
    input: TracedSignal,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *others: Any,
    **options: Any,
) -> Layers:
    """The remaining arguments do not matter for mode nearest and a multiple of the size."""
    image, wanted = _image(site), site.shape[2:]
    if mode != "nearest" or not _is_multiple(image, wanted):
        raise site.unsupported("only mode nearest, to a multiple of the size, has an interval rule")
    return _resized(il.IntervalAvgPool2d, image, wanted)


def _translate_reduction(
    pool: Pool,
    site: Site,
    input: TracedSignal,
    dim: Any = (),
    keepdim: bool = False,
    dtype: Any = None,
) -> Layers:
    """A mean, a sum or a maximum over some dimensions."""
    dims = [dim] if isinstance(dim, int) else [*(dim or ())]
    given, over = site.given, {d % len(site.given) for d in dims}
    if not over or 0 in over:
        raise site.unsupported("it mixes the images of a batch")
    if len(given) == 4 and min(over) >= 2:
        rows, columns = (size if d in over else 1 for d, size in enumerate(given) if d > 1)
        return [*_shaped(site, [pool((rows, columns), (rows, columns))], keepdim)]
    kept = [d for d in range(1, len(given)) if d not in over]
    number = math.prod(given[d] for d in over)
    images = il.IntervalReshape((math.prod(given[d] for d in kept), 1, number))
    order = il.IntervalPermute((0, *kept, *sorted(over)))
    return _shaped(site, [order, images, pool((1, number), (1, number))], False)


def _shaped(site: Site, layers: Layers, done: bool) -> Layers:
    """`layers`, and a change to the shape of the output unless they have it already."""
    if done:
        return layers
    flat = len(site.shape) == 2
    return [*layers, il.IntervalFlatten() if flat else il.IntervalReshape(site.shape[1:])]


def _sum_pool(kernel: Any, stride: Any) -> il.IntervalAvgPool2d:
    return il.IntervalAvgPool2d(kernel, stride, divisor_override=1)


def _translate_pool1d(kind: Any, site: Site, input: TracedSignal, *args: Any, **kw: Any) -> Layers:
    """Pooling along a row, by the translation or the layer `kind` for images."""
    names = (*kind.arguments, "return_indices")
    how = dict(zip(names, args, strict=False)) | kw
    ones = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
    for name in ones.keys() & how.keys():
        value = how[name]
        if value is not None:
            along = value if isinstance(value, int) else value[0]
            how[name] = (ones[name], along)
    if how.pop("return_indices", False):
        raise site.unsupported("it returns indices")
    return _in_rows(site, [kind(**how)])


def _translate_pool1d_layer(kind: Any, site: Site, module: Any) -> Layers:
    names = [n for n in kind.arguments if n != "divisor_override"]
    how = {name: getattr(module, name) for name in names}
    how["return_indices"] = getattr(module, "return_indices", False)
    return _translate_pool1d(kind, site, TracedSignal(site.given), **how)


def _translate_upsample_layer(site: Site, module: nn.Upsample) -> Layers:
    return _translate_interpolate(site, TracedSignal(site.given), mode=module.mode)


def _translate_adaptive_max_layer(site: Site, module: Any) -> Layers:
    given = TracedSignal(site.given)
    return _translate_adaptive(
        il.IntervalMaxPool2d, site, given, return_indices=module.return_indices
    )


ADAPTIVE_AVERAGE = partial(_translate_adaptive, il.IntervalAvgPool2d)
ADAPTIVE_MAXIMUM = partial(_translate_adaptive, il.IntervalMaxPool2d)
MODULES: dict[type[nn.Module], Translation] = {
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), ADAPTIVE_AVERAGE),
    nn.AdaptiveMaxPool1d: _translate_adaptive_max_layer,
    nn.AdaptiveMaxPool2d: _translate_adaptive_max_layer,
    nn.AvgPool1d: partial(_translate_pool1d_layer, il.IntervalAvgPool2d),
    nn.MaxPool1d: partial(_translate_pool1d_layer, il.IntervalMaxPool2d),
    nn.Upsample: _translate_upsample_layer,
}
OPERATIONS: dict[str, Translation] = {
    "avg_pool1d": partial(_translate_pool1d, il.IntervalAvgPool2d),
    "avg_pool2d": lambda site, input, *args, **how: [il.IntervalAvgPool2d(*args, **how)],
    "max_pool1d": partial(_translate_pool1d, il.IntervalMaxPool2d),
    "max_pool2d": _translate_max_pool,
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), ADAPTIVE_AVERAGE),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d"), ADAPTIVE_MAXIMUM),
    "interpolate": _translate_interpolate,
    "mean": partial(_translate_reduction, il.IntervalAvgPool2d),
    "sum": partial(_translate_reduction, _sum_pool),
    "amax": partial(_translate_reduction, il.IntervalMaxPool2d),
}
