"""Margins that hold under rounding errors, by interval bounds and by linear bounds.

Numbers in parentheses are equations of docs/soundness.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.bounds.chunking import default_budget, in_chunks, remembered
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import Proof, bound_named
from ibpcore.certification.soundness.arithmetic import ball, raised
from ibpcore.certification.soundness.linear import (
    NO_SLOPES,
    Slopes,
    SoundBounds,
    back,
    dot,
    largest,
    of_samples,
    total,
)
from ibpcore.certification.soundness.narrowing import narrowing
from ibpcore.certification.soundness.network import SoundNetwork
from ibpcore.certification.soundness.rules import ProductRule, Rule
from ibpcore.certification.soundness.visits import Narrow, Visit, flat, output, rounding, run, taken

IS_LINEAR = {Proof.INTERVAL: False, Proof.LINEAR: True, Proof.LINEAR_THROUGHOUT: True}
"""Whether rows are propagated backwards through the rules; any other kind of proof fails here."""


def sound_margins(
    network: SoundNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    slopes: Mapping[int, Slopes] | None = None,
) -> Tensor:
    """R_cert (eq. 3) including rounding errors: a negative value proves the claim of `network`.

    Args:
        images: (B, C, H, W) in pixel units; the claim is about exactly these numbers.
        labels: (B,) class indices.
        epsilons: (B,) in pixel units, taken as exact.
        options, slopes: see `sound_upper`.

    Returns:
        (B,) float64, +inf where anything overflows or is NaN.
    """
    if len(epsilons) == 0:
        return epsilons.double()
    box = ball(images.double(), epsilons.double(), options.clip)
    return largest_difference(sound_upper(network, box, labels, options, slopes), labels)


def sound_upper(
    network: SoundNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    slopes: Mapping[int, Slopes] | None = None,
) -> Tensor:
    """Upper bounds on all f_i - f_y over boxes, including rounding errors.

    Args:
        box: (B, ...) float64, B >= 1; the claim of `network` is about the numbers in it.
        labels: (B,) class indices.
        options: those used for the radii. A last layer that is not linear is not merged;
            linear bounds always merge a linear one.
        slopes: of lower lines, as `ibpcore.bounds.alpha_crown.slopes` gives them; any are sound.
            Those for the rows of the input of a `NonlinearRule` stand under its number, those for
            the rows of the margins, one for each class, under `MARGINS`. None for those of CROWN.

    Returns:
        (B, classes) float64, +inf for a sample for which anything overflows or is NaN. The
        values at i = y have no meaning.
    """
    proof = bound_named(options.bound).proof
    linear, given = IS_LINEAR[proof], slopes or {}
    size, lanes = _sizes(network, taken(box, slice(1)), linear, options.budget)

    def chunk(_: Tensor, samples: slice) -> Tensor:
        boxes = taken(box, samples)
        some = {place: of_samples(inner, samples) for place, inner in given.items()}
        if linear:
            narrow = narrowing(some, lanes) if proof is Proof.LINEAR_THROUGHOUT else None
            last = some.get(MARGINS, NO_SLOPES)
            upper = _linear(network.rules, boxes, labels[samples], options.elide, narrow, last)
        else:
            upper = _interval(network.rules, boxes, labels[samples], options.elide)
        return torch.where(upper.isfinite().all(1, keepdim=True), upper, torch.inf)

    return in_chunks(chunk, box.mid.new_zeros(len(labels)), size)


def midpoint_logits(network: SoundNetwork, images: Tensor) -> Tensor:
    """Logits (B, classes) of images (B, C, H, W), in float64, without their rounding errors."""
    box = Interval(mid=images.double(), rad=torch.zeros_like(images, dtype=torch.float64))
    return output(network.rules, box).mid


def _interval(rules: Sequence[Rule], box: Interval, labels: Tensor, elide: bool) -> Tensor:
    """(B, classes) upper bounds on f_i - f_y by intervals; those at i = y have no meaning."""
    last, x = rules[-1], output(rules[:-1], box)
    if elide and _merges(last):
        return largest(_merged(last, x, last.middle(x), labels), x)
    return _apart(output((last,), x), labels)


def _linear(
    rules: Sequence[Rule],
    box: Interval,
    labels: Tensor,
    elide: bool,
    narrow: Narrow | None,
    slopes: Slopes,
) -> Tensor:
    """(B, classes) of the smaller of interval and linear bounds, see `_interval`."""
    passed = run(rules, box, narrow=narrow)
    rule, x, logits = rules[-1], passed[-1].x, passed[-1].y
    if _merges(rule):
        start, passed = _merged(rule, x, logits.mid, labels), passed[:-1]
    else:
        start = _rows(logits, labels)
    by_intervals = largest(start, x) if elide and _merges(rule) else _apart(logits, labels)
    return torch.minimum(by_intervals, largest(back(passed, start, slopes), box))


def _merges(last: Rule) -> TypeGuard[ProductRule]:
    return isinstance(last, ProductRule) and last.weight.dim() == 2


def _apart(logits: Interval, labels: Tensor) -> Tensor:
    """Upper ends of f_i minus the lower end of f_y."""
    index = labels[:, None]
    value = logits.mid - logits.mid.gather(1, index)
    return total(value, logits.rad + logits.rad.gather(1, index))


def _rows(logits: Interval, labels: Tensor) -> SoundBounds:
    """f_i - f_y as rows over the logits."""
    index = labels[:, None]
    identity = torch.eye(logits.shape[1], dtype=torch.float64, device=labels.device)
    value = logits.mid - logits.mid.gather(1, index)
    return SoundBounds(identity - identity[index], value, torch.zeros_like(value))


def _merged(last: ProductRule, x: Interval, mid: Tensor, labels: Tensor) -> SoundBounds:
    """f_i - f_y as rows over the last layer's input x: (17); `mid` are its logits at the middle."""
    index, errors = labels[:, None], last.errors(x)
    rows = last.weight - last.weight[index]
    slack = errors + errors.gather(1, index) + dot(rows.abs(), rounding(x)[:, None])
    return SoundBounds(rows, mid - mid.gather(1, index), raised(slack, 4))


def _sizes(
    network: SoundNetwork, box: Interval, linear: bool, budget: int | None
) -> tuple[int, int]:
    """The numbers of samples, and of rows, that fit the budget, see `ibpcore.bounds.chunking`.

    Args:
        box: of a single sample.
    """
    key = ("proof", linear, *box.shape[1:])
    sample, row = remembered(network.folded, key, lambda: _footprint(network.rules, box, linear))
    given = default_budget(box.mid.device) if budget is None else budget
    return max(1, given // (8 * sample)), max(1, given // (8 * row))


def _footprint(rules: Sequence[Rule], box: Interval, linear: bool) -> tuple[int, int]:
    """Live numbers for each sample, and for each row, in a pass over `box`, of a single sample."""
    passed = flat(run(rules, Interval(mid=box.mid, rad=torch.zeros_like(box.rad))))
    classes = passed[-1].y.mid.numel()
    # With each input and output: errors, lines, and a copy in another order of samples.
    kept = sum(12 * visit.x.mid.numel() + 6 * visit.y.mid.numel() for visit in passed)
    widest = max(_numbers(visit) for visit in passed)
    merged = 3 * classes * passed[-1].x.mid.numel()
    numbers = max(classes * widest, merged) + kept if linear else max(4 * widest, merged)
    return numbers, widest


def _numbers(visit: Visit) -> int:
    """Live numbers for a single row, forwards and backwards through a rule."""
    patches = visit.rule.patches if isinstance(visit.rule, ProductRule) else 1
    return (patches + 1) * visit.x.mid.numel() + 2 * visit.y.mid.numel()
