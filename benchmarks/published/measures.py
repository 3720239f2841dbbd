"""What is measured of one network: certificates of every bound, their proofs, their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, lirpa
from ibpcore import certified_margins, verified_radii
from ibpcore.attacks.pgd import decaying_steps, pgd
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.radii import Radii, RadiusStatus
from ibpcore.certification.soundness.network import sound_network
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier
from ibpcore.precision import full_precision

THEIRS = "auto_LiRPA CROWN"
CLAIM = "real"
STEPS, RESTARTS, STEP_SIZE = 100, 5, 0.5
"""Of PGD, with steps that decay from that share of the radius."""
SUMMED = (
    *("images", "correct", "robust", "certified", "proved"),
    *("median_ms", "bound_ms", "proof_ms"),
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and the images that it is measured on.

    Attributes:
        name: of the network.
        model: in evaluation mode.
        epsilon: radius, in pixel units.
        tested: number of images tested.
        correct: number of these that are classified correctly.
        images: (B, C, H, W), the correct ones that PGD does not break.
        labels: (B,).
    """

    name: str
    model: Classifier
    epsilon: float
    tested: int
    correct: int
    images: Tensor
    labels: Tensor

    @property
    def radii(self) -> Tensor:
        """(B,)."""
        return self.images.new_full((len(self.images),), self.epsilon)


def subject(
    name: str, model: Classifier, images: Tensor, labels: Tensor, epsilon: float
) -> Subject:
    """The network `name`, with those of the images (B, C, H, W) that PGD cannot break."""
    with torch.no_grad():
        correct = model(images).argmax(1) == labels
    some, classes = images[correct], labels[correct]
    box = Interval.ball(some, some.new_full((len(some),), epsilon))
    generator = torch.Generator(images.device).manual_seed(0)
    steps = decaying_steps(STEPS, STEP_SIZE)
    attack = pgd(fold(model), box, classes, steps, restarts=RESTARTS, generator=generator)
    left = attack.values < 0
    tested, right = len(images), len(some)
    return Subject(name, model, epsilon, tested, right, some[left], classes[left])


def unchecked(subject: Subject, bound: str) -> Tensor:
    """Margins (B,) by a bound, from the model as a user has it: folding takes part of the time."""
    images, labels = subject.images, subject.labels
    return certified_margins(subject.model, images, labels, subject.radii, bound=bound)


def contenders(subject: Subject) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute margins (B,): by each bound, and auto_LiRPA's if it is there."""
    runs: dict[str, Callable[[], Tensor]] = {
        name: partial(unchecked, subject, name) for name in BOUNDS
    }
    if lirpa.available():
        theirs = lirpa.LirpaCrown(subject.model, subject.images)
        runs[THEIRS] = partial(theirs.margins, subject.images, subject.labels, subject.radii)
    return runs


def proof(subject: Subject, bound: str) -> Callable[[], Tensor]:
    """A function that tells of images (B,) that `bound` certifies which ones are proved."""
    network = sound_network(subject.model, CLAIM)
    images, labels, radius = subject.images, subject.labels, subject.radii
    whole = torch.full_like(labels, int(RadiusStatus.EPSILON_MAX))
    rung = torch.full_like(labels, [*BOUNDS].index(bound))
    found = Radii(radius, radius, radius, whole, torch.ones_like(labels), rung)

    def prove() -> Tensor:
        return verified_radii(network, images, labels, found, bound=bound).radius >= radius

    return prove


def excess(ours: Tensor, theirs: Tensor) -> float:
    """The largest ours - theirs, relative to theirs where that is above 1; 0 for no image."""
    if len(ours) == 0:
        return 0.0
    return float(((ours - theirs) / theirs.abs().clamp(min=1)).max())


def measure(subject: Subject, repeats: int) -> list[harness.Row]:
    """One row for each bound, and one for auto_LiRPA's CROWN if it can be imported.

    Columns besides those of `harness.rows`: `certified`, of the images that PGD does not break;
    `excess` over auto_LiRPA's margins, see `excess`; and those of `of_proofs`.
    """
    runs, device = contenders(subject), subject.images.device
    with torch.no_grad(), full_precision():
        margins = {name: run() for name, run in runs.items()}
        times = harness.milliseconds(runs, repeats, device)
        proofs = {name: of_proofs(subject, name, margins[name] < 0, repeats) for name in BOUNDS}
    table = harness.rows(times, THEIRS if THEIRS in runs else "ibp", **_facts(subject))
    for row in table:
        name = row["contender"]
        row["certified"] = int((margins[name] < 0).sum())
        row |= proofs.get(name, {})
        if name in BOUNDS and THEIRS in margins:
            row["excess"] = excess(margins[name], margins[THEIRS])
    return table


def of_proofs(subject: Subject, bound: str, certified: Tensor, repeats: int) -> dict[str, Any]:
    """`proved`, the images certified for the claim `CLAIM`; and the cost of that.

    `bound_ms` and `proof_ms` are the median times of the unchecked bound and of its proofs, both of
    the images that the bound certifies, (B,) bool; `proof_ratio` is their ratio.
    """
    if not certified.any():
        return {"proved": 0, "bound_ms": 0.0, "proof_ms": 0.0}
    some = replace(subject, images=subject.images[certified], labels=subject.labels[certified])
    runs: dict[str, Callable[[], Tensor]] = {
        "bound_ms": partial(unchecked, some, bound),
        "proof_ms": proof(some, bound),
    }
    proved = int(runs["proof_ms"]().sum())
    times = harness.milliseconds(runs, repeats, subject.images.device)
    medians = {name: median(values) for name, values in times.items()}
    ratio = medians["proof_ms"] / medians["bound_ms"]
    return {"proved": proved, **medians, "proof_ratio": ratio}


def _facts(subject: Subject) -> dict[str, Any]:
    return {
        "network": subject.name,
        "epsilon": subject.epsilon,
        "images": subject.tested,
        "correct": subject.correct,
        "robust": len(subject.images),
    }


def totals(table: Sequence[harness.Row]) -> list[harness.Row]:
    """One row for each contender over all networks: sums, ratios of sums, the largest excess."""
    contenders = dict.fromkeys(row["contender"] for row in table)
    sums = {name: _total([r for r in table if r["contender"] == name]) for name in contenders}
    reference = sums[THEIRS if THEIRS in sums else "ibp"]["median_ms"]
    for name, row in sums.items():
        row |= {"contender": name, "network": "all", "ratio": row["median_ms"] / reference}
    return list(sums.values())


def _total(table: Sequence[harness.Row]) -> harness.Row:
    total: harness.Row = {
        column: sum(row[column] for row in table) for column in SUMMED if column in table[0]
    }
    if total.get("bound_ms"):
        total["proof_ratio"] = total["proof_ms"] / total["bound_ms"]
    if "excess" in table[0]:
        total["excess"] = max(row["excess"] for row in table)
    return total
