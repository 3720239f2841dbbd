"""Counterexamples to properties: found by PGD, counted only after onnxruntime confirms them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.attacks.pgd import Attack, decaying_steps, pgd
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import detached
from ibpcore.certification.properties import Case
from ibpcore.certification.refutation import grouped, headed
from ibpcore.interop.execution import Execution
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, weight_like

CASES_AT_ONCE = 64
"""Small enough to stay in a CPU's cache."""
STEPS, FIRST_STEP = 50, 0.5
"""Steps of PGD from each start, the first ones of so many half widths of the box."""
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

    Each case is attacked for itself, from its corners, its centre and random `starts`, by PGD on
    the constraint that is violated most. Inputs are float32 numbers in the exact box, and the
    constraints hold exactly for the outputs of onnxruntime: there is no tolerance.

    Raises:
        UserError: onnxruntime cannot run the network.
    """
    # A box may be so thin that no float32 number lies in it.
    cases = [case for case in cases if bool((case.box.inner.lower <= case.box.inner.upper).all())]
    groups = [cases[i : i + CASES_AT_ONCE] for i in range(0, len(cases), CASES_AT_ONCE)]
    for start in range(starts):
        for group in groups:
            if time.monotonic() > search.deadline:
                return None
            found = _attacked(search, group, corners=start == 0)
            if found is not None:
                return found
    return None


def _attacked(search: Search, cases: Sequence[Case], corners: bool) -> Counterexample | None:
    model, like = search.model, weight_like(search.model)
    group, lanes = grouped(model, cases), torch.arange(len(cases), device=like.device)
    network, member = detached(fold(headed(model, group.rows))), F.pad(group.rows.member, (0, 1))
    inner = zip(*(case.box.inner for case in cases), strict=True)
    lower, upper = (torch.stack(end).view(-1, *model.in_shape).to(like) for end in inner)

    def least(outputs: Tensor, some: Tensor) -> Tensor:
        """The value of the constraint that is violated most, by case; at least 0 is a success."""
        return torch.where(member[some], outputs, torch.inf).amin(1)

    def confirmed(found: Attack) -> Counterexample | None:
        images = found.images.clamp(lower, upper).flatten(1).float().cpu()
        for lane in found.values.argsort(descending=True).tolist():
            if not found.values[lane] >= -NEAR:
                return None
            outputs = search.execute(images[lane])
            if cases[lane].holds(images[lane].tolist(), outputs):
                return Counterexample(images[lane].tolist(), outputs)
        return None

    for corner in (lower, upper) if corners else ():
        success = confirmed(Attack(corner, least(network(corner), lanes)))
        if success is not None:
            return success
    box, sizes = Interval.from_bounds(lower, upper), decaying_steps(STEPS, FIRST_STEP)
    return confirmed(pgd(network, box, lanes, sizes, objective=least, generator=search.generator))
