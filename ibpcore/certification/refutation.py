"""Which cases of a property no input satisfies, by the bounds of the registry and their proofs.

A linear layer behind the network computes bound - weight y for every constraint, and a last
output that is 0. That one is the label: the bounds on f_i - f_y are then those on the constraints,
and where one is negative, its constraint is violated everywhere on the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds import alpha_crown
from ibpcore.bounds.interval import between
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import bound_named
from ibpcore.certification.properties import Case, Ends, Rows, as_type, rows_of
from ibpcore.certification.soundness.arithmetic import REALS, from_ends
from ibpcore.certification.soundness.margins import sound_upper
from ibpcore.certification.soundness.network import SoundNetwork, matrix_rule
from ibpcore.errors import UserError
from ibpcore.nn.affine import IntervalLinear
from ibpcore.nn.composition import IntervalSequential
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, weight_like

CASES_AT_ONCE = 32
NEAR = 1e-4
"""Bounds of the arithmetic of the model that miss by so much may be proved in float64; searches
for slopes go on until they have as much to spare."""


class Group(NamedTuple):
    """Some cases as tensors on the device of the model.

    Attributes:
        rows: the R constraints of C cases.
        ends: (B, *in_shape), float64, of the distinct boxes around them.
        owners: (C,), the box of each case.
    """

    rows: Rows
    ends: Ends
    owners: Tensor

    @property
    def labels(self) -> Tensor:
        """The last output as the label of each box, (B,)."""
        return torch.full_like(self.ends.lower.flatten(1)[:, 0], len(self.rows.bound)).long()

    def least(self, upper: Tensor) -> Tensor:
        """For each case, (C,), the smallest of the bounds (B, R + 1) on its constraints."""
        member = F.pad(self.rows.member, (0, 1))
        return torch.where(member, upper[self.owners], torch.inf).amin(1)

    def worst(self, upper: Tensor) -> Tensor:
        """For each box, (B,), the largest of `least` over its cases."""
        start = upper.new_full((len(upper),), -torch.inf)
        return start.scatter_reduce(0, self.owners, self.least(upper), "amax")


def grouped(model: Classifier, cases: Sequence[Case]) -> Group:
    """`cases`, at least one, as a group for this model.

    Raises:
        UserError: a number is beyond the range of float64.
    """
    device = weight_like(model).device
    rows, boxes = rows_of(cases, model.classes), [*dict.fromkeys(case.box for case in cases)]
    rows = rows._replace(weight=rows.weight.to(device), bound=rows.bound.to(device))
    rows = rows._replace(member=rows.member.to(device))
    outer = zip(*(box.outer for box in boxes), strict=True)
    ends = Ends(*(torch.stack(end).view(-1, *model.in_shape).to(device) for end in outer))
    owners = torch.tensor([boxes.index(case.box) for case in cases], device=device)
    return Group(rows, ends, owners)


def headed(model: Classifier, rows: Rows) -> IntervalSequential:
    """The network with the constraints as outputs, (B, R + 1); the last one is 0."""
    like = weight_like(model)
    layer = IntervalLinear(model.classes, len(rows.bound) + 1).to(like).requires_grad_(False)
    layer.weight.copy_(F.pad(-rows.weight, (0, 0, 0, 1)))
    layer.bias.copy_(F.pad(as_type(rows.bound, like.dtype, inf), (0, 1)))
    return IntervalSequential(model, layer).eval()


@torch.no_grad()
def refuted(
    model: Classifier,
    sound: SoundNetwork | None,
    cases: Sequence[Case],
    options: BoundOptions,
    deadline: float | None = None,
) -> list[bool]:
    """For each case whether it is refuted: a constraint of it is violated everywhere on its box.

    Args:
        model: in evaluation mode.
        sound: of the model for a claim, which is then proved; None if nothing is to be proved.
        options: the bound.
        deadline: of `time.monotonic`, after which no further step of a search for slopes begins.

    Raises:
        UserError: a layer has no rule, or no proof covers a constraint.
    """
    found: list[bool] = []
    for first in range(0, len(cases), CASES_AT_ONCE):
        group = grouped(model, cases[first : first + CASES_AT_ONCE])
        upper, slopes = _computed(model, group, options, deadline)
        least = group.least(upper)
        if sound is not None and bool((least < NEAR).any()):
            least = group.least(_proved(sound, group, options, slopes))
        found += (least < 0).tolist()
    return found


def _computed(
    model: Classifier, group: Group, options: BoundOptions, deadline: float | None
) -> tuple[Tensor, alpha_crown.Slopes]:
    """Bounds (B, R + 1) in the arithmetic of the model, and the slopes that gave them."""
    dtype, ends = weight_like(model).dtype, group.ends
    box = between(as_type(ends.lower, dtype, -inf), as_type(ends.upper, dtype, inf))
    network = fold(headed(model, group.rows))
    bound = bound_named(options.bound)
    if bound.box_logits is not alpha_crown.box_logits:
        return bound.box_logits(network, box, group.labels, options), {}

    def goal(upper: Tensor) -> Tensor:
        return group.worst(upper) + NEAR

    found = alpha_crown.optimised(network, box, group.labels, options, goal, deadline)
    return found.logits(), alpha_crown.slopes(found)


def _proved(
    sound: SoundNetwork, group: Group, options: BoundOptions, slopes: alpha_crown.Slopes
) -> Tensor:
    """Bounds (B, R + 1) that include all rounding errors; infinite where one is not finite."""
    rows = group.rows
    if not rows.exact:
        raise UserError(
            "no proof covers the coefficients of a constraint, which have too many digits for"
            " float64: --claim unchecked needs no proof"
        )
    weight, bias = F.pad(-rows.weight, (0, 0, 0, 1)), F.pad(rows.bound, (0, 1))
    head = matrix_rule(weight, bias, REALS)  # constraints are on the outputs as they are
    network = replace(sound, rules=(*sound.rules, head))
    return sound_upper(network, from_ends(*group.ends), group.labels, options, slopes)
