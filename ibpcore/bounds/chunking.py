"""Cuts a pass at many radii into chunks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Affine, Fork, Operator, Relu, run

CPU_BUDGET = 32 * 2**20
"""Larger passes leave the cache, and take up to twice the time (`benchmarks.bound_passes`)."""
CUDA_SHARE = 8
"""The budget on CUDA is the device's memory divided by this."""
_FOOTPRINTS: WeakKeyDictionary[object, dict[Any, tuple[int, int]]] = WeakKeyDictionary()
"""Numbers alive for each lane and for each sample, by origin and image shape."""


def default_budget(device: torch.device) -> int:
    """Bytes that a pass may take for its intermediate results."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_SHARE
    return CPU_BUDGET


def chunk_size(
    network: FoldedNetwork, images: Tensor, elide: bool, radii: int, budget: int | None
) -> int:
    """Lanes, a sample at a radius each, that may go through the network at a time.

    At least one: a budget below the need of a single lane cannot be kept.

    Args:
        images: (B, ...), of which the first tells the sizes of all intermediate results.
        elide: the margins are made with the last layer merged.
        radii: how many of them each sample has.
        budget: in bytes; None for that of the device.
    """
    lane, sample = _remembered(
        network, (*images.shape[1:], elide), lambda: _footprint(network, images[:1], elide)
    )
    budget = default_budget(images.device) if budget is None else budget
    numbers = budget // images.element_size()
    # What a sample needs is shared by its radii, as far as they fit in one chunk.
    size = (numbers - sample) // lane
    return max(1, size if size < radii else numbers * radii // (lane * radii + sample))


def backward_chunk_size(network: FoldedNetwork, images: Tensor, budget: int | None) -> int:
    """Lanes at a time for a pass that goes back through the network with a row for each class.

    Args: see `chunk_size`.
    """
    key = ("backward", *images.shape[1:])
    lane, _ = _remembered(network, key, lambda: (_backward_footprint(network, images[:1]), 0))
    budget = default_budget(images.device) if budget is None else budget
    return max(1, budget // images.element_size() // lane)


def _remembered(
    network: FoldedNetwork, key: tuple[Any, ...], measure: Callable[[], tuple[int, int]]
) -> tuple[int, int]:
    """What `measure` gave for a network of the same origin: it costs a pass over an image."""
    known = _FOOTPRINTS.setdefault(network.origin, {})
    if key not in known:
        known[key] = measure()
    return known[key]


@torch.no_grad()
def _backward_footprint(network: FoldedNetwork, image: Tensor) -> int:
    """Numbers alive at the worst moment of a pass there and back, for each lane."""
    sizes = [image.numel()]
    ball = Interval(image, torch.zeros_like(image))
    logits = network(ball, lambda operator, x: sizes.append(x.mid.numel()))
    # Of the intervals all are kept, of the rows those around an operator, each in two parts. The
    # rows of -f_y come on top, or those at a residual sum.
    return 2 * sum(sizes) + 4 * (logits.mid.numel() + 1) * max(sizes)


@torch.no_grad()
def _footprint(network: FoldedNetwork, image: Tensor, elide: bool) -> tuple[int, int]:
    """Numbers alive at the worst moment of a pass, for each lane and for each sample."""
    operators, sample = network.operators, 0
    if elide:
        operators, last = final_linear(network)
        sample = 3 * last.weight.numel()  # |W_i - W_y|, and what it is made of
    ball = Interval(image, torch.zeros_like(image))
    # While the ball is made: the images, the two ends, and what is computed of them. The
    # ball itself stays, and the images repeated for each radius.
    start, kept = 6 * image.numel(), 3 * image.numel()
    return max(start, kept + _peak(operators, ball)[0]), sample


def _peak(operators: Sequence[Operator], x: Interval) -> tuple[int, Interval]:
    """Numbers alive at the worst moment of `operators`, their input included, and the output."""
    peak = 2 * x.mid.numel()
    for operator in operators:
        before = x
        if isinstance(operator, Fork):
            parts: list[Interval] = []
            need = made = 0
            for branch in operator.branches:
                most, part = _peak(branch, x)
                # Its input is there until the last branch has read it.
                waits = 2 * x.mid.numel() if len(parts) + 1 < len(operator.branches) else 0
                need = max(need, most + waits + made)
                parts.append(part)
                made += 2 * part.mid.numel()
            x = operator.join(parts)
            need = max(need, made + 2 * x.mid.numel())
        else:
            x = run((operator,), x)
            into, out = 2 * before.mid.numel(), 2 * x.mid.numel()
            # Other maps make both ends of the input and of the output.
            need = into + out if isinstance(operator, Affine | Relu) else 2 * into + 2 * out
        peak = max(peak, need)
    return peak, x


def in_chunks(function: Callable[[Tensor, slice], Tensor], epsilons: Tensor, size: int) -> Tensor:
    """function(epsilons, all samples), computed for at most `size` lanes at a time.

    A chunk for which CUDA has not enough memory is halved, and so are those after it.

    Args:
        function: (k, b) radii and which of the samples they belong to, to (k, b) values.
        epsilons: (B,) or (K, B), not empty.
        size: at least 1.

    Returns:
        values, shaped like `epsilons`.

    Raises:
        torch.OutOfMemoryError: a single lane does not fit.
    """
    radii = epsilons if epsilons.dim() == 2 else epsilons[None]
    rows, samples = radii.shape
    columns, first = [], 0
    while first < samples:
        width, height = max(1, size // rows), min(rows, size)
        block = slice(first, first + width)
        try:
            parts = [function(part, block) for part in radii[:, block].split(height)]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            continue
        columns.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        first += width
    return (columns[0] if len(columns) == 1 else torch.cat(columns, 1)).view_as(epsilons)
