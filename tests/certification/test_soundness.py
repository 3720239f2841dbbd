"""What is proved in spite of rounding, against rational numbers and executions in float32."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reliability import exact
from benchmarks.reliability import soundness as adversary
from ibpcore import Interval, RadiusStatus, UserError, certified_margins, certified_radii, cnn7
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness import linear as linear_bounds
from ibpcore.certification.soundness import margins, rules, visits
from ibpcore.certification.soundness import network as rules_of_layers
from ibpcore.certification.soundness.arithmetic import (
    FLOAT32,
    REALS,
    WORKING,
    _infinities,
    above,
    ball,
    from_ends,
    gamma,
    raised,
)
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.certification.soundness.rules import ConcatenationRule, ProductRule, ReluRule, SumRule
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDivide,
    IntervalFlatten,
    IntervalIndexSelect,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalNormalize,
    IntervalPermute,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSigmoid,
    IntervalSlice,
    IntervalSubtract,
    IntervalUpsample,
    IntervalZeroPad,
)

FREELY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=True) | st.sampled_from(
    [0.0, -0.0, 5e-324, -5e-324, 2.0**-1022, 1.0, 1 + 2.0**-52, -1e-300]
)
UNIT, HALF = Fraction(2) ** -53, Fraction(1, 2)
PROVED = ["ibp", "crown-ibp", "crown"]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ends(x: Interval) -> list[tuple[Fraction, Fraction]]:
    """Exact ends of each entry."""
    pairs = zip(x.mid.flatten().tolist(), x.rad.flatten().tolist(), strict=True)
    return [(Fraction(m) - Fraction(r), Fraction(m) + Fraction(r)) for m, r in pairs]


# The arithmetic


@pytest.mark.parametrize("unit", [2.0**-24, 2.0**-53])
@pytest.mark.parametrize("roundings", [1, 2, 13, 1153, 32769, 2**23])
def test_gamma_is_the_next_float_above_its_rational_value(roundings, unit):
    value = Fraction(unit) * roundings / (1 - Fraction(unit) * roundings)
    assert value <= Fraction(gamma(roundings, unit)) <= value * (1 + 4 * UNIT)


def test_no_gamma_for_sums_that_the_model_says_nothing_of():
    with pytest.raises(UserError, match="too long"):
        gamma(2**24, 2.0**-24)
    assert gamma(2**24, 0.0) == 0


@pytest.mark.parametrize(("roundings", "underflows"), [(2**27, 2**27), (1, 2**54), (2**53, 0)])
def test_nothing_is_raised_where_underflows_are_not_covered(roundings, underflows):
    """m gamma_k above 1 in equation (3), and gamma without a bound."""
    with pytest.raises(UserError, match="too long"):
        raised(float64(1.0), roundings, underflows)


@pytest.mark.parametrize(("roundings", "underflows"), [(2**26, 2**26), (1, 2**52), (2**52, 0)])
def test_sums_of_zeros_are_raised_by_all_that_underflow_took(roundings, underflows):
    lost = underflows * Fraction(WORKING.tiny) * (1 + Fraction(gamma(roundings, WORKING.unit)))
    assert lost <= Fraction(float(raised(float64(0.0), roundings, underflows)))


@FREELY
@given(st.floats(0, 1e300, allow_subnormal=True), st.integers(0, 10**6))
def test_raised_makes_up_for_roundings(computed, roundings):
    # The largest number that so many roundings, each down by u, make `computed` of.
    largest = Fraction(computed) * (1 + Fraction(gamma(roundings, 2.0**-53)))
    made = Fraction(float(raised(float64(computed), roundings)))
    assert largest <= made
    tiny = Fraction(2) ** -1020
    assert made <= Fraction(computed) * (1 + (roundings + 9) * 2 * UNIT) + tiny


@FREELY
@given(NUMBERS, st.floats(0, 1e6, allow_subnormal=True))
def test_an_interval_holds_the_ends_it_is_made_from(lower, width):
    upper = lower + width
    x = from_ends(float64(lower), float64(upper))
    ((low, high),) = ends(x)
    assert low <= Fraction(lower)
    assert Fraction(upper) <= high
    assert high - low <= (Fraction(upper) - Fraction(lower)) * (1 + 8 * UNIT) + 4 * Fraction(
        math.ulp(abs(lower) + abs(upper))
    )


@FREELY
@given(
    st.floats(0, 1, width=32, allow_subnormal=True),
    st.floats(0, 1, allow_subnormal=True) | st.just(0.0),
    st.booleans(),
)
def test_the_ball_holds_every_perturbed_pixel(pixel, epsilon, clipped):
    image = torch.tensor([[[[pixel]]]], dtype=torch.float64)
    ((low, high),) = ends(ball(image, float64(epsilon), (0.0, 1.0) if clipped else None))
    lower, upper = Fraction(pixel) - Fraction(epsilon), Fraction(pixel) + Fraction(epsilon)
    if clipped:
        lower, upper = max(lower, Fraction(0)), min(upper, Fraction(1))
    assert low <= lower
    assert upper <= high
    assert high - low <= upper - lower + Fraction(2) ** -49


@pytest.mark.parametrize("clip", [(0.1, 0.3), (0.7, 0.9), (-1.1, 1 / 3)])
def test_a_ball_holds_images_on_the_edge_of_any_pixel_range(clip):
    """Float32 images may be a little beyond ends that are no float32."""
    images = torch.tensor(clip)
    low, high = ends(ball(images.double(), torch.zeros(2).double(), clip))
    for image, (lower, upper) in zip(images.tolist(), (low, high), strict=True):
        assert lower <= Fraction(image) <= upper
    for lower, upper in ends(ball(images.double(), float64(2.0, 2.0), clip)):
        assert lower <= Fraction(clip[0])
        assert Fraction(clip[1]) <= upper


def test_what_is_remembered_of_inference_mode_has_gradients_later():
    _infinities.cache_clear()
    with torch.inference_mode():
        above(torch.ones(1))
    assert float(above(torch.ones(1, requires_grad=True)).detach()) > 1


def test_nothing_is_proved_of_no_image():
    """The logits are equal at the image, which float32 puts above the pixel range."""
    image, clip = torch.full((1, 1), 0.3), (0.0, 0.3)
    layer = IntervalLinear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [1.0]]))
        layer.bias.copy_(torch.tensor([image.item(), 0.0]))
    network = sound_network(IntervalSequential(layer), "real")
    label, none = torch.tensor([0]), torch.zeros(1)
    assert not sound_margins(network, image, label, none, BoundOptions(clip=clip)) < 0


# Rules


@FREELY
@given(NUMBERS, st.floats(0, 1e6, allow_subnormal=True) | st.just(5e-324))
def test_relu_of_an_interval_holds_relu_of_its_ends(mid, rad):
    x = Interval(mid=float64(mid), rad=float64(rad))
    y = ReluRule()(x)
    ((low, high),), ((start, end),) = ends(x), ends(y)
    assert start <= max(low, 0)
    assert max(high, 0) <= end
    assert end <= max(high, 0) + 2 * Fraction(math.ulp(abs(mid) + rad))
    lines = ReluRule().lines(x, y)
    slopes = [Fraction(float(part)) for part in lines]
    for point in (low, high, min(max(low, Fraction(0)), high), Fraction(mid)):
        dx, dy = point - Fraction(mid), max(point, Fraction(0)) - Fraction(float(y.mid))
        assert slopes[0] * dx - slopes[2] <= dy <= slopes[1] * dx + slopes[3]
    area = Fraction(2) ** -40 * (abs(Fraction(mid)) + Fraction(rad)) + Fraction(2) ** -1000
    assert 0 <= slopes[2] <= Fraction(rad) + area
    assert 0 <= slopes[3] <= Fraction(rad) + area


SIZES = st.floats(0, 1e6, allow_subnormal=True) | st.just(0.0)


@FREELY
@given(NUMBERS, SIZES, NUMBERS, SIZES)
def test_a_product_of_intervals_holds_all_products_and_its_planes_them(mid, rad, other, width):
    """Executions too: each rounds the product once, by a unit and the smallest normal number."""
    x, z = (
        Interval(mid=float64(mid), rad=float64(rad)),
        Interval(mid=float64(other), rad=float64(width)),
    )
    (a,), (b,) = ends(x), ends(z)
    points = [(p, q) for p in (*a, sum(a) / 2) for q in (*b, sum(b) / 2)]
    for arithmetic in (REALS, FLOAT32):
        rule = rules.FactorsRule((), (), arithmetic)
        y = rule.of(x, z)
        if not float(y.rad) < math.inf:  # above the largest float32
            assert arithmetic is FLOAT32
            continue
        ((low, high),) = ends(y)
        first, second = (
            [Fraction(float(part)) for part in lines] for lines in rule.planes(x, z, y)
        )
        largest = max(abs(p * q) for p, q in points)
        for p, q in points:
            error = Fraction(arithmetic.unit) * abs(p * q) + Fraction(arithmetic.tiny)
            assert low <= p * q - error
            assert p * q + error <= high
            dx, dz, dy = p - Fraction(mid), q - Fraction(other), p * q - Fraction(float(y.mid))
            assert first[0] * dx + second[0] * dz - first[2] <= dy - error
            assert dy + error <= first[1] * dx + second[1] * dz + first[3]
        # Nor much more than that.
        slack = 40 * Fraction(arithmetic.unit + WORKING.unit) * largest + Fraction(2) ** -120
        assert high <= max(p * q for p, q in points) + slack
        assert low >= min(p * q for p, q in points) - slack
        assert first[2] + first[3] <= 2 * Fraction(rad) * Fraction(width) + 8 * slack
        assert second[2:] == [0, 0]


WEIGHT = [[1.0, -2.0, 0.3], [0.0, 1e-3, -7.5]]
PRODUCTS = {
    # Each lets another part of equation (8) be the largest: |W| rad, |mid|, |b|, nothing.
    "radius": ([0.1, 0.2, 0.3], [1e3, 2e3, 5e2], [0.1, -0.2]),
    "middle": ([1e9, -3e9, 2e9], [0.0, 0.0, 0.0], [0.0, 0.0]),
    "bias": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e9, -3e8]),
    "both": ([5.0, -7.0, 0.1], [1e-8, 1e-9, 1e-7], [3.0, 1e3]),
    "zero": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0]),
}


def product(case: str, arithmetic) -> tuple[ProductRule, Interval]:
    mid, rad, bias = PRODUCTS[case]
    layer = IntervalLinear(3, 2).double()
    with torch.no_grad():
        layer.weight.copy_(float64(*WEIGHT[0], *WEIGHT[1]).view(2, 3))
        layer.bias.copy_(float64(*bias))
    (rule,) = sound_network(IntervalSequential(layer), "real").rules
    assert isinstance(rule, ProductRule)
    return replace(rule, arithmetic=arithmetic), Interval(
        mid=float64(*mid)[None], rad=float64(*rad)[None]
    )


def check_product(case: str, arithmetic) -> None:
    """The radius is not below equation (8) in rational numbers, nor much above it."""
    rule, x = product(case, arithmetic)
    y = rule(x)
    own, theirs = (
        Fraction(4 * unit) / (1 - 4 * Fraction(unit)) for unit in (WORKING.unit, arithmetic.unit)
    )
    mid, rad = (exact.fractions(part[0]) for part in (x.mid, x.rad))
    for row, bias, computed, radius in zip(
        exact.fractions(rule.weight),
        exact.fractions(rule.bias),
        exact.fractions(y.mid[0]),
        exact.fractions(y.rad[0]),
        strict=True,
    ):
        size = abs(row) @ abs(mid) + abs(bias)
        needed = abs(row) @ rad + own * size
        needed += theirs * (size + abs(row) @ rad)
        needed += 4 * (Fraction(WORKING.tiny) + Fraction(arithmetic.tiny))
        assert (
            needed
            <= radius
            <= needed * (1 + Fraction(2) ** -45)
            + Fraction(2) ** -900
            + (Fraction(2) ** -120 if arithmetic is FLOAT32 else 0)
        )
        assert abs(computed - row @ mid - bias) <= own * size


@pytest.mark.parametrize("arithmetic", [REALS, FLOAT32], ids=["real", "float32"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_pays_for_each_part_of_its_error(case, arithmetic):
    check_product(case, arithmetic)


def fails(case: str, arithmetic) -> bool:
    try:
        check_product(case, arithmetic)
    except AssertionError:
        return True
    return False


def noticed(arithmetic) -> bool:
    """Whether the check fails for some product."""
    return any(fails(case, arithmetic) for case in PRODUCTS)


def half_of(roundings: int, unit: float) -> float:
    return gamma(roundings, unit) / 2


MUTANTS = {
    "gamma halved": ("gamma", half_of),
    "gamma of float64 alone left out": ("gamma", lambda n, u: gamma(n, u) if u > 1e-10 else 0.0),
    "gamma of the execution left out": ("gamma", lambda n, u: gamma(n, u) if u < 1e-10 else 0.0),
    "nothing raised": ("raising", lambda roundings, underflows: (1 - 2.0**-52, 0.0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_weaker_error_term_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(rules, *MUTANTS[mutant])
    assert noticed(FLOAT32) or noticed(REALS)


@pytest.mark.parametrize("part", ["mid", "rad", "bias"])
def test_a_summand_left_out_is_noticed(part, monkeypatch):
    zero = {"mid": "_spread", "rad": "_spread", "bias": "_through"}[part]
    whole = getattr(ProductRule, zero)

    def without(self, x, *rest):
        if part == "bias":
            object.__setattr__(self, "bias", torch.zeros_like(self.bias))
            return whole(self, x, *rest)
        kept = Interval(mid=x.mid * (part != "mid"), rad=x.rad * (part != "rad"))
        return whole(self, kept, *rest)

    monkeypatch.setattr(ProductRule, zero, without)
    assert noticed(FLOAT32)


def rule_of(layer, arithmetic):
    (rule,) = sound_network(IntervalSequential(layer).eval(), "real").rules
    return replace(rule, arithmetic=arithmetic)


def theta(roundings: int, *arithmetics) -> Fraction:
    """gamma of equation (2) added up."""
    shares = (roundings * Fraction(a.unit) for a in arithmetics)
    return sum((share / (1 - share) for share in shares), Fraction(0))


ARITHMETICS = pytest.mark.parametrize("arithmetic", [REALS, FLOAT32], ids=["real", "float32"])
# Middle, radius, mean and bias; each of them decides once.
SCALES = [(1e9, 0.0, 0.0, 0.0), (0.0, 1e3, 0.0, 0.0), (0.0, 0.0, 7e8, 0.0), (0.0, 0.0, 0.0, 3e9)]


@ARITHMETICS
@pytest.mark.parametrize(("mid", "rad", "mean", "bias"), SCALES)
def test_a_scale_pays_for_each_part_of_its_error(mid, rad, mean, bias, arithmetic):
    layer = scaling(3.0, mean, 4.0).double()
    torch.nn.init.constant_(layer.bias, bias)
    x = Interval(mid=float64(mid)[None], rad=float64(rad)[None])
    size = Fraction(3, 2) * (Fraction(mid) + Fraction(rad) + Fraction(mean)) + Fraction(bias)
    needed = Fraction(3, 2) * Fraction(rad) + theta(12, arithmetic, WORKING) * size
    radius = Fraction(float(rule_of(layer, arithmetic)(x).rad))
    assert needed <= radius <= needed * (1 + Fraction(2) ** -45) + Fraction(2) ** -60


def test_a_scale_pays_for_underflow():
    # Of weight times x, 2^-127, nothing may be left, and the root's reciprocal is 2^49.
    x = Interval(mid=float64(2.0**-63)[None], rad=float64(0.0)[None])
    y = rule_of(scaling(2.0**-64, variance=2.0**-98), FLOAT32)(x)
    assert float(y.rad) >= 2.0**-78


@ARITHMETICS
def test_a_sum_pays_for_its_rounding(arithmetic):
    rule = SumRule((), (), arithmetic)
    for sizes in ([1e9, 0.0, 0.0, 0.0], [0.0, 1e9, 0.0, 0.0], [0.0] * 4):
        for a, r, b, s in (sizes, [*sizes[2:], *sizes[:2]]):
            y = rule.of(
                Interval(mid=float64(a), rad=float64(r)), Interval(mid=float64(b), rad=float64(s))
            )
            rads = Fraction(r) + Fraction(s)
            needed = rads + theta(4, arithmetic, WORKING) * (rads + Fraction(a) + Fraction(b))
            assert needed + 4 * Fraction(arithmetic.tiny) <= Fraction(float(y.rad))


@ARITHMETICS
@pytest.mark.parametrize("mid", [-1e9, 1e9, 0.0])
def test_leaky_relu_pays_for_its_roundings(mid, arithmetic):
    y = rule_of(IntervalLeakyReLU(0.3), arithmetic)(Interval(mid=float64(mid), rad=float64(0.0)))
    slope = Fraction(arithmetic.stored(0.3))
    value = Fraction(mid) * (slope if mid < 0 else 1)
    # Only the product with the slope is rounded.
    error = (theta(4, arithmetic) * abs(value) if mid < 0 else 0) + 4 * Fraction(arithmetic.tiny)
    ((low, high),) = ends(y)
    assert low <= value - error
    assert value + error <= high


def test_a_sum_in_the_worst_order_reaches_the_float32_bound():
    # 1 and n halves of its last place: each is rounded away, one after the other.
    n = 4096
    layer = IntervalLinear(n + 1, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, *[2.0**-24] * n]))
    ones = torch.ones(1, n + 1)
    total = np.float32(0)
    for weight in layer.weight[0].tolist():
        total = np.float32(total + np.float32(weight))
    (rule,) = sound_network(IntervalSequential(layer), "float32").rules
    y = rule(Interval(mid=ones.double(), rad=torch.zeros(1, n + 1).double()))
    ((low, high),) = ends(y)
    lost = Fraction(1) + n * Fraction(2) ** -24 - Fraction(float(total))
    assert lost == n * Fraction(2) ** -24
    assert low <= Fraction(float(total)) <= high
    # Half the bound would not have held.
    assert Fraction(float(y.rad)) / 2 < lost


@pytest.mark.parametrize("size", [2, (2,), (2, 2)])
def test_an_average_pays_for_all_its_terms(size):
    rule = rule_of(IntervalAvgPool2d(size), REALS)
    assert (rule.terms, rule.uses) == (4, 4)


def test_padding_that_repeats_pixels_is_refused_in_images_too_large():
    layer = IntervalConv2d(1, 1, 3, padding=1, padding_mode="circular")
    x = Interval(mid=torch.rand(1, 1, 3, 3).double(), rad=torch.zeros(1, 1, 3, 3).double())
    rule_of(layer, REALS)(x)
    with (
        mock.patch.object(rules_of_layers, "POSITIONS", 8),
        pytest.raises(UserError, match="circular padding in images so large"),
    ):
        rule_of(layer, REALS)(x)


# Margins


def test_no_proof_of_what_rational_arithmetic_refutes():
    verdicts = [adversary.judged(case) for case in adversary.cases(100, seed=1)]
    assert not any(verdict.wrong for verdict in verdicts)
    # The networks are such that float32 bounds alone are wrong, and that proofs succeed.
    assert sum(verdict.fooled for verdict in verdicts) >= 2
    assert sum(verdict.real < 0 for verdict in verdicts) >= 5


def test_proofs_are_not_fooled_by_a_layer_of_real_size():
    fooled = 0
    for seed in range(6):
        layer, image, margin = adversary.large(seed)
        model, label, zero = IntervalSequential(layer), torch.tensor([0]), torch.zeros(1)
        assert margin >= 0
        fooled += bool(certified_margins(model, image, label, zero, clip=None) < 0)
        for claim in CLAIMS:
            assert (
                sound_margins(
                    sound_network(model, claim), image, label, zero, BoundOptions(clip=None)
                )
                >= 0
            )
    assert fooled


def executed(model: IntervalSequential, x: np.ndarray, order) -> np.ndarray:
    """Logits by float32 sums, term after term in some order."""
    for layer in model:
        if isinstance(layer, IntervalReLU):
            x = np.maximum(x, np.float32(0))
            continue
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        y = []
        for row, shift in zip(weight, bias, strict=True):
            terms = [np.float32(w * v) for w, v in zip(row, x, strict=True)]
            total = np.float32(shift)
            for term in order(terms):
                total = np.float32(total + term)
            y.append(total)
        x = np.array(y, dtype=np.float32)
    return x


ORDERS = {
    "as stored": lambda terms: terms,
    "backwards": lambda terms: terms[::-1],
    "largest first": lambda terms: sorted(terms, key=abs)[::-1],
    "positive first": lambda terms: sorted(terms)[::-1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_executions_in_float32_stay_within_their_bound(order):
    generator = torch.Generator().manual_seed(0)
    apart = 0
    for _ in range(10):
        model = IntervalSequential(
            IntervalLinear(64, 32), IntervalReLU(), IntervalLinear(32, 16), IntervalReLU()
        )
        model.append(IntervalLinear(16, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        image = torch.rand(1, 64, generator=generator)
        radius = float64(1 / 255)
        label = torch.tensor([0])
        proofs = [
            float(sound_margins(sound_network(model, c), image, label, radius, BoundOptions()))
            for c in CLAIMS
        ]
        assert proofs[0] < proofs[1]
        for _ in range(3):
            sign = torch.randint(0, 2, (64,), generator=generator) * 2 - 1
            point = (image[0] + sign * (1 / 255 - 1e-7)).clamp(0, 1)
            logits = executed(model, point.numpy(), ORDERS[order])
            reached = max(Fraction(float(f)) - Fraction(float(logits[0])) for f in logits[1:])
            assert reached < Fraction(proofs[1])
        # Not by chance: the bound is as close as the difference of the claims.
        tight = executed(model, image[0].numpy(), ORDERS[order])
        real = exact.margin(model, image[0], 0, 0.0)
        apart += Fraction(float(max(tight[1:] - tight[0]))) != real
    assert apart


def test_claims_differ_where_an_execution_loses_what_decides():
    # f_0 = 1 + n 2^-24 and f_1 = 1 + n 2^-25, of which a sum term after term keeps 1.
    n = 1024
    layer = IntervalLinear(n + 1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, *[2.0**-24] * n], [1.0, *[2.0**-25] * n]]))
        layer.bias.zero_()
    model, ones = IntervalSequential(layer), torch.ones(1, n + 1)
    logits = executed(model, ones[0].numpy(), ORDERS["as stored"])
    assert logits[0] == logits[1]
    margin = {
        claim: float(
            sound_margins(
                sound_network(model, claim), ones, torch.tensor([0]), torch.zeros(1), BoundOptions()
            )
        )
        for claim in CLAIMS
    }
    assert margin["real"] < 0 <= margin["float32"]


def as_stored(model):
    """The model in float64 with the numbers of float32: its eps too."""
    for part in model.modules():
        if isinstance(part, IntervalBatchNorm):
            part.eps = FLOAT32.stored(part.eps)
    return model.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clip", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elide", "apart"])
@pytest.mark.parametrize("bound", PROVED)
def test_margins_are_hardly_above_those_of_float64(bound, elide, clip, device):
    torch.manual_seed(0)
    model = cnn7((3, 8, 8), 4, width=4, hidden=16, mean=(0.5,) * 3, std=(0.2,) * 3)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    model.train()(images)
    model = model.eval().to(device)
    images, labels = images.to(device), labels.to(device)
    epsilons = torch.linspace(0, 0.05, 6, device=device, dtype=torch.float64)
    given = {"bound": bound, "elide": elide, "clip": clip}
    sound = sound_margins(
        sound_network(model, "real"), images, labels, epsilons, BoundOptions(**given)
    )
    loose = sound_margins(
        sound_network(model, "float32"), images, labels, epsilons, BoundOptions(**given)
    )
    # Linear bounds always go through the last layer.
    given["elide"] = elide or bound != "ibp"
    plain = certified_margins(as_stored(model), images.double(), labels, epsilons, **given)
    scale = plain.abs().max()
    assert (sound > plain).all()
    assert (sound - plain < 1e-10 * scale).all()
    assert (loose > sound).all()
    assert (loose - sound < 1e-2 * scale).all()


def every_other_layer() -> IntervalSequential:
    """What a CNN7 does not have."""
    new = IntervalSequential(IntervalConv2d(2, 2, 3, padding=1), IntervalReLU())
    return IntervalSequential(
        IntervalScale(2, [1.5, -0.5], 0.1),
        IntervalSubtract(2, torch.linspace(-1, 1, 32).view(2, 4, 4)),
        IntervalDivide(2, [0.3, -0.7]),
        IntervalConcat([IntervalSequential(), new, IntervalConv2d(2, 1, 1)]),
        IntervalBatchNorm(5),
        IntervalReLU(),
        IntervalResidual(IntervalSequential(IntervalConv2d(5, 5, 1), IntervalReLU())),
        IntervalPermute((0, 2, 3, 1)),
        IntervalZeroPad((0, 1, 2, 0)),
        IntervalSlice([[0, 4, 1], [2, 6, 1], [0, 6, 2]]),
        IntervalReshape((3, 4, 4)),
        IntervalAvgPool2d(2),
        IntervalUpsample((2, 3)),
        IntervalProduct(
            IntervalSequential(IntervalConv2d(3, 3, 3, padding=1), IntervalReLU()),
            IntervalSequential(
                IntervalAvgPool2d((4, 6)), IntervalConv2d(3, 3, 1), IntervalUpsample((4, 6))
            ),
        ),
        IntervalConvTranspose2d(3, 4, 3, (2, 1), 1, (1, 0)),
        IntervalIndexSelect([5, 0, 0, 3], 3),
        IntervalFlatten(2),
        IntervalConv1d(4, 3, 3, stride=2, padding=1),
        filled(IntervalMatMul(16, 8)),
        IntervalFlatten(),
        IntervalLinear(24, 4),
    )


def filled(layer: IntervalMatMul) -> IntervalMatMul:
    """With weights, which the layer itself starts at 0."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return layer


@pytest.mark.parametrize("bound", PROVED)
def test_margins_through_all_other_layers_are_hardly_above_those_of_float64(bound):
    torch.manual_seed(0)
    model, images = every_other_layer(), torch.rand(6, 2, 4, 4)
    model.train()(images)
    labels, epsilons = torch.arange(6) % 4, torch.linspace(0, 0.05, 6, dtype=torch.float64)
    real, float32 = (
        sound_margins(
            sound_network(model.eval(), claim), images, labels, epsilons, BoundOptions(bound=bound)
        )
        for claim in CLAIMS
    )
    plain = certified_margins(as_stored(model), images.double(), labels, epsilons, bound=bound)
    assert (plain < real).all()
    assert (real < plain + 1e-10 * plain.abs().max()).all()
    assert (real < float32).all()
    assert (float32 < plain + 1e-2 * plain.abs().max()).all()


@pytest.mark.parametrize("bound", PROVED)
def test_pieces_change_nothing(bound):
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=2, hidden=8)
    network = sound_network(model.eval(), "real")
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    epsilons = torch.full((5,), 0.01).double()
    whole = sound_margins(network, images, labels, epsilons, BoundOptions(bound=bound))
    singly = sound_margins(network, images, labels, epsilons, BoundOptions(bound=bound, budget=1))
    torch.testing.assert_close(whole, singly, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", PROVED)
@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, -3e38])
def test_what_is_not_finite_is_not_proved(value, bound):
    torch.manual_seed(0)
    model = IntervalSequential(
        IntervalConv2d(1, 2, 3, padding=1),
        IntervalBatchNorm(2),
        IntervalReLU(),
        IntervalResidual(IntervalSequential(IntervalConv2d(2, 2, 1), IntervalReLU())),
        IntervalFlatten(),
        IntervalLinear(32, 3),
    ).eval()
    images, labels = torch.rand(1, 1, 4, 4), torch.tensor([0])
    for parameter in model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = value
        for claim in CLAIMS:
            if math.isfinite(value) and claim == "real":
                continue
            margin = sound_margins(
                sound_network(model, claim),
                images,
                labels,
                torch.zeros(1),
                BoundOptions(bound=bound),
            )
            if not math.isfinite(value) and margin < 0:
                pytest.fail(f"{claim}: proved with {value} in {tuple(parameter.shape)}")
            logits = model(images)
            if not logits.isfinite().all():
                assert margin == torch.inf
        with torch.no_grad():
            parameter.copy_(before)


def test_an_overflow_that_only_float32_has_is_not_proved():
    # 1e30 * 1e30 fits into float64, and comes back below 1.
    layers = [IntervalLinear(1, 1, bias=False) for _ in range(3)]
    last = IntervalLinear(1, 2)
    with torch.no_grad():
        for layer, weight in zip(layers, (1e30, 1e30, 1e-38), strict=True):
            layer.weight.fill_(weight)
        last.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        last.bias.zero_()
    model, image = IntervalSequential(*layers, last), torch.ones(1, 1)
    margins = {
        claim: float(
            sound_margins(
                sound_network(model, claim),
                image,
                torch.tensor([0]),
                torch.zeros(1),
                BoundOptions(),
            )
        )
        for claim in CLAIMS
    }
    assert margins["real"] < 0
    assert margins["float32"] == math.inf


# Linear bounds; the rules' own errors are left out, so that what rounding costs is seen


def scaled_identity(factor: float) -> ProductRule:
    layer = IntervalLinear(5, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(5).double())
    return rule_of(layer, REALS)


def lines_of(errors: float):
    """A relaxation of one line, in place of a relu's two."""
    slope = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)[None, None]
    error = torch.full_like(slope, errors)
    return lambda self, x, y, _=None: rules.RuleLines(slope, slope, error, error)


def planes_of(errors: float):
    """A relaxation of one plane, in place of a product's two."""
    first, second = lines_of(errors)(*[None] * 3), lines_of(0.0)(*[None] * 3)
    second = second._replace(
        lower_slope=-(second.upper_slope**2), upper_slope=-(second.upper_slope**2)
    )
    return lambda self, a, b, y: (first, second)


# A rule, the matrix that it stands for, and of how many errors its own is made.
STEPS = {
    "product": (lambda: rule_of(IntervalLinear(5, 5, bias=False).double(), REALS), 1),
    "scale": (lambda: rule_of(IntervalBatchNorm(5, eps=0.3).double(), REALS), 1),
    "relu": (ReluRule, 1),
    "sum": (lambda: SumRule((scaled_identity(2.0**-20),), (), REALS), 2),
    "sum of two": (
        lambda: SumRule((scaled_identity(2.0**-20),), (scaled_identity(0.5),), REALS),
        3,
    ),
    "product of two": (lambda: rules.FactorsRule((), (), REALS), 1),
    "concatenation": (lambda: ConcatenationRule(((scaled_identity(0.3),),) * 3, 1), 1),
    "concatenation of nothing": (lambda: ConcatenationRule(((), ()), 1), 0),
    "padded": (lambda: rules.RearrangeRule(lambda x: F.pad(x, (1, 2))), 0),
    "sliced": (lambda: rules.RearrangeRule(lambda x: x[:, 1:5:2]), 0),
    "permuted": (lambda: rules.RearrangeRule(lambda x: x.view(-1, 5, 1).permute(0, 2, 1)), 0),
    "reshaped": (lambda: rules.ReshapeRule(lambda x: x.view(-1, 5, 1)), 0),
    "ends": (lambda: rules.EndpointRule(lambda x: x, 0, REALS), 0),
}


def matrix(rule) -> np.ndarray:
    eye = torch.eye(5).double()
    if isinstance(rule, ProductRule):
        return exact.fractions(rule.weight)
    if isinstance(rule, ConcatenationRule):
        parts = [matrix(branch[0]) if branch else exact.fractions(eye) for branch in rule.branches]
        return np.concatenate(parts)
    if isinstance(rule, rules.ReshapeRule | rules.RearrangeRule):
        return exact.fractions(rule(Interval(mid=eye, rad=eye)).mid.flatten(1).T)
    if isinstance(rule, ReluRule):
        slopes = rule.lines(None, None).lower_slope
        return exact.fractions(slopes[0].T) * exact.fractions(eye)
    if isinstance(rule, rules.FactorsRule):
        first, second = (
            exact.fractions(lines.lower_slope[0].T) for lines in rule.planes(*[None] * 3)
        )
        return (first + second) * exact.fractions(eye)
    if isinstance(rule, SumRule):
        return exact.fractions(eye) * ((HALF if rule.shortcut else 1) + Fraction(2) ** -20)
    return exact.fractions(eye * rule.scale[:, None] if isinstance(rule, rules.ScaleRule) else eye)


@pytest.mark.parametrize("errors", [0.0, 1.0], ids=["rounding", "errors"])
@pytest.mark.parametrize("kind", STEPS)
def test_linear_bounds_pay_for_roundings_and_errors(kind, errors, monkeypatch):
    torch.manual_seed(0)
    make, times = STEPS[kind]
    rule = make()
    for other in (ProductRule, rules.ScaleRule, SumRule):
        monkeypatch.setattr(other, "errors", lambda self, x, *rest: errors + 0 * x.rad)
    monkeypatch.setattr(ReluRule, "lines", lines_of(errors))
    monkeypatch.setattr(rules.FactorsRule, "planes", planes_of(errors))
    x = Interval(mid=torch.zeros(1, 5).double(), rad=torch.rand(1, 5).double())
    passed, none = visits.run((rule,), x), torch.zeros(1, 40).double()
    rows = torch.randn(1, 40, *passed[0].y.shape[1:], dtype=torch.float64)
    end = linear_bounds.back(passed, linear_bounds.SoundBounds(rows, none, none))
    parts = (exact.fractions(part[0].flatten(1)) for part in (rows, end.rows, end.slack[..., None]))
    for row, back, slack in zip(*parts, strict=True):
        lost = abs(row @ matrix(rule) - back) @ exact.fractions(x.rad[0])
        assert lost + times * Fraction(errors) * abs(row).sum() <= slack[0]


@pytest.mark.parametrize("errors", [0.0, 1.0], ids=["rounding", "errors"])
def test_a_merged_layer_pays_for_roundings_and_errors(errors, monkeypatch):
    torch.manual_seed(0)
    rule = rule_of(IntervalLinear(9, 40, dtype=torch.float64), REALS)
    monkeypatch.setattr(ProductRule, "errors", lambda self, x: torch.full((1, 40), errors).double())
    mid, rad = torch.rand(2, 1, 9).double()
    x = Interval(mid=mid, rad=rad)
    bounds = margins._merged(rule, x, rule.middle(x), torch.tensor([0]))
    weight, rad = exact.fractions(rule.weight), exact.fractions(x.rad[0])
    for i, (row, slack) in enumerate(zip(bounds.rows[0], bounds.slack[0].tolist(), strict=True)):
        lost = abs(weight[i] - weight[0] - exact.fractions(row)) @ rad
        assert lost + 2 * Fraction(errors) <= Fraction(slack)


def test_coefficients_that_underflow_are_paid_for():
    # 2^-600 2^-600 is 0, but not times 2^200.
    ones, none = torch.ones(1, 5).double(), torch.zeros(1, 1).double()
    x = Interval(mid=0 * ones, rad=2.0**200 * ones)
    start = linear_bounds.SoundBounds(2.0**-600 * ones[None], none, none)
    end = linear_bounds.back(visits.run((scaled_identity(2.0**-600),), x), start)
    assert not end.rows.any()
    assert float(end.slack) >= 5 * 2.0**-1000


def test_what_a_sum_of_slack_rounds_off_is_paid_for():
    x = Interval(mid=float64(0.0)[None], rad=float64(1e-17)[None])
    one, none = float64(1.0)[None], float64(0.0)[None]
    start = linear_bounds.SoundBounds(one[None], none, one)
    passed = visits.run((rules.EndpointRule(lambda x: x, 0, REALS),), x)
    slack = linear_bounds.back(passed, start).slack
    assert Fraction(float(slack)) >= 1 + Fraction(1e-17)


def test_products_of_slack_are_rounded_up():
    torch.manual_seed(0)
    rows, x = torch.rand(1, 200, 9, dtype=torch.float64), torch.rand(1, 9, dtype=torch.float64)
    products = exact.fractions(rows[0]) @ exact.fractions(x[0])
    assert all(products <= exact.fractions(linear_bounds.dot(rows, x[:, None])[0]))


def test_logits_apart_are_moved_outward():
    torch.manual_seed(0)
    mid, rad = torch.randn(2, 1, 2000, dtype=torch.float64)
    logits = Interval(mid=mid, rad=rad.abs())
    upper = margins._apart(logits, torch.tensor([0]))[0]
    mid, rad = (exact.fractions(part[0]) for part in (logits.mid, logits.rad))
    bounds = exact.fractions(upper)
    assert all(mid - mid[0] + rad + rad[0] <= bounds)


def scaling(weight=1.0, mean=0.0, variance=1.0, epsilon=0.0) -> IntervalBatchNorm:
    layer = IntervalBatchNorm(1, eps=epsilon).eval()
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(variance)
    return layer


def linear(*weights: float) -> IntervalLinear:
    layer = IntervalLinear(1, len(weights), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights)[:, None])
    return layer


# What a float32 execution loses and float64 does not, with the input.
LOST = {
    "a scale too large": (0.0, [scaling(1e38, variance=2.0**-80)]),
    "weight (x - mean) too large": (1.0, [scaling(1e30, -1e10, 2.0**90), linear(1e-30)]),
    "variance below 0": (1.0, [scaling(variance=-1e-5 * (1 - 1e-7), epsilon=1e-5)]),
    "sums too large": (
        1.0,
        [linear(8e37), *(IntervalResidual(IntervalSequential()),) * 3, linear(1e-38)],
    ),
    "leaky relu too large": (1.0, [linear(-1e20), IntervalLeakyReLU(1e20), linear(-1e-30)]),
}


@pytest.mark.parametrize("case", LOST)
def test_what_an_execution_cannot_compute_is_not_proved(case):
    pixel, layers = LOST[case]
    last = linear(1.0, -1.0)
    last.bias = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    network = sound_network(IntervalSequential(*layers, last).eval(), "float32")
    image = torch.full((1, 1), pixel)
    assert (
        sound_margins(network, image, torch.tensor([0]), torch.zeros(1), BoundOptions()) == math.inf
    )


# What ends below the least float64, with a finite radius, after layers that give 1e304.
OVERFLOWS = {
    "product": lambda: linear(-1e10),
    "scale": lambda: scaling(-1e10),
    "sum": lambda: IntervalSequential(linear(-1.5e4), IntervalResidual(IntervalSequential())),
}


@pytest.mark.parametrize("kind", OVERFLOWS)
def test_no_relu_hides_an_overflow_of_float64(kind):
    layers = [*(linear(1e38) for _ in range(8)), OVERFLOWS[kind](), IntervalReLU()]
    last = linear(1.0, -1.0)
    last.bias = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    network = sound_network(IntervalSequential(*layers, last).eval(), "real")
    assert (
        sound_margins(network, torch.ones(1, 1), torch.tensor([0]), torch.zeros(1), BoundOptions())
        == math.inf
    )


def test_a_slope_that_float32_flushes_is_refused():
    # Stored as 0, so that the second class wins: -1e30 * 1e-50 * -1e20 + 0.5 is above 0.5.
    model = IntervalSequential(linear(-1e30), IntervalLeakyReLU(1e-50), linear(-1e20, 0.0))
    with pytest.raises(UserError, match="slope 1e-50"):
        sound_network(model, "float32")


def test_a_proof_keeps_the_weights_that_it_is_about():
    torch.manual_seed(0)
    layers = [IntervalLinear(2, 4), scaling(), IntervalReLU(), IntervalLinear(4, 2)]
    layers[1] = IntervalBatchNorm(4).eval()
    model = IntervalSequential(*layers).double()
    network = sound_network(model, "real")
    image, label, radius = torch.rand(1, 2), torch.tensor([0]), torch.full((1,), 0.1)
    before = sound_margins(network, image, label, radius, BoundOptions())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert sound_margins(network, image, label, radius, BoundOptions()) == before


# What no proof covers


class Sneaky(IntervalLinear):
    """Of which nothing is known but its name."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (IntervalSigmoid(), "rounding in Sigmoid"),
        (Sneaky(2, 2), "rounding in Sneaky"),
        (torch.nn.Softmax(1), "unsupported layer"),
        (torch.nn.utils.parametrizations.weight_norm(IntervalLinear(2, 2)), "unsupported layer"),
        (IntervalBatchNorm(2, track_running_stats=False), "batch statistics"),
    ],
)
def test_layers_without_a_proof_are_refused(layer, message):
    with pytest.raises(UserError, match=message):
        sound_network(IntervalSequential(layer, IntervalLinear(2, 2)).eval(), "real")


def test_a_changed_container_is_refused():
    class Twice(IntervalSequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    with pytest.raises(UserError, match="rounding in Twice"):
        sound_network(Twice(IntervalLinear(2, 2)), "real")


def test_claims_must_fit_the_weights():
    model = IntervalSequential(IntervalLinear(2, 2))
    with pytest.raises(UserError, match="'exact' is not one of real, float32"):
        sound_network(model, "exact")
    with pytest.raises(UserError, match="about float32 networks"):
        sound_network(model.double(), "float32")
    with pytest.raises(UserError, match="float32 or float64, all of one type"):
        sound_network(model.half(), "real")


@pytest.mark.parametrize("deviation", [0.0, 1e-40, 1e35])
def test_deviations_out_of_range_prove_nothing(deviation):
    layer = IntervalNormalize([0.0], [1.0])
    layer.std.fill_(deviation)
    model = IntervalSequential(layer, IntervalFlatten(), IntervalLinear(1, 2))
    network = sound_network(model, "real")
    assert (
        sound_margins(
            network, torch.ones(1, 1, 1, 1), torch.tensor([0]), torch.zeros(1), BoundOptions()
        )
        > 1e300
    )


# Radii


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_radii_are_proved_and_never_grow(claim, bound):
    torch.manual_seed(1)
    model = cnn7((1, 8, 8), 3, width=4, hidden=16)
    images = torch.rand(24, 1, 8, 8)
    model.train()(images)
    model.eval()
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    found = certified_radii(model, images, labels, 0.2, bound=bound)
    # Radii that are too large by far, a little, and not at all.
    wrong = found.radius * torch.tensor([3.0, 1 + 1e-4, 1.0]).repeat(8)
    claimed = found._replace(radius=wrong, upper=torch.maximum(wrong, found.upper))
    radii = verified_radii(model, images, labels, claimed, claim=claim, bound=bound)
    assert radii.radius.dtype == torch.float64
    assert (radii.radius <= wrong.double()).all()
    margins = sound_margins(
        sound_network(model, claim), images, labels, radii.radius, BoundOptions(bound=bound)
    )
    right = found.radius > 0
    assert (margins[right & (radii.radius > 0)] < 0).all()
    assert (radii.radius[~right] == 0).all()
    assert right.sum() >= 15
    assert (radii.upper >= radii.radius).all()
    close = {"real": 2e-3, "float32": 2e-2}[claim]
    assert (radii.radius[right] > found.radius[right].double() * (1 - close)).all()
    assert (radii.radius[right][0::3] < wrong[right].double()[0::3]).any()


@pytest.mark.parametrize("radius", [math.nan, math.inf, -1.0])
def test_radii_must_be_numbers(radius):
    model, images, labels = (
        IntervalSequential(linear(1.0, -1.0)),
        torch.ones(1, 1),
        torch.tensor([0]),
    )
    found = certified_radii(model, images, labels, 0.1)
    with pytest.raises(UserError, match="radii must be finite and not negative"):
        verified_radii(model, images, labels, found._replace(radius=torch.tensor([radius])))


def test_a_radius_that_rounding_made_is_taken_back():
    layer, image, margin = adversary.large(0)
    assert margin >= 0
    model, labels = IntervalSequential(layer), torch.tensor([0])
    found = certified_radii(model, image, labels, 0.1)
    claimed = found._replace(radius=torch.tensor([1e-6]), upper=torch.tensor([1e-6]))
    radii = verified_radii(model, image, labels, claimed)
    assert radii.radius == 0
    assert radii.upper == 0
    assert radii.status.tolist() == [RadiusStatus.UNPROVED]
