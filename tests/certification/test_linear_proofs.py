"""Proofs by linear bounds throughout: inner intervals, given slopes, and their rounding errors."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from dense_crown import Dense
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reliability import exact, inner_layers, networks
from benchmarks.reliability.inner_layers import BENDING, deep
from ibpcore import Interval
from ibpcore.bounds import alpha_crown
from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.bounds.interval import between
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS, Proof
from ibpcore.bounds.visits import flattened, trace
from ibpcore.certification.soundness import linear, narrowing, rules, visits
from ibpcore.certification.soundness.arithmetic import FLOAT32, REALS, from_ends
from ibpcore.certification.soundness.margins import sound_upper
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaxPool2d,
    IntervalReLU,
    IntervalReshape,
    IntervalSequential,
    IntervalSoftsign,
)
from ibpcore.nn.folding import fold

FREELY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=True) | st.sampled_from(
    [0.0, -0.0, 5e-324, 2.0**-1022, 1.0, 1 + 2.0**-52, -1e-300]
)
CLASSES = 3
BY_ENDS = {IntervalMaxPool2d, IntervalSoftsign, IntervalHardsigmoid, IntervalHardswish}
"""Layers of which proofs know the ends only."""


def upper(network, box, labels, proof=Proof.LINEAR_THROUGHOUT, slopes=None, **options):
    with torch.no_grad():
        name = next(name for name, bound in BOUNDS.items() if bound.proof is proof)
        return sound_upper(network, box, labels, BoundOptions(name, **options), slopes)


def random_box(generator, samples: int = 1) -> Interval:
    """Boxes of different widths in [0, 1]."""
    images = torch.cat([networks.image(generator) for _ in range(samples)]).double()
    width = torch.logspace(-2, -0.5, samples).view(-1, 1, 1, 1)
    return between((images - width).clamp(0, 1), (images + width).clamp(0, 1))


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
    model = (
        deep(generator, BENDING)
        if seed % 2
        else networks.network(generator, CLASSES, without=BY_ENDS)
    )
    return model, random_box(generator, 4), torch.arange(4) % CLASSES


def denses(model, box, labels, slopes=None):
    """The oracle's bounds, (B, classes), and the ends that it found for the first sample."""
    found = []
    for i, label in enumerate(labels.tolist()):
        own = {place: linear.of_samples(some, i) for place, some in (slopes or {}).items()}
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
    """Slopes in [0, 1] for the rows of every place, of all activations but the first one."""
    generator = torch.Generator().manual_seed(len(inner))
    shapes = {number: low.shape for number, (low, _) in enumerate(inner)}
    return {
        place: {
            number: torch.rand(4, rows, *shape, generator=generator)
            for number, shape in shapes.items()
            if number > 0
        }
        for place, rows in {MARGINS: CLASSES, **dict.fromkeys(shapes, 1)}.items()
    }


@pytest.mark.parametrize("given", [False, True], ids=["own slopes", "given slopes"])
@pytest.mark.parametrize("seed", range(24))
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


# The steps, against rational numbers, each with weaker ones that must be noticed


def noticed(check, *args) -> bool:
    """Whether a check fails."""
    try:
        check(*args)
    except AssertionError:
        return True
    return False


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def check_lines(rule, function, kinks, mid: float, rad: float, slope: float) -> None:
    """The lower line of a given slope, and the upper one, hold at both ends and at all kinks."""
    x = Interval(mid=row(mid), rad=row(rad))
    y = rule(x)
    lines = [Fraction(float(part)) for part in rule.lines(x, y, row(slope)[None])]
    low, high = Fraction(mid) - Fraction(rad), Fraction(mid) + Fraction(rad)
    for point in (low, high, Fraction(mid), *(k for k in map(Fraction, kinks) if low < k < high)):
        dx, dy = point - Fraction(mid), function(point) - Fraction(float(y.mid))
        assert lines[0] * dx - lines[2] <= dy <= lines[1] * dx + lines[3]
    # The lower line is no further away than it has to be.
    size = (abs(Fraction(mid)) + Fraction(rad)) * (1 + abs(lines[0]))
    size += max(abs(function(point)) for point in (low, high))
    touched = max(
        lines[0] * (point - Fraction(mid)) - function(point) + Fraction(float(y.mid))
        for point in (low, high, *map(Fraction, kinks))
    )
    assert lines[2] <= max(touched, 0) + size * Fraction(2) ** -44 + Fraction(2) ** -1000


def relu(x: Fraction) -> Fraction:
    return max(x, Fraction(0))


SLOPES = st.floats(-0.5, 1.5, allow_subnormal=True) | st.sampled_from([0.0, 1.0, 5e-324])
RADII = st.floats(0, 1e6, allow_subnormal=True)


@FREELY
@given(NUMBERS, RADII, SLOPES)
def test_lines_of_given_slopes_hold_relu(mid, rad, slope):
    check_lines(rules.ReluRule(), relu, (0.0,), mid, rad, slope)


@FREELY
@given(NUMBERS, RADII, st.floats(-3, 3), NUMBERS, NUMBERS)
def test_lines_of_given_slopes_hold_a_clamp(mid, rad, slope, low, high):
    low, high = min(low, high), max(low, high)

    def clamp(x: Fraction) -> Fraction:
        return min(max(x, Fraction(low)), Fraction(high))

    check_lines(rules.ClampRule(low, high), clamp, (low, high), mid, rad, slope)


@FREELY
@given(NUMBERS, RADII, st.floats(-3, 3), st.floats(-2, 2))
def test_lines_of_given_slopes_hold_a_prelu(mid, rad, slope, below):
    rule = rules.PReluRule(row(below)[0], REALS)
    check_lines(rule, lambda x: relu(x) - Fraction(below) * relu(-x), (0.0,), mid, rad, slope)


class Weaker(rules.ReluRule):
    """The gap of another slope, as it is for 0."""

    def lines(self, x, y, slope=None):
        return super().lines(x, y, slope)._replace(lower_gap=super().lines(x, y).lower_gap)


class Unclamped(rules.ReluRule):
    """A slope beyond 1, with the gap of 1."""

    def lines(self, x, y, slope=None):
        return super().lines(x, y, slope)._replace(lower_slope=slope)


class Exchanged(rules.ReluRule):
    """The upper line below."""

    def lines(self, x, y, slope=None):
        lower, upper, *gaps = super().lines(x, y, slope)
        return rules.RuleLines(upper, lower, *gaps)


@pytest.mark.parametrize("mutant", [Weaker, Unclamped, Exchanged])
def test_lines_that_do_not_fit_their_slopes_are_noticed(mutant):
    cases = [(mid, 1.0, slope) for mid in (-0.6, 0.1, 0.7) for slope in (-0.2, 0.3, 1.4)]
    assert not any(noticed(check_lines, rules.ReluRule(), relu, (0.0,), *case) for case in cases)
    assert any(noticed(check_lines, mutant(), relu, (0.0,), *case) for case in cases)


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [1, MARGINS], ids=["inner", "margins"])
def test_slopes_that_are_no_numbers_prove_nothing(place, slope):
    """Not even one, for a single neuron, beside which all are good."""
    network, labels = sound_network(stacked(5, 4), "real"), torch.tensor([0, 1])
    box = Interval(mid=torch.rand(2, 4).double(), rad=torch.full((2, 4), 0.5).double())
    first, plain = narrowed_inputs(network, box)[0], visits.run(network.rules, box)[3].x
    slopes = torch.full((2, 1, 5), 0.5)
    slopes[0, 0, rules.ReluRule().bends(first)[0].nonzero()[0]] = slope
    given = {place: {0: slopes}}
    second = narrowed_inputs(network, box, given)[1]
    assert (second.rad[1] < plain.rad[1]).any()
    with_it = upper(network, box, labels, slopes=given)
    assert with_it[1].isfinite().all()
    if place == MARGINS:
        assert (with_it[0] == math.inf).all()
    else:  # what interval arithmetic makes of it remains
        assert torch.equal(second.rad[0], plain.rad[0])


def stacked(*widths: int) -> IntervalSequential:
    """Linear layers with ReLU between them, with random weights."""
    generator = torch.Generator().manual_seed(0)
    layers: list = []
    for before, after in itertools.pairwise((4, *widths)):
        layers += [IntervalLinear(before, after), IntervalReLU()]
    model = IntervalSequential(*layers, IntervalLinear(widths[-1], CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def narrowed_inputs(network, box, slopes=linear.NO_SLOPES) -> list[Interval]:
    passed = visits.flat(visits.run(network.rules, box, narrow=narrowing.narrowing(slopes, 64)))
    return [visit.x for visit in passed if visit.number is not None]


def check_recentred() -> None:
    """Bounds over the middle of a narrower interval are bounds over that of the wider one."""
    torch.manual_seed(0)
    mid, rad = torch.randn(1, 9).double() * 1e6, torch.rand(1, 9).double()
    wide, narrow = (
        Interval(mid=mid, rad=rad),
        Interval(mid=mid + (rad - 1e-3) * torch.randn(1, 9), rad=1e-3 * rad),
    )
    rows, value = torch.randn(1, 300, 9).double(), torch.randn(1, 300).double() * 1e3
    start = linear.SoundBounds(rows, value, torch.zeros_like(value))
    end = linear.back((visits.Visit(None, wide, narrow),), start)
    assert torch.equal(end.rows, rows)
    shift = exact.fractions(wide.mid[0]) - exact.fractions(narrow.mid[0])
    # value + row (z - m) <= value' + slack' + row (z - mid) for all z.
    needed = exact.fractions(value[0]) + exact.fractions(rows[0]).dot(shift)
    given = exact.fractions(end.value[0]) + exact.fractions(end.slack[0])
    assert (needed <= given).all()
    scale = abs(exact.fractions(rows[0])).dot(abs(shift)) + abs(needed)
    assert (given - needed <= scale * Fraction(2) ** -46).all()


def test_bounds_move_to_the_middle_of_another_interval():
    check_recentred()


def test_a_move_that_costs_nothing_is_noticed(monkeypatch):
    move = linear._recentred
    monkeypatch.setattr(
        linear, "_recentred", lambda bounds, shift: move(bounds, shift)._replace(slack=bounds.slack)
    )
    assert noticed(check_recentred)


def check_met(mid: float, rad: float, low: float, high: float) -> None:
    """What is in both intervals is in the result, which is hardly wider, and never empty."""
    x = Interval(mid=row(mid), rad=row(rad))
    met = narrowing._met(x, row(low), row(high), row(1.0) > 0)
    start, end = (Fraction(float(met.mid)) + sign * Fraction(float(met.rad)) for sign in (-1, 1))
    least, most = (Fraction(mid) + sign * Fraction(rad) for sign in (-1, 1))
    if max(least, Fraction(low)) > min(most, Fraction(high)):
        return
    least, most = max(least, Fraction(low)), min(most, Fraction(high))
    assert start <= least <= most <= end
    tiny = Fraction(2) ** -50 * (abs(Fraction(mid)) + Fraction(rad)) + Fraction(2) ** -1000
    assert end - start <= most - least + 4 * tiny


@FREELY
@given(NUMBERS, RADII, NUMBERS, NUMBERS)
def test_an_interval_is_met_with_bounds(mid, rad, low, high):
    check_met(mid, rad, min(low, high), max(low, high))
    check_met(mid, rad, mid - rad / 3, mid + rad / 7)


MEETINGS = {
    "lower end not rounded": ("lower_end", lambda x: x.mid - x.rad),
    "upper end not rounded": ("upper_end", lambda x: x.mid + x.rad),
    "ends not rounded": (
        "from_ends",
        lambda low, high: Interval(mid=(low + high) / 2, rad=(high - low) / 2),
    ),
    "the other ends": ("from_ends", lambda low, high: from_ends(high, low)),
    "half of it": ("from_ends", lambda low, high: from_ends(low, (low + high) / 2)),
}


@pytest.mark.parametrize("mutant", MEETINGS)
def test_intervals_that_do_not_hold_both_are_noticed(mutant, monkeypatch):
    torch.manual_seed(0)
    cases = []
    for mid, rad, low, high in torch.rand(300, 4, dtype=torch.float64).tolist():
        mid *= 1000  # its ends are rounded by more than the radius
        near = mid - low * rad, mid + high * rad
        far = mid - 9, mid + 9
        cases += [(mid, rad, *ends) for ends in itertools.product(*zip(near, far, strict=True))]
    assert not any(noticed(check_met, *case) for case in cases)
    monkeypatch.setattr(narrowing, *MEETINGS[mutant])
    assert any(noticed(check_met, *case) for case in cases)


def test_bounds_that_are_no_numbers_or_lie_apart_change_nothing():
    x = Interval(mid=row(0.0, 0.0, 0.0, 1.0, 0.0), rad=row(1.0, 1.0, 1.0, math.inf, 1.0))
    lower = row(math.nan, -math.inf, 2.0, -math.inf, -0.5)
    above = row(0.5, math.inf, 3.0, math.inf, math.nan)
    met = narrowing._met(x, lower, above, torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(met.mid, x.mid)
    assert torch.equal(met.rad, x.rad)


PICKED = {
    "linear": lambda: IntervalLinear(12, 5),
    "linear, of rows": lambda: IntervalSequential(IntervalReshape((3, 4)), IntervalLinear(4, 5)),
    "matrix": lambda: IntervalSequential(IntervalReshape((3, 4)), IntervalMatMul(4, 2)),
    "conv": lambda: pixels(IntervalConv2d(2, 4, 3, padding=1)),
    "conv, strided": lambda: pixels(IntervalConv2d(2, 3, (2, 3), (1, 2), (1, 2))),
    "conv, dilated, groups": lambda: pixels(
        IntervalConv2d(2, 4, 2, dilation=(1, 2), padding=2, groups=2)
    ),
    "conv, same": lambda: pixels(IntervalConv2d(2, 3, (2, 4), padding="same")),
    "conv, circular": lambda: pixels(IntervalConv2d(2, 3, 3, padding=1, padding_mode="circular")),
    "conv of rows": lambda: IntervalSequential(
        IntervalReshape((2, 6)), IntervalConv1d(2, 4, 3, 2, 2, 2, groups=2)
    ),
    "transposed": lambda: pixels(IntervalConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2)),
    "transposed, cropped": lambda: pixels(IntervalConvTranspose2d(2, 3, 2, (3, 1), 1, (2, 0))),
    "average": lambda: pixels(IntervalAvgPool2d(2, 1)),
}


SAME = pytest.mark.filterwarnings("ignore:Using padding='same' with even")


def pixels(layer):
    return IntervalSequential(IntervalReshape((2, 2, 3)), layer)


def start_of(kind: str):
    """All numbers of a layer, as bounds over its input, with errors of 1; and its exact rows."""
    torch.manual_seed(0)
    layer = PICKED[kind]()
    if "matrix" in kind:
        torch.nn.init.normal_(layer[-1].weight)
    model = IntervalSequential(layer)
    passed = visits.run(sound_network(model, "real").rules, unit_box(2, 12))
    passed = (*passed[:-1], passed[-1]._replace(errors=torch.ones_like(passed[-1].y.mid)))
    numbers = passed[-1].y.mid[0].numel()
    places = torch.arange(numbers).repeat(2, 1)
    doubled = model.double()
    zero = torch.zeros(1, 12, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(doubled, zero).reshape(numbers, 12)
    return passed, places, matrix


def unit_box(samples: int, size: int) -> Interval:
    zeros = torch.zeros(samples, size, dtype=torch.float64)
    return Interval(mid=zeros, rad=zeros + 1)


def check_start(kind: str) -> None:
    passed, places, matrix = start_of(kind)
    found = narrowing._above_and_below(passed, places, {})
    reach = exact.fractions(matrix.abs().sum(1))
    mid = exact.fractions(passed[-1].y.mid[0].flatten())
    for sample in found:
        for sign, bounds in zip((1, -1), exact.fractions(sample), strict=True):
            needed = sign * mid + reach + 1
            assert (needed - Fraction(2) ** -46 * (abs(needed) + 1) <= bounds).all()
            assert (bounds <= needed * (1 + Fraction(2) ** -40)).all()


@SAME
@pytest.mark.parametrize("kind", PICKED)
def test_single_numbers_are_bounded_by_their_rows_and_errors(kind):
    check_start(kind)


@pytest.mark.parametrize(
    "kind", [kind for kind in PICKED if kind not in ("average", "conv, circular")]
)
def test_rows_of_single_numbers_are_parts_of_the_weight(kind):
    """The same as rows of zeros and a one times the weight, to the bit."""
    passed, places, matrix = start_of(kind)
    visit = passed[-1]
    shape = torch.Size((len(matrix), *visit.x.shape[1:]))
    rows = visit.rule.pick(places[0], visit.rule.weight, shape)
    ones = torch.eye(len(matrix), dtype=torch.float64).unflatten(1, visit.y.shape[1:])
    assert torch.equal(rows, visit.rule.back(ones, visit.x))
    assert torch.equal(rows.flatten(1), matrix)


def without_errors(path, places, signs, value):
    path, bounds = narrowing_start(path, places, signs, value)
    return path, bounds._replace(slack=torch.zeros_like(bounds.slack))


def with_one_sign(path, places, signs, value):
    return narrowing_start(path, places, signs.abs(), value)


narrowing_start = narrowing._start


@SAME
def test_rows_without_errors_are_noticed(monkeypatch):
    monkeypatch.setattr(narrowing, "_start", without_errors)
    assert any(noticed(check_start, kind) for kind in PICKED)


# Networks


def exchanged(lines, bounds):
    """The lower line where a coefficient is positive."""
    lower, above, *gaps = lines
    return along(rules.RuleLines(above, lower, *gaps), bounds)


def without_gaps(lines, bounds):
    return along(
        lines._replace(upper_gap=0 * lines.upper_gap, lower_gap=0 * lines.lower_gap), bounds
    )


def left_where_it_was(bounds, shift):
    return bounds


def too_narrow(x, lower, upper, where):
    met = meet(x, lower, upper, where)
    return Interval(mid=met.mid, rad=0.9 * met.rad)


along, meet = linear._along, narrowing._met
WRONG = {
    "slopes exchanged": (linear, "_along", exchanged),
    "no gaps": (linear, "_along", without_gaps),
    "midpoints forgotten": (linear, "_recentred", left_where_it_was),
    "intervals too narrow": (narrowing, "_met", too_narrow),
    "one sign": (narrowing, "_start", with_one_sign),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_wrong_rules_are_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*WRONG[mutant])
    assert any(noticed(check_against_dense, *numbered(seed), False) for seed in range(1, 16, 2))


def test_numbers_of_rules_are_those_of_operators():
    """A search for slopes and their proof count nonlinear layers alike."""
    for case in inner_layers.cases(12, seed=2):
        network = fold(copy.deepcopy(case.model).double())
        operators = flattened(trace(network.operators, case.box))
        found = {visit.number: visit.x.shape for visit in operators if visit.number >= 0}
        proved = {visit.number: visit.x.shape for visit in case.visits("real", None)}
        assert found == proved


@pytest.mark.parametrize("inner", [False, True], ids=["margins", "inner"])
def test_slopes_of_a_search_prove_what_it_found(inner):
    options, closer = BoundOptions("alpha-crown", inner_slopes=inner, slope_steps=5), 0
    for seed in range(1, 16, 2):
        model, box, labels = numbered(seed)
        box, labels = visits.taken(box, [3]), labels[[3]]
        network, model = sound_network(model, "real"), as_stored(model)
        found = alpha_crown.optimised(fold(model), box, labels, options)
        with torch.no_grad():
            proved = sound_upper(network, box, labels, options, alpha_crown.slopes(found))
            crown = sound_upper(network, box, labels, options)
            plain = BOUNDS["crown"].box_logits(fold(model), box, labels, options)
        scale, others = crown.abs().amax(), torch.arange(CLASSES) != labels
        assert (crown - plain)[:, others].abs().amax() <= 1e-9 * scale
        expected = found.logits().detach()
        assert (torch.minimum(proved, crown) <= expected + 1e-6 * scale)[:, others].all()
        closer += bool((proved < crown - 1e-3 * scale)[:, others].any())
    assert closer >= 3


@pytest.mark.parametrize("claim", CLAIMS)
def test_boxes_of_any_shape_are_bounded(claim):
    """One pixel of each image, by any amount; and every image by itself."""
    model, box, labels = numbered(3)
    rad = torch.zeros_like(box.rad)
    rad[:, 0, 1, 2] = torch.tensor([0.0, 1e-6, 0.1, 3.0])
    network, box = sound_network(model, claim), Interval(mid=box.mid, rad=rad)
    together = sound_upper(network, box, labels, BoundOptions("crown"))
    single = [
        sound_upper(network, visits.taken(box, [i]), labels[[i]], BoundOptions("crown", budget=1))
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-9, atol=1e-9)
    points = box.mid + rad * torch.linspace(-1, 1, 21).view(-1, 1, 1, 1, 1)
    logits = as_stored(model)(points.flatten(0, 1)).view(21, 4, CLASSES)
    reached = (logits - logits.gather(2, labels.expand(21, 4)[..., None])).amax(0)
    others = torch.arange(CLASSES) != labels[:, None]
    assert (reached <= together + 1e-12)[others].all()


def test_an_overflow_stays_one_where_intervals_are_narrowed():
    """The difference of two numbers that float32 cannot hold is 0, as linear bounds know."""
    large, second, last = IntervalLinear(1, 2), IntervalLinear(2, 2), IntervalLinear(2, 2)
    with torch.no_grad():
        for layer in (large, second, last):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([0.0, 0.0]))
        large.weight.fill_(1e38)
        second.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        last.weight.copy_(torch.eye(2))
        last.bias[0] = 1.0
    model = IntervalSequential(large, IntervalReLU(), second, IntervalReLU(), last)
    box, label = Interval(mid=row(20.0), rad=row(1.0)), torch.tensor([0])
    for claim, bounded in (("real", True), ("float32", False)):
        found = upper(sound_network(model, claim), box, label)
        assert bool(found.isfinite().all()) == bounded
