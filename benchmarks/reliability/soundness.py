"""Proofs of networks that mislead float32 bounds, compared with rational arithmetic.

Claim: no proof certifies more than the exact margin does. At scale 1 there are 4,000 random
networks of all layers, whose exact margin is almost 0, and 100 layers of 32,768 inputs, which
misclassify by less than float32 rounding; on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.reliability import exact, networks
from benchmarks.reliability.networks import LABEL
from benchmarks.reliability.rows import Row
from ibpcore import certified_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.nn import IntervalLinear, IntervalSequential

NETWORKS, LARGE = 4000, 100


class Case(NamedTuple):
    """A network, an image (1, C, H, W) and a radius at which the margin is close to 0."""

    model: IntervalSequential
    image: Tensor
    epsilon: float


class Verdict(NamedTuple):
    """Margins of a case: exact, as computed in float32, and those of both proofs."""

    exact: Fraction
    unchecked: float
    real: float
    float32: float

    @property
    def fooled(self) -> bool:
        """Float32 bounds certify what exact ones do not."""
        return self.unchecked < 0 <= self.exact

    @property
    def wrong(self) -> bool:
        """A proof gives less than the exact margin, and so proves too much."""
        return Fraction(self.real) < self.exact or self.float32 < self.real


def cases(count: int, seed: int) -> Iterator[Case]:
    """Random networks of all layers, with a last bias that makes the margin almost 0."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        model, image = networks.network(generator), networks.image(generator)
        epsilon = float(torch.tensor(index % 4 / 255))
        yield Case(balanced(model, image, epsilon, index % 3 - 1), image, epsilon)


@torch.no_grad()
def balanced(
    model: IntervalSequential, image: Tensor, epsilon: float, side: int
) -> IntervalSequential:
    """Sets the last bias of the model so that the exact margin at `epsilon` is about 0.

    Args:
        side: 0 for a margin as close to 0 as float32 allows, 1 and -1 for a little above and
            below.
    """
    last = cast(IntervalLinear, model[-1])
    last.bias.zero_()
    margin = exact.margin(model, image[0], LABEL, epsilon)
    closest = torch.tensor(float(margin))
    for _ in range(4):
        closest = torch.nextafter(closest, torch.tensor(-side * torch.inf)) if side else closest
    # f_1 - f_0 grows by b_1 - b_0.
    last.bias[LABEL] = closest
    return model


@torch.no_grad()
def judged(case: Case) -> Verdict:
    """All margins of a case."""
    model, image, epsilon = case
    label = torch.tensor([LABEL])
    radius = torch.tensor([epsilon], dtype=torch.float64)
    proofs = [
        float(sound_margins(sound_network(model, claim), image, label, radius, BoundOptions()))
        for claim in CLAIMS
    ]
    return Verdict(
        exact.margin(model, image[0], LABEL, epsilon),
        float(certified_margins(model, image, label, radius.float())),
        *proofs,
    )


@torch.no_grad()
def large(seed: int, inputs: int = 32768) -> tuple[IntervalLinear, Tensor, Fraction]:
    """A linear layer of realistic size, its input, and its exact margin, a little above 0.

    After Jia and Rinard (arXiv 2003.03021): the rounding of a long float32 sum decides.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = IntervalLinear(inputs, 2)
    layer.weight.copy_(torch.randn(2, inputs, generator=generator))
    image = torch.rand(1, inputs, generator=generator)
    layer.bias.zero_()
    rows = exact.fractions(layer.weight)
    margin = ((rows[1] - rows[0]) * exact.fractions(image[0])).sum()
    bias = torch.nextafter(torch.tensor(float(margin)), torch.tensor(-torch.inf))
    layer.bias[LABEL] = bias
    return layer, image, margin - Fraction(float(bias))


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """A row for the random networks and one for the large layers.

    Args:
        scale: share of the cases.
        seed: of the cases.
        work: not used.
    """
    verdicts = [judged(case) for case in cases(max(1, int(NETWORKS * scale)), seed)]
    fooled = sum(verdict.fooled for verdict in verdicts)
    wrong = sum(verdict.wrong for verdict in verdicts)
    rows = [
        Row(
            "margins of random networks against rational arithmetic",
            len(verdicts),
            wrong,
            f"float32 bounds alone certify wrongly {fooled} times",
        )
    ]
    count, fooled, wrong = max(1, int(LARGE * scale)), 0, 0
    for index in range(count):
        layer, image, margin = large(seed + index)
        label, zero = torch.tensor([LABEL]), torch.zeros(1)
        assert margin >= 0
        model = IntervalSequential(layer)
        fooled += bool(certified_margins(model, image, label, zero, clip=None) < 0)
        proofs = [
            sound_margins(sound_network(model, c), image, label, zero, BoundOptions())
            for c in CLAIMS
        ]
        wrong += sum(bool(proof < 0) for proof in proofs)
    note = f"float32 bounds alone certify wrongly {fooled} times"
    return [*rows, Row("layers of 32,768 inputs, misclassified by a hair", count, wrong, note)]
