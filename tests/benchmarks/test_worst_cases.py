"""Networks whose worst image is known, and the float32 executions that try to break proofs."""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.reliability import exact, execution, networks, worst_cases
from benchmarks.reliability.execution import COMPOSED, EXECUTED, Unit, executed
from benchmarks.reliability.networks import BLOCKS, SHAPE
from benchmarks.reliability.worst_cases import UNITS, cases, exact_radius, judged
from ibpcore import Interval
from ibpcore.certification.soundness import rules
from ibpcore.certification.soundness.arithmetic import gamma
from ibpcore.certification.soundness.network import RULES, sound_network
from ibpcore.certification.soundness.visits import output
from ibpcore.nn import IntervalConv2d, IntervalReLU, IntervalSequential

EVERY = [(kind, number) for kind, makers in BLOCKS.items() for number in range(len(makers))]
BLOCK = pytest.mark.parametrize(
    ("kind", "number"), EVERY, ids=[f"{kind.__name__} {number}" for kind, number in EVERY]
)


def block(kind, number, seed=0):
    """A block as a network, and an image (C, H, W) of float32."""
    generator = torch.Generator().manual_seed(seed)

    def body():
        return IntervalSequential(IntervalConv2d(2, 2, 1), IntervalReLU())

    model = IntervalSequential(BLOCKS[kind][number](body)).eval()
    networks.scatter_parameters(model, generator)
    return model, networks.image(generator)[0]


def test_every_layer_with_a_proof_rule_is_covered():
    """A new rule needs a block, an exact rule (tried below) and its executions."""
    assert set(BLOCKS) == set(RULES)
    assert set(EXECUTED) | COMPOSED == set(RULES)


@BLOCK
def test_a_block_holds_its_layer_and_keeps_the_shape(kind, number):
    model, image = block(kind, number)
    assert kind in {type(module) for module in model.modules()}
    assert model(image[None]).shape == (1, *SHAPE)


@BLOCK
def test_exact_values_are_those_of_the_layer(kind, number):
    model, image = block(kind, number)
    found = exact.logits(model, exact.fractions(image)).astype(np.float64)
    with torch.no_grad():
        expected = model.double()(image.double()[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@BLOCK
@pytest.mark.parametrize("seed", range(3))
def test_executions_of_each_layer_lie_in_its_interval(kind, number, seed):
    """They differ from each other unless nothing is rounded, and the interval is not empty."""
    model, image = block(kind, number, seed)
    point = Interval(mid=image.double()[None], rad=torch.zeros(1, *SHAPE).double())
    y = output(sound_network(model, "float32").rules, point)
    low, high = (exact.fractions(y.mid) + sign * exact.fractions(y.rad) for sign in (-1, 1))
    for unit in UNITS:
        for sign in (-1, 1):
            found = execution.execute(
                model.double(), image.numpy(), lambda y, sign=sign: (sign * y).sum(), unit
            )
            assert found.dtype == np.float32
            assert found.shape == SHAPE
            values = exact.fractions(torch.from_numpy(found))
            assert (low[0] <= values).all()
            assert (values <= high[0]).all()


def test_an_execution_has_its_way():
    """The largest and the smallest result of a sum, in which the order decides."""
    model = IntervalSequential(networks.IntervalLinear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0**-24, 2.0**-24]] * 2))
    logits = executed(model, np.ones(3, dtype=np.float32), 1, 0, Unit(flushes=False))
    assert logits.tolist() == [1.0, 1 + 2.0**-23]


def test_a_flush_to_zero_takes_all_of_a_subnormal_result():
    first, last = networks.IntervalLinear(1, 1), networks.IntervalLinear(1, 2)
    with torch.no_grad():
        for parameter in (*first.parameters(), *last.parameters()):
            parameter.fill_(1.0)
        first.bias.zero_()
        last.bias.zero_()
    networks.rescale(first, 2.0**-130)
    networks.rescale(last, 2.0**110)
    model, image = IntervalSequential(first, last), np.ones(1, dtype=np.float32)
    gradual, flushed = (executed(model, image, 1, 0, Unit(flushes)) for flushes in (False, True))
    assert gradual.tolist() == [2.0**-20] * 2
    assert flushed.tolist() == [0.0] * 2


def nearest(value: Fraction) -> np.float32:
    """The float32 that is nearest to a fraction; of two, the even one."""
    start = np.float32(float(value))
    around = [start, *(np.nextafter(start, np.float32(end)) for end in (-np.inf, np.inf))]
    even = [int(x.view(np.int32)) % 2 for x in around]
    return min(
        zip(around, even, strict=True),
        key=lambda pair: (abs(Fraction(float(pair[0])) - value), pair[1]),
    )[0]


def test_fused_operations_round_once():
    generator = np.random.default_rng(0)
    sizes = 2.0 ** generator.integers(-70, 40, (3, 4000))
    a, b, c = (generator.standard_normal((3, 4000)) * sizes).astype(np.float32)
    # Ties and near ties: 1 + 2^-24 and a little, from a product and a sum.
    a[:3], b[:3], c[:3] = 1 + 2.0**-12, 1 - 2.0**-12, [2.0**-24, 2.0**-60, -(2.0**-60)]
    c[2000:] = -(a * b)[2000:]
    found = Unit(flushes=False).fused(a, b, c)
    for x, y, z, result in zip(a, b, c, found, strict=True):
        exactly = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert result == nearest(exactly)
    flushed = Unit(flushes=True).fused(a, b, c)
    subnormal = abs(found) < 2.0**-126
    assert (subnormal & (found != 0)).any()
    assert (flushed == np.where(subnormal, 0, found)).all()


def test_the_exact_radius_of_a_margin_with_kinks():
    def margin(epsilon):
        return max(Fraction(-1), 3 * epsilon - 2, 7 * epsilon - 3)

    assert exact_radius(margin, Fraction(1)) == Fraction(3, 7)
    assert exact_radius(margin, Fraction(1, 4)) == Fraction(1, 4)
    assert exact_radius(lambda epsilon: epsilon, Fraction(1)) == 0


def test_worst_corners_are_in_the_ball():
    for family, case in cases(8, seed=3):
        for favoured in range(worst_cases.CLASSES):
            corner = exact.fractions(torch.from_numpy(case.corner(favoured, case.epsilon)))
            change = corner - exact.fractions(case.image[0])
            assert (abs(change) <= Fraction(case.epsilon)).all(), family
            assert ((corner >= 0) & (corner <= 1)).all()
            # As near as float32 allows.
            inside = (corner > 0) & (corner < 1)
            assert (abs(change[inside]) >= Fraction(case.epsilon) - Fraction(2) ** -24).all()


def test_worst_images_are_the_worst_of_many():
    generator = np.random.default_rng(0)
    for _, case in cases(4, seed=2):
        worst = case.margin(case.epsilon)
        lower, upper = exact.ball(case.image[0], case.epsilon)
        for _ in range(4):
            choice = generator.integers(0, 2, lower.shape)
            logits = exact.logits(case.model, np.where(choice, lower, upper))
            assert max(logits[1:]) - logits[0] <= worst


@pytest.fixture(scope="module")
def verdicts():
    return [(family, case, judged(case)) for family, case in cases(8, seed=0)]


def test_nothing_is_proved_beyond_the_worst_image(verdicts):
    for _, _, verdict in verdicts:
        assert (verdict.margins, verdict.executions) == (12, 18)
        assert (verdict.wrong_margins, verdict.wrong_radii, verdict.broken) == (0, 0, 0)


def test_proofs_and_executions_come_close_to_the_worst_image(verdicts):
    """Otherwise nothing would be compared: bounds are exact in some cases, rounding is not."""
    for family, _, verdict in verdicts:
        assert verdict.radii["real", "crown"] >= (1 - 1e-5) * verdict.exact > 0
        if family == "cancelling":
            assert verdict.radii["real", "crown-ibp"] < 0.9 * verdict.exact
        if family in ("monotone", "absorbing"):
            assert verdict.radii["real", "ibp"] >= (1 - 1e-5) * verdict.exact
        if family == "absorbing":
            assert verdict.used > 0.5
    assert any(verdict.radii["float32", "ibp"] > 0 for _, _, verdict in verdicts)


def test_weaker_error_terms_are_broken_by_executions(verdicts):
    """Half the error of float32 is not enough."""

    def half(roundings, unit):
        return gamma(roundings, unit) / (2 if unit > 1e-10 else 1)

    with mock.patch.object(rules, "gamma", half):
        broken = [judged(case).broken for family, case, _ in verdicts if family == "absorbing"]
    assert sum(broken) > 0


def test_radii_and_margins_that_are_too_good_are_noticed(verdicts):
    """The smallest radius at which a bound failed, and a margin just below the exact one."""

    def unproved(case, claim, bound, found):
        return found._replace(radius=found.upper)

    def too_small(case, claim, options, epsilon):
        worst = case.margin(epsilon)
        return float(worst) - 1e-9 * float(abs(worst)) - 1e-30

    with mock.patch.object(worst_cases, "_verified", unproved):
        assert any(judged(case).wrong_radii == 6 for _, case, _ in verdicts)
    with mock.patch.object(worst_cases, "_proved", too_small):
        found = [judged(case) for _, case, _ in verdicts]
    assert any((verdict.wrong_margins, verdict.broken) == (12, 18) for verdict in found)


def test_counts_become_rows(tmp_path):
    rows = worst_cases.run(0.001, 0, tmp_path)
    assert [row.cases for row in rows] == [12, 6, 18] * 4
    assert sum(row.failures for row in rows) == 0
    assert rows[0].what == "margins of 1 monotone networks against their worst image"
