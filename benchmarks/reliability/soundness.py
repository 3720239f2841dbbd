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

from benchmarks.reliability import exact
from benchmarks.reliability.rows import Row
from ibpcore import certified_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.nn import (
    IntervalAbs,
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalFlatten,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalIndexSelect,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaximum,
    IntervalMaxPool2d,
    IntervalMinimum,
    IntervalNormalize,
    IntervalPermute,
    IntervalPReLU,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSlice,
    IntervalSoftsign,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.layers import IntervalLayer

NETWORKS, LARGE = 4000, 100
SIDE, LABEL = 4, 0


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
        model = network(generator).eval()
        image = torch.rand(1, 2, SIDE, SIDE, generator=generator)
        image = torch.where(
            torch.rand(image.shape, generator=generator) < 0.2, image.round(), image
        )
        epsilon = float(torch.tensor(index % 4 / 255))
        yield Case(balanced(model, image, epsilon, index % 3 - 1), image, epsilon)


def network(generator: torch.Generator) -> IntervalSequential:
    """A few random layers that keep (2, 4, 4), then linear ones to two classes."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def layer() -> IntervalLayer:
        kinds: list[IntervalLayer] = [
            IntervalConv2d(2, 2, 3, padding=1),
            IntervalConv2d(2, 2, (1, 3), padding=(0, 1), groups=2, bias=False),
            IntervalConv2d(2, 2, 3, padding=2, dilation=2),
            IntervalBatchNorm(2),
            IntervalNormalize([0.25, 0.5], [0.3, 0.7]),
            IntervalReLU(),
            IntervalLeakyReLU(0.1),
            _prelu(generator),
            IntervalHardtanh(-0.1, 0.7),
            IntervalSequential(IntervalMaximum(2, [-0.3, 0.1]), IntervalMinimum(2, 2.5)),
            IntervalAbs(),
            IntervalHardsigmoid(),
            IntervalHardswish(),
            IntervalSoftsign(),
            IntervalResidual(IntervalSequential(IntervalConv2d(2, 2, 1), IntervalReLU())),
            IntervalConcat(
                [
                    IntervalSequential(IntervalConv2d(2, 1, 3, padding=1), IntervalReLU()),
                    IntervalSequential(IntervalPermute((0, 1, 3, 2)), IntervalConv2d(2, 1, 1)),
                ]
            ),
            IntervalSequential(
                IntervalConcat([IntervalSequential()] * 3), IntervalConv2d(6, 2, 1, bias=False)
            ),
            IntervalSequential(
                IntervalScale(2, [0.5, -2.0], [0.1, 0.2]),
                IntervalZeroPad((0, 1, 1, 0)),
                IntervalSlice([[0, 2, 1], [0, 4, 1], [1, 5, 1]]),
            ),
            IntervalSequential(IntervalAvgPool2d(2), IntervalUpsample((2, 2))),
            IntervalSequential(
                IntervalFlatten(2),
                IntervalConv1d(2, 2, 3, padding=2, dilation=2, bias=False),
                IntervalReshape((2, SIDE, SIDE)),
            ),
            IntervalConvTranspose2d(2, 2, 3, padding=1),
            IntervalSequential(
                IntervalAvgPool2d(2), IntervalConvTranspose2d(2, 2, 2, stride=2, groups=2)
            ),
            IntervalMatMul(SIDE, SIDE),
            IntervalIndexSelect([3, 1, 1, 0], 2),
            IntervalProduct(IntervalConv2d(2, 2, 1), IntervalSequential(IntervalReLU())),
            IntervalReshape((2, SIDE, SIDE)),
        ]
        return kinds[pick(len(kinds))]

    pool = (IntervalMaxPool2d(2, stride=2), IntervalAvgPool2d(2, stride=2))[pick(2)]
    body = [layer() for _ in range(pick(5) + 1)]
    hidden = [IntervalLinear(8, 5), IntervalReLU()] if pick(2) else [IntervalLinear(8, 5)]
    model = IntervalSequential(*body, pool, IntervalFlatten(), *hidden, IntervalLinear(5, 2))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("mean", "std", "constant")):
            _scatter(tensor, generator)
            if name.endswith("var"):
                tensor.abs_().clamp_(2.0**-20, 2.0**20)
    return model


def _prelu(generator: torch.Generator) -> IntervalPReLU:
    layer = IntervalPReLU(2)
    layer.weight.data.normal_(generator=generator)
    return layer


@torch.no_grad()
def _scatter(tensor: Tensor, generator: torch.Generator) -> None:
    """Fills a tensor with numbers of very different size, in pairs that almost cancel."""
    size = tensor.numel()
    spread = torch.randint(-12, 13, (size,), generator=generator)
    values = torch.randn(size, generator=generator) * 2.0**spread
    pairs = torch.randperm(size, generator=generator)[: size // 2 * 2].view(2, -1)
    close = 1 + 2.0**-20 * torch.randn(pairs.shape[1], generator=generator)
    cancel = torch.rand(pairs.shape[1], generator=generator) < 0.5
    values[pairs[1]] = torch.where(cancel, -values[pairs[0]] * close, values[pairs[1]])
    tensor.copy_(values.view_as(tensor))


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
