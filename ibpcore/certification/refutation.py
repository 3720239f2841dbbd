"""Which cases of a property no input satisfies, by the bounds of the registry and their proofs.

A linear layer behind the network computes bound - weight y for every constraint, and a last
output that is 0. That one is the label: the bounds on f_i - f_y are then those on the constraints,
and where one is negative, its constraint is violated everywhere on the box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import bound_named
from ibpcore.certification.properties import Case, Ends, Rows, as_type, rows_of
from ibpcore.certification.soundness.arithmetic import REALS, from_ends
from ibpcore.certification.soundness.margins import sound_upper
from ibpcore.certification.soundness.network import SoundNetwork
from ibpcore.certification.soundness.rules import ProductRule
from ibpcore.errors import UserError
from ibpcore.nn.affine import IntervalLinear
from ibpcore.nn.composition import IntervalSequential
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, weight_like

CASES_AT_ONCE = 32

Upper: TypeAlias = Callable[[Rows, Ends], Tensor]
"""(R constraints, ends (B, *in_shape) of boxes) -> (B, R) upper bounds on bound - weight y."""


@torch.no_grad()
def refuted(
    model: Classifier, sound: SoundNetwork | None, cases: Sequence[Case], options: BoundOptions
) -> list[bool]:
    """For each case whether it is refuted: a constraint of it is violated everywhere on its box.

    Args:
        model: in evaluation mode.
        sound: of the model for a claim, which is then proved; None if nothing is to be proved.
        options: the bound.

    Raises:
        UserError: a layer has no rule, or no proof covers a constraint.
    """
    found = _refuted(model, cases, lambda rows, ends: _computed(model, rows, ends, options))
    if sound is None:
        return found
    some = [case for case, is_refuted in zip(cases, found, strict=True) if is_refuted]
    proved = iter(_refuted(model, some, lambda rows, ends: _proved(sound, rows, ends, options)))
    return [is_refuted and next(proved) for is_refuted in found]


def headed(model: Classifier, rows: Rows) -> IntervalSequential:
    """The network with the constraints as outputs, (B, R + 1); the last one is 0."""
    like = weight_like(model)
    layer = IntervalLinear(model.classes, len(rows.bound) + 1).to(like)
    with torch.no_grad():
        layer.weight.copy_(F.pad(-rows.weight, (0, 0, 0, 1)))
        layer.bias.copy_(F.pad(as_type(rows.bound, like.dtype, inf), (0, 1)))
    return IntervalSequential(model, layer.requires_grad_(False)).eval()


def _refuted(model: Classifier, cases: Sequence[Case], upper: Upper) -> list[bool]:
    found: list[bool] = []
    for first in range(0, len(cases), CASES_AT_ONCE):
        some = cases[first : first + CASES_AT_ONCE]
        rows = rows_of(some, model.classes)
        boxes = [*dict.fromkeys(case.box for case in some)]
        owners = [boxes.index(case.box) for case in some]
        ends = Ends(*(torch.stack(end) for end in zip(*(box.outer for box in boxes), strict=True)))
        device = weight_like(model).device
        ends = Ends(*(end.view(-1, *model.in_shape).to(device) for end in ends))
        bounds = upper(rows, ends)[owners].cpu()
        found += ((bounds < 0) & rows.member).any(1).tolist()
    return found


def _computed(model: Classifier, rows: Rows, ends: Ends, options: BoundOptions) -> Tensor:
    """(B, R) bounds in the arithmetic of the model, without a proof."""
    dtype = weight_like(model).dtype
    box = Interval.from_bounds(as_type(ends.lower, dtype, -inf), as_type(ends.upper, dtype, inf))
    network = fold(headed(model, rows))
    found = bound_named(options.bound).box_logits(network, box, _labels(rows, ends), options)
    return found[:, :-1]


def _proved(sound: SoundNetwork, rows: Rows, ends: Ends, options: BoundOptions) -> Tensor:
    """(B, R) bounds that include all rounding errors; infinite where anything is not finite."""
    if not rows.exact:
        raise UserError(
            "no proof covers the coefficients of a constraint, which have too many digits for"
            " float64: --claim unchecked needs no proof"
        )
    device = ends.lower.device
    head = ProductRule(
        weight=F.pad(-rows.weight, (0, 0, 0, 1)).to(device),
        bias=F.pad(rows.bound, (0, 1)).to(device),
        multiply=F.linear,
        transpose=lambda coefficients, weight, shape: coefficients @ weight,
        uses=len(rows.bound) + 1,
        patches=1,
        arithmetic=REALS,  # constraints are on the outputs as they are
    )
    network = SoundNetwork((*sound.rules, head), sound.arithmetic)
    return sound_upper(network, from_ends(*ends), _labels(rows, ends), options)[:, :-1]


def _labels(rows: Rows, ends: Ends) -> Tensor:
    """The last output as the label of each box, (B,)."""
    return torch.full((len(ends.lower),), len(rows.bound), device=ends.lower.device)
