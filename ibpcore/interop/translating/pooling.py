"""Translation of pooling, resizing and means."""

from __future__ import annotations

from typing import Any

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TracedSignal
from ibpcore.interop.translating.site import Layers, Site, Translation


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


def _translate_resize(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """To a divisor of the size by averaging, or to a multiple of it by repetition."""
    if len(site.given) != 4:
        raise site.unsupported("it has an interval rule only for batches of images")
    (height, width), (rows, columns) = site.given[2:], site.shape[2:]
    if (rows, columns) == (height, width):
        return []
    if height % rows == 0 and width % columns == 0:
        return [il.IntervalAvgPool2d((height // rows, width // columns))]
    if rows % height == 0 and columns % width == 0:
        return [il.IntervalUpsample((rows // height, columns // width))]
    raise site.unsupported(f"{rows}x{columns} does not divide its input, {height}x{width}")


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
    grown = all(new >= old for new, old in zip(site.shape[2:], site.given[2:], strict=True))
    if mode != "nearest" or not grown:
        raise site.unsupported("only mode nearest, to a multiple of the size, has an interval rule")
    return _translate_resize(site)


def _translate_mean(
    site: Site, input: TracedSignal, dim: Any = (), keepdim: bool = False, dtype: Any = None
) -> Layers:
    dims = [dim] if isinstance(dim, int) else [*(dim or ())]
    over = {d % len(site.given) for d in dims}
    if dtype not in (None, site.trace.like.dtype):
        raise site.unsupported("it changes the type of the numbers")
    if len(site.given) != 4 or not over or not over <= {2, 3}:
        raise site.unsupported("only means over height and width have an interval rule")
    rows, columns = (size if d in over else 1 for d, size in enumerate(site.given) if d > 1)
    pooled: Layers = [il.IntervalAvgPool2d((rows, columns))]
    if keepdim:
        return pooled
    flat = il.IntervalFlatten() if len(over) == 2 else il.IntervalReshape(site.shape[1:])
    return [*pooled, flat]


def _translate_upsample_layer(site: Site, module: nn.Upsample) -> Layers:
    return _translate_interpolate(site, TracedSignal(site.given), mode=module.mode)


MODULES: dict[type[nn.Module], Translation] = {
    nn.AdaptiveAvgPool2d: _translate_resize,
    nn.Upsample: _translate_upsample_layer,
}
OPERATIONS: dict[str, Translation] = {
    "avg_pool2d": lambda site, input, *args, **how: [il.IntervalAvgPool2d(*args, **how)],
    "max_pool2d": _translate_max_pool,
    "adaptive_avg_pool2d": _translate_resize,
    "interpolate": _translate_interpolate,
    "mean": _translate_mean,
}
