"""Translation of operations that move, drop or add numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TRACED_SAMPLES, TracedSignal
from ibpcore.interop.translating.site import Layers, Site, Translation


def _translate_reshape(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """Any operation that keeps the numbers and their order, so that the new shape defines it."""
    if site.shape == site.given:
        return []
    if site.shape[:1] != (TRACED_SAMPLES,):
        raise site.unsupported("it mixes the images of a batch")
    if len(site.shape) == 2:
        return [il.IntervalFlatten()]
    return [il.IntervalReshape(site.shape[1:])]


def _translate_permute(site: Site, input: TracedSignal, *dims: Any) -> Layers:
    given = dims[0] if isinstance(dims[0], tuple | list) else dims
    order = [dim % len(site.given) for dim in given]
    if order[0] != 0:
        raise site.unsupported("it mixes the images of a batch")
    return [il.IntervalPermute(order)]


def _translate_transpose(site: Site, input: TracedSignal, dim0: int, dim1: int) -> Layers:
    order = list(range(len(site.given)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _translate_permute(site, input, order)


def _translate_getitem(site: Site, input: TracedSignal, index: Any) -> Layers:
    index = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
        raise site.unsupported("only slices and whole numbers may select parts of a tensor")
    if ... in index:
        at, used = index.index(...), sum(i is not None and i is not ... for i in index)
        index[at : at + 1] = [slice(None)] * (len(site.given) - used)
    chosen = [i for i in index if i is not None]
    chosen += [slice(None)] * (len(site.given) - len(chosen))
    if chosen[0] != slice(None):
        raise site.unsupported("it mixes the images of a batch")
    ranges = []
    for i, size in zip(chosen[1:], site.given[1:], strict=True):
        whole = i if isinstance(i, slice) else slice(i % size, i % size + 1)
        ranges.append(whole.indices(size))
    left = (TRACED_SAMPLES, *(len(range(*numbers)) for numbers in ranges))
    layers: Layers = [] if left == site.given else [il.IntervalSlice(ranges)]
    # A whole number removes a dimension, and None adds one.
    return layers if left == site.shape else [*layers, il.IntervalReshape(site.shape[1:])]


def _translate_pad(
    site: Site, input: TracedSignal, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Layers:
    if mode != "constant" or value:
        raise site.unsupported("only padding by zeros has an interval rule")
    if len(pad) > 2 * (len(site.given) - 1):
        raise site.unsupported("it would add images to the batch")
    return [il.IntervalZeroPad(pad)]


def _translate_padding_layer(site: Site, module: Any) -> Layers:
    return _translate_pad(site, TracedSignal(site.given), module.padding, value=module.value)


MODULES: dict[type[nn.Module], Translation] = {
    nn.Identity: lambda site, module: [],
    nn.Flatten: _translate_reshape,
    nn.Unflatten: _translate_reshape,
    nn.ZeroPad2d: _translate_padding_layer,
    nn.ConstantPad2d: _translate_padding_layer,
}
OPERATIONS: dict[str, Translation] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze"), _translate_reshape),
    **dict.fromkeys(("unsqueeze", "contiguous", "clone"), _translate_reshape),
    "permute": _translate_permute,
    "transpose": _translate_transpose,
    "getitem": _translate_getitem,
    "pad": _translate_pad,
}
