"""Rules of operators that move, drop or repeat numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import fx

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.arithmetic import minus, plus
from ibpcore.interop.reading.building import Signal, Value, check_size
from ibpcore.interop.reading.operations import (
    Operation,
    Rule,
    axis_of,
    broadcast_shape,
    expanded,
)
from ibpcore.interop.reading.windows import lowest_padded


def reshaped(x: Signal, shape: Sequence[int]) -> Signal:
    """A signal in another shape: no layer, since layouts are made where they are needed.

    Raises:
        UserError: it has another number of numbers.
    """
    if math.prod(shape) != math.prod(x.shape) or min(shape, default=1) < 1:
        raise UserError(f"shape {x.shape} cannot become {tuple(shape)}")
    return Signal(x.node, tuple(int(size) for size in shape))


def _read_reshape(of: Operation) -> Value:
    x, wanted = of.signal(), of.constant(1, "shape").tolist()
    if of.batch > 1 and wanted[:1] == [of.batch] and x.shape[0] == 1:
        wanted[0] = 1  # images are read one by one
    if not of.attributes.get("allowzero", 0):
        wanted = [x.shape[at] if size == 0 else size for at, size in enumerate(wanted)]
    if wanted.count(-1) == 1:
        known = -math.prod(wanted)
        wanted[wanted.index(-1)] = math.prod(x.shape) // max(known, 1)
    return reshaped(x, wanted)


def _read_flatten(of: Operation) -> Value:
    x = of.signal()
    axis = of.attributes.get("axis", 1)
    at = axis if axis == len(x.shape) else axis_of(axis, len(x.shape))
    return reshaped(x, (math.prod(x.shape[:at]), math.prod(x.shape[at:])))


def _read_squeeze(of: Operation) -> Value:
    x = of.signal()
    axes = of.option("axes", 1)
    if axes is None:
        return reshaped(x, [size for size in x.shape if size != 1])
    dropped = {axis_of(axis, len(x.shape)) for axis in axes}
    return reshaped(x, [size for at, size in enumerate(x.shape) if at not in dropped])


def _read_unsqueeze(of: Operation) -> Value:
    x, axes = of.signal(), of.option("axes", 1)
    rank = len(x.shape) + len(axes)
    added = {axis_of(axis, rank) for axis in axes}
    if len(added) != len(axes):
        raise UserError(f"it adds an axis twice: {axes}")
    sizes = iter(x.shape)
    return reshaped(x, [1 if at in added else next(sizes) for at in range(rank)])


def transposed(of: Operation, value: Value, order: Sequence[int]) -> Value:
    """A value with its dimensions in another order."""
    if isinstance(value, np.ndarray):
        return value.transpose(order)
    shape = tuple(value.shape[axis] for axis in order)
    large = [axis for axis in order if value.shape[axis] != 1]
    if large == sorted(large):
        return reshaped(value, shape)
    inner = order[1:] if order[0] == 0 and value.shape[0] == 1 else order
    node, axes = of.along(value, inner)
    return Signal(of.layer(il.IntervalPermute((0, *axes)), node), shape)


def _read_transpose(of: Operation) -> Value:
    x = of.signal()
    order = of.attributes.get("perm", [*range(len(x.shape))][::-1])
    if sorted(order) != [*range(len(x.shape))]:
        raise UserError(f"{order} is no order of {len(x.shape)} dimensions")
    return transposed(of, x, order)


def _read_concat(of: Operation) -> Value:
    parts = [of.signal(at) for at in range(len(of.inputs))]
    axis = axis_of(of.attributes["axis"], len(parts[0].shape))
    whole = [*parts[0].shape]
    whole[axis] = sum(part.shape[axis] for part in parts)
    placed = [of.along(part, [axis]) for part in parts]
    ranks = {len(of.builder.shape(node)) for node, _ in placed}
    if len(ranks) > 1:  # one part has another first dimension
        placed = [(of.formed(part, part.shape), [axis + 1]) for part in parts]
    nodes = tuple(node for node, _ in placed)
    return Signal(of.call(torch.cat, nodes, *placed[0][1]), tuple(whole))


def selected(of: Operation, x: Signal, places: Sequence[int], axis: int) -> Signal:
    """The numbers of a signal at these places along an axis."""
    size = x.shape[axis]
    if not places or min(places) < -size or max(places) >= size:
        raise UserError(f"it takes places {[*places][:8]} of {size}")
    shape = (*x.shape[:axis], len(places), *x.shape[axis + 1 :])
    found = [place % size for place in places]
    if found == [*range(size)]:
        return x
    node, (dim,) = of.along(x, [axis])
    step = found[1] - found[0] if len(found) > 1 else 1
    last = found[-1] + 1
    if step > 0 and found == [*range(found[0], last, step)]:
        ranges = [[0, length, 1] for length in of.builder.shape(node)]
        ranges[dim - 1] = [found[0], last, step]
        return Signal(of.layer(il.IntervalSlice(ranges), node), shape)
    return Signal(of.layer(il.IntervalIndexSelect(found, dim), node), shape)


def _read_slice(of: Operation) -> Value:
    x = of.signal()
    starts, ends = (of.option(name, at) for at, name in enumerate(("starts", "ends"), 1))
    axes = of.option("axes", 3, [*range(len(starts))])
    steps = of.option("steps", 4, [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = axis_of(axis, len(x.shape))
        places = range(x.shape[at])[slice(start, end, step)]
        x = selected(of, x, places, at)
    return x


def _read_gather(of: Operation) -> Value:
    x, indices = of.signal(), of.constant(1, "indices")
    axis = axis_of(of.attributes.get("axis", 0), len(x.shape))
    found = selected(of, x, indices.flatten().tolist(), axis)
    return reshaped(found, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _read_split(of: Operation) -> list[Value]:
    x = of.signal()
    axis = axis_of(of.attributes.get("axis", 0), len(x.shape))
    size, count = x.shape[axis], of.outputs
    step = -(-size // count)
    sizes = of.option("split", 1, [min(step, size - at) for at in range(0, size, step)])
    if sum(sizes) != size or len(sizes) != count:
        raise UserError(f"it splits {size} into {sizes}")
    starts = [sum(sizes[:at]) for at in range(count)]
    return [
        selected(of, x, range(start, start + part), axis)
        for start, part in zip(starts, sizes, strict=True)
    ]


def _read_expand(of: Operation) -> Value:
    x = of.signal()
    return expanded(of, x, broadcast_shape(x.shape, tuple(of.constant(1, "shape").tolist())))


def _read_tile(of: Operation) -> Value:
    x = of.signal()
    counts = of.constant(1, "repeats").tolist()
    check_size(math.prod(counts) * math.prod(x.shape))
    for axis, count in enumerate(counts):
        x = selected(of, x, [*range(x.shape[axis])] * count, axis)
    return x


def _read_pad(of: Operation) -> Value:
    x, pads = of.signal(), of.option("pads", 1)
    value = of.option("value", 2, 0.0)
    mode = of.attributes.get("mode", "constant")
    axes = of.option("axes", 3, [*range(len(x.shape))])
    places = [axis_of(axis, len(x.shape)) for axis in axes]
    if len(pads) != 2 * len(places):
        raise UserError("its pads are for another number of dimensions")
    pairs = dict(
        zip(places, zip(pads[: len(places)], pads[len(places) :], strict=True), strict=True)
    )
    if mode != "constant":
        check_size(math.prod(x.shape) * (1 + max(pads, default=0)))
        for axis, pair in pairs.items():
            if mode != "edge" and max(pair) > x.shape[axis] - (mode == "reflect"):
                raise UserError(f"it pads more than {x.shape[axis]} numbers can by {mode}")
            source = np.pad(np.arange(x.shape[axis]), pair, mode)
            x = selected(of, x, source.tolist(), axis)
        return x
    number = np.asarray(value, dtype=np.float64).reshape(())
    if number == -np.inf:
        return padded(of, x, pairs, partial(of.call, lowest_padded))
    if number == 0:
        return padded(of, x, pairs, partial(_zero_padded, of))
    return plus(of, padded(of, minus(of, x, number), pairs, partial(_zero_padded, of)), number)


def _zero_padded(of: Operation, node: fx.Node, numbers: Sequence[int]) -> fx.Node:
    return of.layer(il.IntervalZeroPad(numbers), node)


def padded(
    of: Operation, x: Signal, pairs: dict[int, tuple[int, int]], pad: Callable[..., fx.Node]
) -> Signal:
    """A signal with so many numbers before and after it, along each axis.

    Args:
        pad: pads a node, by numbers as `F.pad` takes them.
    """
    used = {axis: pair for axis, pair in pairs.items() if any(pair)}
    if not used:
        return x
    node, dims = of.along(x, [*used])
    numbers = [0] * (2 * len(of.builder.shape(node)))
    shape = [*x.shape]
    for dim, (axis, pair) in zip(dims, used.items(), strict=True):
        numbers[2 * (dim - 1) : 2 * dim] = pair[::-1]
        shape[axis] += sum(pair)
    return Signal(pad(node, numbers[::-1]), tuple(shape))


def _read_depth_to_space(of: Operation) -> Value:
    x, block = of.signal(), of.attributes["blocksize"]
    channels, height, width = of.builder.shape(of.image(x, [4]))
    depth = channels // block**2
    first = of.attributes.get("mode", "DCR") == "DCR"
    parts = (block, block, depth) if first else (depth, block, block)
    order = (3, 4, 1, 5, 2) if first else (1, 4, 2, 5, 3)
    node = of.formed(x, (*parts, height, width))
    node = of.layer(il.IntervalPermute((0, *order)), node)
    return Signal(node, (1, depth, height * block, width * block))


def _read_space_to_depth(of: Operation) -> Value:
    x, block = of.signal(), of.attributes["blocksize"]
    channels, height, width = of.builder.shape(of.image(x, [4]))
    rows, columns = height // block, width // block
    node = of.formed(x, (channels, rows, block, columns, block))
    node = of.layer(il.IntervalPermute((0, 3, 5, 1, 2, 4)), node)
    return Signal(node, (1, channels * block**2, rows, columns))


RULES: dict[str, Rule] = {
    "Reshape": _read_reshape,
    "Flatten": _read_flatten,
    "Squeeze": _read_squeeze,
    "Unsqueeze": _read_unsqueeze,
    "Transpose": _read_transpose,
    "Concat": _read_concat,
    "Slice": _read_slice,
    "Gather": _read_gather,
    "Expand": _read_expand,
    "Split": _read_split,
    "Tile": _read_tile,
    "Pad": _read_pad,
    "DepthToSpace": _read_depth_to_space,
    "SpaceToDepth": _read_space_to_depth,
    "Shape": lambda of: np.array(
        of.signal().shape[of.attributes.get("start", 0) : of.attributes.get("end")]
    ),
    "Size": lambda of: np.array(math.prod(of.signal().shape)),
}
