"""Proofs through clamps, slopes of any sign and other rational activations."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS, DROPOUTS, prelu
from hypothesis import given, settings
from hypothesis import strategies as st

from ibpcore import Interval, UserError, certified_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness.arithmetic import FLOAT32, REALS
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.certification.soundness.rules import ClampRule, PReluRule
from ibpcore.nn import (
    IntervalFlatten,
    IntervalHardtanh,
    IntervalLinear,
    IntervalMaximum,
    IntervalReLU,
    IntervalSequential,
)

FREELY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=True) | st.sampled_from(
    [0.0, -0.0, 5e-324, 2.0**-1022, 1.0, 1 + 2.0**-52, -1e-300, 6.0, -1.5]
)
RADII = st.floats(0, 1e6, allow_subnormal=True) | st.sampled_from([0.0, 5e-324, 1.0])
SLOPES = st.floats(-3, 3, allow_subnormal=True) | st.sampled_from([0.0, 1.0, -1.0, 0.25])
REFUSED = (
    *("silu", "gelu", "gelu by tanh", "mish", "softplus", "logsigmoid"),
    *("elu", "elu, steep", "elu, flat", "celu", "selu"),
)
PROVED = sorted(ACTIVATIONS.keys() - set(REFUSED))


def number(x: float) -> torch.Tensor:
    return torch.tensor([[x]], dtype=torch.float64)


def check(rule, function, kinks, mid: float, rad: float) -> None:
    """The interval and the lines hold the exact values, and are not much wider than needed."""
    x = Interval(mid=number(mid), rad=number(rad))
    y = rule(x)
    lines = rule.lines(x, y)
    lower, upper, below, above = (Fraction(float(part)) for part in lines)
    center, radius = Fraction(float(y.mid)), Fraction(float(y.rad))
    ends = Fraction(mid) - Fraction(rad), Fraction(mid) + Fraction(rad)
    inside = [k for k in map(Fraction, kinks) if ends[0] < k < ends[1]]
    points = [*ends, *inside, Fraction(mid)]
    values = [function(point) for point in points]
    assert center - radius <= min(values)
    assert max(values) <= center + radius
    for point, value in zip(points, values, strict=True):
        dx, dy = point - Fraction(mid), value - center
        assert lower * dx - below <= dy <= upper * dx + above
    size = abs(Fraction(mid)) + Fraction(rad) + max(map(abs, values))
    rounding = size * Fraction(2) ** -44 + Fraction(2) ** -1000
    assert radius <= (max(values) - min(values)) / 2 + rounding
    assert max(below, above) <= radius + rounding
    if not inside:  # a straight line
        assert max(below, above) <= rounding


@FREELY
@given(NUMBERS, RADII, NUMBERS, NUMBERS)
def test_a_clamp_of_an_interval_holds_every_number(mid, rad, low, high):
    low, high = min(low, high), max(low, high)
    rule = ClampRule(low, high)
    check(rule, lambda x: min(max(x, Fraction(low)), Fraction(high)), (low, high), mid, rad)
    least = ClampRule(number(low)[0], math.inf)
    check(least, lambda x: max(x, Fraction(low)), (low,), mid, rad)


@FREELY
@given(NUMBERS, RADII, SLOPES)
def test_slopes_of_any_sign_hold_every_number(mid, rad, slope):
    rule = PReluRule(number(slope)[0], REALS)
    check(
        rule, lambda x: max(x, Fraction(0)) + Fraction(slope) * min(x, Fraction(0)), (0,), mid, rad
    )


@pytest.mark.parametrize("slope", [0.3, -0.3, 1.7])
@pytest.mark.parametrize("mid", [-1e9, -1.0, 1e9])
def test_a_slope_pays_for_its_rounding(mid, slope):
    """Below 0 only: above it nothing is computed."""
    rule = PReluRule(number(slope)[0], FLOAT32)
    x = Interval(mid=number(mid), rad=number(0.0))
    y = rule(x)
    lines = rule.lines(x, y)
    value = Fraction(slope) * Fraction(mid) if mid < 0 else Fraction(mid)
    share = Fraction(1, 2**24) / (1 - Fraction(1, 2**24))
    error = share * abs(value) if mid < 0 else 0
    assert Fraction(float(y.mid)) - Fraction(float(y.rad)) <= value - error
    assert value + error <= Fraction(float(y.mid)) + Fraction(float(y.rad))
    for gap in lines[2:]:
        assert error <= Fraction(float(gap))
    assert (
        Fraction(float(y.rad)) <= 6 * error + abs(value) * Fraction(2) ** -50 + Fraction(2) ** -120
    )


@pytest.mark.parametrize("name", PROVED)
def test_executions_in_float32_are_within_the_intervals(name):
    """Of PyTorch, at random numbers, kinks and ends of intervals of any width."""
    layer = ACTIVATIONS[name](4)
    rules = sound_network(IntervalSequential(layer, IntervalLinear(4, 2)), "float32").rules
    rng = torch.Generator().manual_seed(0)
    mid = torch.randn(500, 4, generator=rng) * 10 ** torch.randint(-3, 3, (500, 1), generator=rng)
    mid[::5] = torch.tensor([0.0, -3.0, 3.0, -1.5])
    rad = 10 ** (torch.rand(500, 4, generator=rng) * 12 - 10)
    points = mid + rad * (2 * torch.rand(50, 500, 4, generator=rng) - 1)
    box = Interval(mid=mid.double(), rad=rad.double() * (1 + 1e-6) + mid.double().abs() * 1e-6)
    with torch.no_grad():
        values = layer(points.flatten(0, 1)).view_as(points).double()
    y = rules[0](box)
    assert ((values - y.mid).abs() <= y.rad).all()


# Two numbers that overflow in float32, one of either sign.
HIDDEN = {
    "clamp": IntervalHardtanh(0.0, 6.0),
    "maximum": IntervalMaximum(2, 0.5),
    "hardsigmoid": ACTIVATIONS["hardsigmoid"](2),
    "hardswish": ACTIVATIONS["hardswish"](2),
    "softsign": ACTIVATIONS["softsign"](2),
    "slopes": IntervalSequential(prelu(2, 0.0), IntervalHardtanh(0.0, 6.0)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_no_activation_hides_an_overflow(name):
    large, last = IntervalLinear(1, 2, bias=False), IntervalLinear(2, 2)
    model = IntervalSequential(large, HIDDEN[name], last)
    with torch.no_grad():
        large.weight.copy_(torch.tensor([[1e38], [-1e38]]))
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, -1.0]))
    image, label, zero = torch.full((1, 1), 10.0), torch.tensor([0]), torch.zeros(1)
    proofs = {
        claim: sound_margins(sound_network(model, claim), image, label, zero, BoundOptions()).item()
        for claim in CLAIMS
    }
    assert proofs["float32"] == math.inf
    if name != "softsign":
        assert proofs["real"] < 0
    assert (
        certified_margins(
            IntervalSequential(large, HIDDEN[name], last), image, label, 0.0, clip=None
        )
        > 0
    )


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("name", ["hardtanh", "relu6", "prelu", "abs", "maximum", "minimum"])
def test_linear_bounds_lose_nothing_but_rounding(name, claim):
    """Against linear bounds in float64 without errors."""
    torch.manual_seed(0)
    layers = [IntervalLinear(6, 8), ACTIVATIONS[name](8), IntervalLinear(8, 8)]
    model = IntervalSequential(*layers, IntervalReLU(), IntervalLinear(8, 3))
    images, labels = torch.rand(16, 6), torch.randint(3, (16,))
    radii = torch.logspace(-4, 0, 16)
    network = sound_network(model, claim)
    options = BoundOptions(bound="crown-ibp")
    proved = sound_margins(network, images, labels, radii, options)
    found = certified_margins(
        model.double(), images.double(), labels, radii.double(), bound="crown-ibp"
    )
    plain = certified_margins(model, images.double(), labels, radii.double())
    assert (proved >= found - 1e-7).all()  # limits are rounded to float32 in one of them
    torch.testing.assert_close(proved, found.detach(), rtol=1e-5, atol=1e-5)
    assert (found < plain - 1e-3).any()


def test_limits_are_those_that_are_stored():
    """0.1 is more in float32: min(max(x, 0.1), 1) - 0.1 as float64 knows it is above 0 at x = 0."""
    last = IntervalLinear(1, 2)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[0.0], [1.0]]))
        last.bias.copy_(torch.tensor([0.1, 0.0]))
    model = IntervalSequential(IntervalHardtanh(0.1, 1.0), last)
    image, label, zero = torch.zeros(1, 1), torch.tensor([0]), torch.zeros(1)
    # f_1 - f_0 is 0 in the stored network, and -1.5e-9 with the number of Python.
    assert float(np.float32(0.1)) > 0.1
    margin = sound_margins(sound_network(model, "real"), image, label, zero, BoundOptions())
    assert margin >= 0
    network = sound_network(model.double(), "real")
    assert network.rules[0].low == 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_exp_or_erf_is_refused(name):
    layer = ACTIVATIONS[name](2)
    kind = type(layer).__name__.removeprefix("Interval")
    with pytest.raises(UserError, match=f"rounding in {kind}: --claim unchecked"):
        sound_network(IntervalSequential(layer, IntervalLinear(2, 2)), "real")


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_no_part_of_a_proof(name):
    model = IntervalSequential(DROPOUTS[name](2), IntervalFlatten(), IntervalLinear(8, 2))
    images, labels = torch.rand(3, 2, 2, 2), torch.tensor([0, 1, 0])
    given = images, labels, torch.full((3,), 0.1), BoundOptions()
    with_it, without = (
        sound_margins(sound_network(part.eval(), "float32"), *given) for part in (model, model[1:])
    )
    assert torch.equal(with_it, without)
