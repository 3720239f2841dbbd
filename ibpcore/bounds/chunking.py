"""Splits a pass at many radii into chunks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Affine, Fork, Operator, Product, Relu, run
from ibpcore.bounds.visits import Visit, flattened, output, trace

CPU_BUDGET = 32 * 2**20
"""Larger passes do not fit the cache and take up to twice as long (`benchmarks.bound_passes`)."""
CUDA_SHARE = 8
"""The budget on CUDA is the device's memory divided by this."""
LIVE_ROWS = 12
"""Numbers of a row of CROWN that are alive at a time, for each component of the widest input."""
FEW_ROWS = 8
"""Rows of a lane that CROWN can propagate from an inner layer at a time, at least."""
_FOOTPRINTS: WeakKeyDictionary[object, dict[Any, tuple[int, int]]] = WeakKeyDictionary()
"""Live numbers per lane and per sample, by origin and image shape."""


def default_budget(device: torch.device) -> int:
    """Default memory budget for the intermediate results of a pass, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_SHARE
    return CPU_BUDGET


def chunk_size(
    network: FoldedNetwork, images: Tensor, elide: bool, radii: int, budget: int | None
) -> int:
    """Number of lanes, pairs of a sample and a radius, that fit the budget in one pass.

    At least 1, even if the budget is too small for a single lane. The sizes of intermediate
    results are measured on the first of `images`, (B, ...).

    Args:
        radii: number of radii per sample.
        budget: in bytes; None for `default_budget`.
    """
    lane, sample = remembered(
        network, (*images.shape[1:], elide), lambda: _footprint(network, images[:1], elide)
    )
    budget = default_budget(images.device) if budget is None else budget
    numbers = budget // images.element_size()
    # The radii of a sample that are in one chunk share the memory needed per sample.
    size = (numbers - sample) // lane
    return max(1, size if size < radii else numbers * radii // (lane * radii + sample))


def backward_chunk_size(network: FoldedNetwork, images: Tensor, budget: int | None) -> int:
    """`chunk_size` for a pass that propagates one row per class backwards through the network."""
    key = ("backward", *images.shape[1:])
    lane, _ = remembered(network, key, lambda: (_backward_footprint(network, images[:1]), 0))
    budget = default_budget(images.device) if budget is None else budget
    return max(1, budget // images.element_size() // lane)


def crown_chunk_size(network: FoldedNetwork, images: Tensor, budget: int | None) -> int:
    """`chunk_size` for a pass that also propagates rows from the inner layers.

    Many lanes with few rows of each are faster than the other way round. The rows that do not fit
    beside others are split (`ibpcore.bounds.crown`).
    """
    key = ("crown", *images.shape[1:])
    lane, _ = remembered(network, key, lambda: (_crown_footprint(network, images[:1]), 0))
    budget = default_budget(images.device) if budget is None else budget
    return max(1, budget // images.element_size() // lane)


def remembered(
    network: FoldedNetwork, key: tuple[Any, ...], measure: Callable[[], tuple[int, int]]
) -> tuple[int, int]:
    """The result of `measure`, a pass over one image, cached for networks of the same origin.

    `key` says what is measured, and of images of which shape.
    """
    known = _FOOTPRINTS.setdefault(network.origin, {})
    if key not in known:
        known[key] = measure()
    return known[key]


@torch.no_grad()
def _backward_footprint(network: FoldedNetwork, image: Tensor) -> int:
    """Peak number of live numbers per lane in a forward and backward bound pass."""
    ball = Interval(mid=image, rad=torch.zeros_like(image))
    visits = trace(network.operators, ball)
    logits = output(visits, ball).mid.numel()
    intervals = [end for visit in flattened(visits) for end in (visit.x, visit.y, *visit.parts)]
    widest = max((x.mid.numel() for x in intervals), default=image.numel())
    # Of the rows only those before and after one operator, each split in two or copied in another
    # order, and those that wait at a fork. The rows of -f_y come on top.
    waiting = max((1 + len(visit.lines) // 2 for visit in visits if visit.branches), default=0)
    return kept_numbers(visits) + (5 + waiting) * (logits + 1) * widest


def kept_numbers(visits: Sequence[Visit]) -> int:
    """How many numbers the intervals and lines of visits have."""
    kept: dict[int, int] = {}
    for visit in flattened(visits):
        intervals = (visit.x, visit.y, *visit.parts)
        ends = [end for interval in intervals for end in (interval.mid, interval.rad)]
        pairs = visit.lines if visit.other is None else (*visit.lines, visit.other)
        lines = [line for pair in pairs for line in pair if line is not None]
        kept |= {id(x): x.numel() for x in (*ends, *lines)}
    return sum(kept.values())


@torch.no_grad()
def _crown_footprint(network: FoldedNetwork, image: Tensor) -> int:
    """Live numbers per lane in a pass by CROWN, with few inner rows of each lane at a time."""
    visits = trace(network.operators, Interval(mid=image, rad=torch.zeros_like(image)))
    widest = max((visit.x.mid.numel() for visit in flattened(visits)), default=image.numel())
    return max(_backward_footprint(network, image), FEW_ROWS * LIVE_ROWS * widest)


@torch.no_grad()
def _footprint(network: FoldedNetwork, image: Tensor, elide: bool) -> tuple[int, int]:
    """Peak number of live numbers in a pass, per lane and per sample."""
    operators, last = final_linear(network, elide)
    sample = 0 if last is None else 3 * last.weight.numel()  # |W_i - W_y| and its operands
    ball = Interval(mid=image, rad=torch.zeros_like(image))
    # Building the ball takes the images, both ends and their intermediate results. Afterwards
    # the ball and the images, repeated for each radius, stay alive.
    start, kept = 6 * image.numel(), 3 * image.numel()
    return max(start, kept + _peak(operators, ball)[0]), sample


def _peak(operators: Sequence[Operator], x: Interval) -> tuple[int, Interval]:
    """Peak number of live numbers in `operators`, including their input, and their output."""
    peak = 2 * x.mid.numel()
    for operator in operators:
        before = x
        if isinstance(operator, Fork):
            parts: list[Interval] = []
            need = outputs = 0
            for branch in operator.branches:
                branch_peak, part = _peak(branch, x)
                # The input stays alive until the last branch has read it.
                held = 2 * x.mid.numel() if len(parts) + 1 < len(operator.branches) else 0
                need = max(need, branch_peak + held + outputs)
                parts.append(part)
                outputs += 2 * part.mid.numel()
            x = operator.join(parts)
            # A product also computes three terms, their sums, and both distances of its ends.
            copies = 9 if isinstance(operator, Product) else 2
            need = max(need, outputs + copies * x.mid.numel())
        else:
            x = run((operator,), x)
            into, out = 2 * before.mid.numel(), 2 * x.mid.numel()
            # Other maps also compute both ends of the input and of the output.
            need = into + out if isinstance(operator, Affine | Relu) else 2 * into + 2 * out
        peak = max(peak, need)
    return peak, x


def in_chunks(function: Callable[[Tensor, slice], Tensor], epsilons: Tensor, size: int) -> Tensor:
    """`function` of all radii and samples, evaluated on at most `size` lanes at a time.

    If CUDA runs out of memory, this chunk and all later ones are halved.

    Args:
        function: maps radii, (b,) or (k, b), and the slice of their b samples to values,
            (b, ...) or (k, b, ...).
        epsilons: (B,) or (K, B) radii, not empty.
        size: at least 1.

    Returns:
        values, (B, ...) or (K, B, ...) like `epsilons`.

    Raises:
        torch.OutOfMemoryError: even a single lane does not fit.
    """
    rows, samples = len(epsilons) if epsilons.dim() == 2 else 1, epsilons.shape[-1]
    columns, first = [], 0
    while first < samples:
        width, height = max(1, size // rows), min(rows, size)
        try:
            if rows * samples <= size:
                parts = [function(epsilons, slice(None))]
            else:
                block = slice(first, first + width)
                some = epsilons[..., block]
                several = some.split(height) if rows > 1 else [some]
                parts = [function(part, block) for part in several]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            continue
        columns.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        first += width
    return columns[0] if len(columns) == 1 else torch.cat(columns, epsilons.dim() - 1)
