"""What is measured of one network: certificates of every bound, their proofs, their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, lirpa
from ibpcore import certified_margins
from ibpcore.attacks.pgd import decaying_steps, pgd
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import sound_network
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier
from ibpcore.precision import full_precision

THEIRS = "auto_LiRPA CROWN"
CLAIM = "real"
STEPS, RESTARTS, STEP_SIZE = 100, 5, 0.5
"""Of PGD, with steps that decay from that share of the radius."""
SUMMED = ("images", "correct", "robust", "certified", "proved", "median_ms", "proof_ms")


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


def unchecked(subject: Subject) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute the margins (B,) of `subject`, by bound; auto_LiRPA's if it is there.

    Ours start from the model, as for a user: folding is part of their time.
    """
    images, labels, radii = subject.images, subject.labels, subject.radii
    ours = partial(certified_margins, subject.model, images, labels, radii)
    runs: dict[str, Callable[[], Tensor]] = {name: partial(ours, bound=name) for name in BOUNDS}
    if lirpa.available():
        theirs = lirpa.LirpaCrown(subject.model, images)
        runs[THEIRS] = partial(theirs.margins, images, labels, radii)
    return runs


def proofs(subject: Subject) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute margins (B,) with all rounding errors, by bound."""
    network = sound_network(subject.model, CLAIM)
    proof = partial(sound_margins, network, subject.images, subject.labels, subject.radii)
    return {name: partial(proof, BoundOptions(name)) for name in BOUNDS}


def excess(ours: Tensor, theirs: Tensor) -> float:
    """The largest ours - theirs, relative to theirs where that is above 1; 0 for no image."""
    if len(ours) == 0:
        return 0.0
    return float(((ours - theirs) / theirs.abs().clamp(min=1)).max())


def measure(subject: Subject, repeats: int) -> list[harness.Row]:
    """One row for each bound, and one for auto_LiRPA's CROWN if it can be imported.

    Columns besides those of `harness.rows`: `certified`, of the images that PGD does not break;
    `excess` over auto_LiRPA's margins, see `excess`; `proved`, the images certified for the claim
    `CLAIM`; `proof_ms`, the median time of these proofs; `proof_ratio`, relative to `median_ms`.
    """
    plain, proved = unchecked(subject), proofs(subject)
    device = subject.images.device
    with torch.no_grad(), full_precision():
        margins = {name: run() for name, run in plain.items()}
        certain = {name: run() for name, run in proved.items()}
        times = harness.milliseconds(plain, repeats, device)
        proof_times = harness.milliseconds(proved, repeats, device)
    table = harness.rows(times, THEIRS if THEIRS in plain else "ibp", **_facts(subject))
    for row in table:
        name = row["contender"]
        row["certified"] = _certified(margins[name])
        if name in BOUNDS:
            row["proved"] = _certified(certain[name])
            row["proof_ms"] = median(proof_times[name])
            row["proof_ratio"] = row["proof_ms"] / row["median_ms"]
        if name in BOUNDS and THEIRS in margins:
            row["excess"] = excess(margins[name], margins[THEIRS])
    return table


def _facts(subject: Subject) -> dict[str, Any]:
    return {
        "network": subject.name,
        "epsilon": subject.epsilon,
        "images": subject.tested,
        "correct": subject.correct,
        "robust": len(subject.images),
    }


def _certified(margins: Tensor) -> int:
    return int((margins < 0).sum())


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
    if "proof_ms" in total:
        total["proof_ratio"] = total["proof_ms"] / total["median_ms"]
    if "excess" in table[0]:
        total["excess"] = max(row["excess"] for row in table)
    return total
