"""Counterexamples to properties: found by PGD, counted only after onnxruntime confirms them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.attacks.pgd import Attack, constant_steps, decaying_steps, pgd
from ibpcore.bounds.crown import trace_crown
from ibpcore.bounds.interval import Interval, between
from ibpcore.bounds.linear import to_input
from ibpcore.bounds.network import FoldedNetwork, detached
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.properties import Case
from ibpcore.certification.refutation import Group, grouped, headed
from ibpcore.interop.execution import Execution
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, weight_like

CASES_AT_ONCE = 64
"""Small enough to stay in a CPU's cache."""
STEPS, SCATTERING_STEPS, FIRST_STEP = 50, 10, 0.5
"""Steps of PGD from each start and before it, the first ones of so many half widths of the box."""
NEAR = 1e-4
"""Points that miss by so much are tried, too: onnxruntime adds in another order."""


class Counterexample(NamedTuple):
    """An input of a property's box whose outputs satisfy all constraints of a case.

    Attributes:
        inputs: (inputs,) float32 numbers.
        outputs: (outputs,), as onnxruntime computes them from these.
    """

    inputs: list[float]
    outputs: list[float]

    def text(self) -> str:
        """The form of VNN-COMP; decimals are exact."""
        pairs = [(f"X_{i}", x) for i, x in enumerate(self.inputs)]
        pairs += [(f"Y_{j}", y) for j, y in enumerate(self.outputs)]
        lines = "\n".join(f"({name} {Decimal(number):f})" for name, number in pairs)
        return f"({lines})\n"


class Search(NamedTuple):
    """What a search needs besides the cases.

    Attributes:
        model: in evaluation mode.
        execute: runs the original file, in float32.
        generator: of the random starts, on the device of the model.
        deadline: of `time.monotonic`, after which no further start begins.
    """

    model: Classifier
    execute: Execution
    generator: torch.Generator
    deadline: float


@torch.no_grad()
def counterexample(search: Search, cases: Sequence[Case], starts: int) -> Counterexample | None:
    """Looks for an input that satisfies one of `cases`; None if none is found in time.

    Each case is attacked for itself, by PGD on the constraint that is violated most. Inputs are
    float32 numbers in the exact box, and the constraints hold exactly for the outputs of
    onnxruntime: there is no tolerance.

    Args:
        starts: the number of random ones for each case.

    Raises:
        UserError: onnxruntime cannot run the network.
    """
    return _first(search, cases, [_at_corners, *[_from_scattered] * starts])


@torch.no_grad()
def counterexample_by_lines(search: Search, cases: Sequence[Case]) -> Counterexample | None:
    """`counterexample` from those corners of the boxes in which CROWN's bounds are attained.

    They lead out of plateaus, where the gradient of the network says nothing.
    """
    return _first(search, cases, [_from_lines])


class _Target(NamedTuple):
    """A group of cases, and the network whose outputs are their constraints.

    Attributes:
        box: (C, *in_shape), the float32 numbers in the box of each case.
        generator: of the search.
    """

    network: FoldedNetwork
    group: Group
    box: Interval
    generator: torch.Generator

    @property
    def lanes(self) -> Tensor:
        """(C,), each case by its number: what `pgd` calls labels."""
        return torch.arange(len(self.group.owners), device=self.group.owners.device)

    def least(self, outputs: Tensor, lanes: Tensor) -> Tensor:
        """The value of the constraint that is violated most, by case; at least 0 is a success."""
        member = F.pad(self.group.rows.member, (0, 1))[lanes]
        return torch.where(member, outputs, torch.inf).amin(1)

    def attacked(self, start: Tensor) -> Attack:
        """The best points of PGD from a start (C, *in_shape)."""
        sizes = decaying_steps(STEPS, FIRST_STEP)
        return pgd(self.network, self.box, self.lanes, sizes, objective=self.least, start=start)


Attempt = Callable[[_Target], Iterator[Attack]]


def _first(
    search: Search, cases: Sequence[Case], attempts: Sequence[Attempt]
) -> Counterexample | None:
    """The first success of `attempts` on groups of the cases."""
    # A box may be so thin that no float32 number lies in it.
    cases = [case for case in cases if bool((case.box.inner.lower <= case.box.inner.upper).all())]
    groups = [cases[i : i + CASES_AT_ONCE] for i in range(0, len(cases), CASES_AT_ONCE)]
    targets = [(group, _target(search, group)) for group in groups]
    for attempt in attempts:
        for group, target in targets:
            if time.monotonic() > search.deadline:
                return None
            for points in attempt(target):
                found = _confirmed(search, group, points)
                if found is not None:
                    return found
    return None


def _target(search: Search, cases: Sequence[Case]) -> _Target:
    model, group = search.model, grouped(search.model, cases)
    inner = zip(*(case.box.inner for case in cases), strict=True)
    like = weight_like(model)
    ends = (torch.stack(end).view(-1, *model.in_shape).to(like) for end in inner)
    network = detached(fold(headed(model, group.rows)))
    return _Target(network, group, between(*ends), search.generator)


def _at_corners(target: _Target) -> Iterator[Attack]:
    for corner in (target.box.lower, target.box.upper):
        yield Attack(corner, target.least(target.network(corner), target.lanes))


def _from_scattered(target: _Target) -> Iterator[Attack]:
    """From where PGD in a random direction of the outputs leads (Tashiro et al. 2020)."""
    outputs = len(target.group.rows.bound) + 1
    like, how = target.box.mid, target.generator
    weights = torch.randn(len(like), outputs, generator=how, dtype=like.dtype, device=like.device)

    def along(outputs: Tensor, lanes: Tensor) -> Tensor:
        return (outputs * weights[lanes]).sum(1)

    sizes = constant_steps(SCATTERING_STEPS, FIRST_STEP)
    start = pgd(target.network, target.box, target.lanes, sizes, objective=along, generator=how)
    yield target.attacked(start.images)


def _from_lines(target: _Target) -> Iterator[Attack]:
    """From where the sum of CROWN's lines above the constraints is largest, by case."""
    labels = torch.full_like(target.lanes, len(target.group.rows.bound))
    traced = trace_crown(target.network, target.box, labels, BoundOptions())
    rows = to_input(traced.visits, traced.differences(), {}).rows
    member = F.pad(target.group.rows.member, (0, 1)).to(rows)
    slope = torch.einsum("cr,cr...->c...", member, rows)
    yield target.attacked(target.box.mid + slope.sign() * target.box.rad)


def _confirmed(search: Search, cases: Sequence[Case], points: Attack) -> Counterexample | None:
    """The first of the points, (C, *in_shape), that onnxruntime confirms, the best one first."""
    lower, upper = (torch.stack(end) for end in zip(*(c.box.inner for c in cases), strict=True))
    inputs = points.images.flatten(1).float().cpu().clamp(lower, upper)
    for lane in points.values.argsort(descending=True).tolist():
        if not points.values[lane] >= -NEAR:
            return None
        outputs = search.execute(inputs[lane])
        if cases[lane].holds(inputs[lane].tolist(), outputs):
            return Counterexample(inputs[lane].tolist(), outputs)
    return None
