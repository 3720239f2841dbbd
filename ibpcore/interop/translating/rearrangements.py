"""Translation of operations that move, drop or add numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TRACED_SAMPLES, TracedSignal, operation
from ibpcore.interop.translating.site import Constant, Layers, Site, Sizes, Translation


def _translate_reshape(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """Any operation that keeps the numbers and their order, so that the new shape defines it."""
    if site.shape == site.given:
        return []
    if site.shape[:1] != (TRACED_SAMPLES,):
        raise site.unsupported("it mixes the images of a batch")
    if len(site.shape) == 2:
        return [il.IntervalFlatten()]
    return [il.IntervalReshape(site.shape[1:])]


def _translate_unchanged(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """Copies, and moves to the type and device that the numbers have already."""
    return []


def _translate_permute(site: Site, input: TracedSignal, *args: Any, **kwargs: Any) -> Layers:
    """Any operation that changes the order of the dimensions."""
    # Each dimension has its number as size, so that the new shape is the new order.
    marked = torch.empty(tuple(range(len(site.given))), device="meta")
    order = getattr(torch, operation(site.node))(marked, *_flat(args), **kwargs).shape
    if order[0] != 0:
        raise site.unsupported("it mixes the images of a batch")
    return [il.IntervalPermute(order)]


def _flat(args: Sequence[Any]) -> Sequence[Any]:
    """Methods take dimensions one by one too: `x.permute(0, 2, 1)`."""
    return [args] if len(args) > 2 else args


def _translate_getitem(site: Site, input: TracedSignal, index: Any) -> Layers:
    index = list(index) if isinstance(index, tuple) else [index]
    lists = [at for at, i in enumerate(index) if isinstance(i, list | Constant)]
    if len(lists) == 1 and all(isinstance(i, slice) for i in index[: lists[0]]):
        return _selected(site, index, lists[0])
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
        raise site.unsupported(
            "only slices, whole numbers and one list of them may select parts of a tensor"
        )
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


def _selected(site: Site, index: Sequence[Any], dim: int) -> Layers:
    """A list of places in one dimension, and whole other ones."""
    if dim == 0 or any(i != slice(None) for at, i in enumerate(index) if at != dim):
        raise site.unsupported("a list may select parts of one dimension only")
    return _translate_index_select(site, TracedSignal(site.given), dim, index[dim])


def _translate_index_select(site: Site, input: TracedSignal, dim: int, index: Any) -> Layers:
    places = site.fixed(index) if isinstance(index, Constant) else torch.tensor(index)
    if places.dtype != torch.int64 or places.dim() != 1:
        raise site.unsupported("only a list of whole numbers may select parts of a tensor")
    dim = _inner(site, dim)
    return [il.IntervalIndexSelect([int(i) % site.given[dim] for i in places], dim)]


def _inner(site: Site, dim: int) -> int:
    """A dimension other than that of the batch, counted from the front."""
    dim %= len(site.given)
    if dim == 0:
        raise site.unsupported("it mixes the images of a batch")
    return dim


def _translate_narrow(site: Site, input: TracedSignal, dim: int, start: int, length: int) -> Layers:
    dim = _inner(site, dim)
    start %= site.given[dim]
    whole = [slice(None)] * dim
    return _translate_getitem(site, input, (*whole, slice(start, start + length)))


def _translate_select(site: Site, input: TracedSignal, dim: int, index: int) -> Layers:
    return _translate_getitem(site, input, (*[slice(None)] * _inner(site, dim), index))


def _translate_flip(site: Site, input: TracedSignal, *args: Any, dims: Any = None) -> Layers:
    turned = [_inner(site, dim) for dim in _numbers(args if dims is None else dims)]
    return [il.IntervalIndexSelect(range(site.given[dim])[::-1], dim) for dim in turned]


def _numbers(given: Any) -> Sequence[int]:
    """Whole numbers that were given one by one, or as a list."""
    return given if all(isinstance(n, int) for n in given) else given[0]


def _translate_roll(site: Site, input: TracedSignal, shifts: Any, dims: Any = ()) -> Layers:
    shifts, dims = ([n] if isinstance(n, int) else n for n in (shifts, dims))
    if not dims:
        raise site.unsupported("it mixes the images of a batch")
    layers: Layers = []
    for shift, given in zip(shifts, dims, strict=True):
        dim = _inner(site, given)
        size = site.given[dim]
        layers.append(il.IntervalIndexSelect([(i - shift) % size for i in range(size)], dim))
    return layers


def _translate_repeat(site: Site, input: TracedSignal, *times: Any) -> Layers:
    counts = _numbers(times)
    counts = [*[1] * (len(site.given) - len(counts)), *counts]
    if len(counts) > len(site.given) or counts[0] != 1:
        raise site.unsupported("it mixes the images of a batch")
    return [
        il.IntervalIndexSelect([*range(site.given[dim])] * count, dim)
        for dim, count in enumerate(counts)
        if count != 1
    ]


def _translate_repeat_interleave(
    site: Site, input: TracedSignal, repeats: int, dim: int | None = None
) -> Layers:
    if dim is None or not isinstance(repeats, int):
        raise site.unsupported("only a number of repetitions along one dimension has a rule")
    dim = _inner(site, dim)
    return [il.IntervalIndexSelect([i // repeats for i in range(site.shape[dim])], dim)]


def _translate_expand(site: Site, input: TracedSignal, *args: Any, **kwargs: Any) -> Layers:
    return broadcast(site, site.given)


def broadcast(site: Site, given: Sizes) -> Layers:
    """The layers that repeat numbers of shape `given` to the shape of the output.

    Raises:
        UserError: these have another number of dimensions, so that images would be mixed.
    """
    shape = site.shape
    if len(given) != len(shape) or given[0] != shape[0]:
        raise site.unsupported(f"its parts have different shapes, {given} and {shape}")
    grown = [dim for dim, (old, new) in enumerate(zip(given, shape, strict=True)) if old != new]
    if len(shape) == 4 and grown and min(grown) >= 2:
        return [il.IntervalUpsample((shape[2] // given[2], shape[3] // given[3]))]
    return [il.IntervalIndexSelect([0] * shape[dim], dim) for dim in grown]


def _translate_channel_shuffle(site: Site, input: TracedSignal, groups: int) -> Layers:
    channels, *others = site.given[1:]
    order = (0, 2, 1, *range(3, 3 + len(others)))
    parts = il.IntervalReshape((groups, channels // groups, *others))
    return [parts, il.IntervalPermute(order), il.IntervalReshape(site.shape[1:])]


def _translate_pixel_shuffle(site: Site, input: TracedSignal, upscale_factor: int) -> Layers:
    _, channels, height, width = site.given
    parts = (channels // upscale_factor**2, upscale_factor, upscale_factor, height, width)
    order = il.IntervalPermute((0, 1, 4, 2, 5, 3))
    return [il.IntervalReshape(parts), order, il.IntervalReshape(site.shape[1:])]


def _translate_pixel_unshuffle(site: Site, input: TracedSignal, downscale_factor: int) -> Layers:
    _, channels, height, width = site.given
    step = downscale_factor
    parts = (channels, height // step, step, width // step, step)
    order = il.IntervalPermute((0, 1, 3, 5, 2, 4))
    return [il.IntervalReshape(parts), order, il.IntervalReshape(site.shape[1:])]


def _translate_pad(
    site: Site, input: TracedSignal, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Layers:
    if mode != "constant" or value:
        raise site.unsupported("only padding by zeros has an interval rule")
    inner = 2 * (len(site.given) - 1)
    if any(pad[inner:]):
        raise site.unsupported("it would add images to the batch")
    return [il.IntervalZeroPad(pad[:inner])]


def _translate_stochastic_depth(
    site: Site, input: TracedSignal, p: float, mode: str, training: bool = True
) -> Layers:
    if training:
        raise site.unsupported("it is active in evaluation too: pass training=self.training")
    return []


def _translate_padding_layer(site: Site, module: Any) -> Layers:
    return _translate_pad(site, TracedSignal(site.given), module.padding, value=module.value)


def _by_operation(function: Translation, argument: str) -> Translation:
    """The translation of modules that apply an operation with one argument."""
    return lambda site, module: function(site, TracedSignal(site.given), getattr(module, argument))


RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel")
PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
UNCHANGED = ("contiguous", "clone", "detach", "to", "type", "type_as", "float", "double", "half")
EXPANSIONS = ("expand", "expand_as", "broadcast_to")
MODULES: dict[type[nn.Module], Translation] = {
    nn.Identity: lambda site, module: [],
    nn.Flatten: _translate_reshape,
    nn.Unflatten: _translate_reshape,
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _translate_padding_layer),
    **dict.fromkeys(
        (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _translate_padding_layer
    ),
    nn.ChannelShuffle: _by_operation(_translate_channel_shuffle, "groups"),
    nn.PixelShuffle: _by_operation(_translate_pixel_shuffle, "upscale_factor"),
    nn.PixelUnshuffle: _by_operation(_translate_pixel_unshuffle, "downscale_factor"),
}
OPERATIONS: dict[str, Translation] = {
    **dict.fromkeys((*RESHAPES, "view_as", "reshape_as"), _translate_reshape),
    **dict.fromkeys((*UNCHANGED, "cpu", "cuda", "positive"), _translate_unchanged),
    **dict.fromkeys(PERMUTATIONS, _translate_permute),
    **dict.fromkeys(EXPANSIONS, _translate_expand),
    "getitem": _translate_getitem,
    "index_select": _translate_index_select,
    "narrow": _translate_narrow,
    "select": _translate_select,
    "flip": _translate_flip,
    "roll": _translate_roll,
    "repeat": _translate_repeat,
    "tile": _translate_repeat,
    "repeat_interleave": _translate_repeat_interleave,
    "channel_shuffle": _translate_channel_shuffle,
    "pixel_shuffle": _translate_pixel_shuffle,
    "pixel_unshuffle": _translate_pixel_unshuffle,
    "pad": _translate_pad,
    # Stochastic depth acts in training alone, where the network leaves it out.
    "torchvision.ops.stochastic_depth.stochastic_depth": _translate_stochastic_depth,
}
