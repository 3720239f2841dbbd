"""Proofs by linear bounds throughout: inner intervals, given slopes, and their rounding errors."""

from __future__ import annotations

import pytest
import torch
from dense_crown import Dense

from benchmarks.reliability import networks
from ibpcore import Interval
from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import Proof
from ibpcore.certification.soundness.arithmetic import FLOAT32
from ibpcore.certification.soundness.margins import upper_by
from ibpcore.certification.soundness.network import sound_network
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalFlatten,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaximum,
    IntervalMaxPool2d,
    IntervalPReLU,
    IntervalProduct,
    IntervalReLU,
    IntervalResidual,
    IntervalSequential,
    IntervalSoftsign,
)

CLASSES = 3
BY_ENDS = {IntervalMaxPool2d, IntervalSoftsign, IntervalHardsigmoid, IntervalHardswish}
"""Layers of which proofs know the ends only."""
CURVED = (IntervalReLU, IntervalLeakyReLU, IntervalPReLU, IntervalHardtanh, IntervalMaximum)
MIXING = (IntervalConv2d, IntervalLinear, IntervalMatMul, IntervalConvTranspose2d)
MIXING += (IntervalResidual, IntervalConcat, IntervalProduct)


def upper(network, box, labels, proof=Proof.LINEAR_THROUGHOUT, slopes=None, **options):
    with torch.no_grad():
        return upper_by(proof, network, box, labels, BoundOptions(**options), slopes)


def random_box(generator, samples: int = 1) -> Interval:
    """Boxes of different widths in [0, 1]."""
    images = torch.cat([networks.image(generator) for _ in range(samples)]).double()
    width = torch.logspace(-2, -0.5, samples).view(-1, 1, 1, 1)
    return Interval.from_bounds((images - width).clamp(0, 1), (images + width).clamp(0, 1))


def as_stored(model: IntervalSequential) -> IntervalSequential:
    """The model in float64, with the numbers of Python as float32 has them."""
    for part in model.modules():
        if isinstance(part, IntervalBatchNorm):
            part.eps = FLOAT32.stored(part.eps)
        if isinstance(part, IntervalLeakyReLU):
            part.negative_slope = FLOAT32.stored(part.negative_slope)
        if isinstance(part, IntervalHardtanh):
            part.min_val, part.max_val = map(FLOAT32.stored, (part.min_val, part.max_val))
    return model.double()


def numbered(seed: int):
    """A random network, every other one deeper, and boxes of four images."""
    generator = torch.Generator().manual_seed(seed)
    model = deep(generator) if seed % 2 else networks.network(generator, CLASSES, without=BY_ENDS)
    return model, random_box(generator, 4), torch.arange(4) % CLASSES


@torch.no_grad()
def deep(generator) -> IntervalSequential:
    """Random blocks with random activations between them, and moderate weights."""
    pick = networks.picker(generator)

    def one_of(kinds):
        makers = networks.BLOCKS[kinds[pick(len(kinds))]]
        return makers[pick(len(makers))](lambda: deep_body(1))

    def deep_body(blocks: int) -> IntervalSequential:
        return IntervalSequential(
            *(one_of(kinds) for _ in range(blocks) for kinds in (MIXING, CURVED))
        )

    model = IntervalSequential(
        *deep_body(3), IntervalFlatten(), IntervalLinear(32, 6), IntervalReLU()
    )
    model.append(IntervalLinear(6, CLASSES))
    for parameter in model.parameters():
        parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


def denses(model, box, labels, slopes=None):
    """The oracle's bounds, (B, classes), and the ends that it found for the first sample."""
    found = []
    for i, label in enumerate(labels.tolist()):
        own = {} if slopes is None else slopes
        own = {place: {n: slope[i] for n, slope in some.items()} for place, some in own.items()}
        dense = Dense((box.lower[i], box.upper[i]), box.shape[1:], own)
        found.append((dense.differences(model, label).detach(), dense.narrowed))
    return torch.stack([bounds for bounds, _ in found]), found[0][1]


def check_against_dense(model, box, labels, given: bool) -> None:
    """Bounds with the slopes of the rules, or with random ones."""
    network = sound_network(model, "real")
    model = as_stored(model)
    slopes = random_slopes(denses(model, box, labels)[1]) if given else None
    proved = upper(network, box, labels, slopes=slopes)
    expected, _ = denses(model, box, labels, slopes)
    scale = expected.abs().amax(1, keepdim=True)
    others = torch.arange(CLASSES) != labels[:, None]
    assert (proved >= expected - 1e-12 * scale)[others].all()
    assert (proved <= expected + 1e-6 * scale)[others].all()


def random_slopes(inner) -> dict[int, dict[int, torch.Tensor]]:
    """Slopes in [0, 1] for the rows of every place, of all activations but one."""
    generator = torch.Generator().manual_seed(len(inner))
    shapes = {number: low.shape for number, (low, _) in enumerate(inner)}
    slopes = {
        place: {
            number: torch.rand(4, rows, *shape, generator=generator)
            for number, shape in shapes.items()
            if number != place - 1
        }
        for place, rows in {MARGINS: CLASSES, **dict.fromkeys(shapes, 1)}.items()
    }
    slopes[MARGINS].pop(0, None)
    return slopes


@pytest.mark.parametrize("given", [False, True], ids=["own slopes", "given slopes"])
@pytest.mark.parametrize("seed", range(40))
def test_bounds_of_random_networks_are_those_of_dense_matrices(seed, given):
    check_against_dense(*numbered(seed), given)


def test_narrower_intervals_make_closer_bounds():
    closer = 0
    for seed in range(24):
        model, box, labels = numbered(seed)
        network = sound_network(model, "real")
        loose, close = (
            upper(network, box, labels, p) for p in (Proof.LINEAR, Proof.LINEAR_THROUGHOUT)
        )
        scale = loose.abs().amax(1, keepdim=True)
        closer += bool((close < loose - 1e-3 * scale).any())
    assert closer >= 6
