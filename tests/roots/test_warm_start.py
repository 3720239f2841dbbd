"""Solvers that start from a guess or take several points a pass, and lanes counted late."""

import itertools
import math
from typing import NamedTuple

import pytest
import scipy.optimize
import torch
from torch import Tensor

from ibpcore.roots import SOLVERS, Estimate, Multipoint, RootStatus, WarmStart
from ibpcore.roots.base import BUCKET, OpenLanes, constant, evaluate, first_open
from ibpcore.roots.warm_start import Tolerance, approach

XTOL, RTOL = 1e-6, 1e-4


class Case(NamedTuple):
    """A function with a change of sign between two ends, of which the second may be the left."""

    function: object
    lower: float
    upper: float
    monotone: bool


class Recorded:
    """The functions of many lanes, called as solvers call; keeps what was evaluated.

    Attributes:
        points: for each lane the points it was evaluated at.
        calls: how often it was called.
    """

    def __init__(self, functions) -> None:
        self.functions = list(functions)
        self.points: list[list[float]] = [[] for _ in self.functions]
        self.calls = 0

    def __call__(self, x: Tensor, lanes: Tensor) -> Tensor:
        self.calls += 1
        chosen = lanes.tolist()
        assert len(set(chosen)) == len(chosen) == x.shape[-1]
        values = [
            [self.value(lane, point) for lane, point in zip(chosen, row, strict=True)]
            for row in x.view(-1, len(chosen)).tolist()
        ]
        return torch.tensor(values, dtype=x.dtype).view(x.shape)

    def value(self, lane: int, point: float) -> float:
        self.points[lane].append(point)
        return self.functions[lane](point)


MONOTONE = [
    lambda a, k: lambda x: k * (x - a),
    lambda a, k: lambda x: math.exp(k * x) - math.exp(k * a),
    lambda a, k: lambda x: math.exp(-k * a) - math.exp(-k * x),
    lambda a, k: lambda x: math.copysign(abs(x - a) ** 1.5, x - a),
    lambda a, k: lambda x: max(0.1 * (x - a), 5 * k * (x - a)),
    lambda a, k: lambda x: min(0.1 * (x - a), 5 * k * (x - a)),
    lambda a, k: lambda x: math.atan(20 * k * (x - a)),
    lambda a, k: lambda x: -k if x < a else 1.0,
    lambda a, k: lambda x: 1e-9 * (x - a) ** 3,
]
OTHERS = [
    lambda a, k: lambda x: math.sin(9 * k * (x - a)) + 0.3 * (x - a),
    lambda a, k: lambda x: (x - a) * (x - a - 0.2) * (x - a + 0.3),
    lambda a, k: lambda x: (x - a) * math.exp(-4 * k * x),
    lambda a, k: lambda x: abs(x - a) - 0.1 * k,
]


def cases() -> list[Case]:
    """26 of each kind, half of them falling, a third of them from right to left."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for kind in (*MONOTONE, *OTHERS):
        while len(found) % 26 or not found or found[-1][0] is not kind:
            a, k, left, right = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
            rising, sign = kind(a, k + 0.2), (-1) ** len(found)

            def function(x, rising=rising, sign=sign):
                return sign * rising(x)

            ends = [a - 0.01 - left, a + 0.01 + right]
            if len(found) % 3 == 0:
                ends.reverse()
            if function(ends[0]) * function(ends[1]) < 0:
                found.append((kind, Case(function, *ends, kind in MONOTONE)))
    return [case for _, case in found]


CASES = cases()


def ends(chosen=CASES) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.tensor([getattr(c, name) for c in chosen], dtype=torch.float64)
        for name in ("lower", "upper")
    )


def recorded(chosen=CASES) -> Recorded:
    return Recorded(case.function for case in chosen)


def scipy_root(case: Case, left: float, right: float) -> float:
    """The root between two ends; `left` may be the larger."""
    low, high = min(left, right), max(left, right)
    return scipy.optimize.brentq(case.function, low, high, xtol=1e-14, maxiter=999)


ROOTS = torch.tensor([scipy_root(c, c.lower, c.upper) for c in CASES], dtype=torch.float64)
LOWER, UPPER = ends()
WAY = UPPER - LOWER
GUESSES = {
    "exact": ROOTS,
    "5 % too far": ROOTS + 0.05 * (ROOTS - LOWER),
    "5 % too near": ROOTS - 0.05 * (ROOTS - LOWER),
    "far too low": LOWER + 0.001 * (ROOTS - LOWER),
    "far too high": UPPER - 0.001 * (UPPER - ROOTS),
    "in the middle": (LOWER + UPPER) / 2,
    "next to the root": ROOTS + 1e-9 * WAY,
    "upper": UPPER,
    "beyond upper": UPPER + 3 * WAY,
    "lower": LOWER,
    "below lower": LOWER - 2 * WAY,
    "nan": torch.full_like(LOWER, torch.nan),
    "inf": torch.full_like(LOWER, torch.inf),
    "-inf": torch.full_like(LOWER, -torch.inf),
}
INSIDE = {name: ((g - LOWER) * WAY > 0) & ((g - UPPER) * WAY < 0) for name, g in GUESSES.items()}


def doubted(guess: Tensor) -> Estimate:
    """Estimates that are all evaluated."""
    return Estimate(guess, torch.full_like(guess, torch.inf))


def sign(case: Case, x: float) -> float:
    value = case.function(x)
    return 0.0 if value == 0 else math.copysign(1, value)


def check_bracket(case: Case, points: list[float], roots, i: int) -> None:
    """Evaluated ends on either side, as close as any point, or the end that was given."""
    left, right = float(roots.lower[i]), float(roots.upper[i])
    start = sign(case, case.lower)
    assert left == case.lower or left in points
    assert sign(case, left) == start
    assert right == case.upper or right in points
    if right in points:
        assert sign(case, right) != start
    low, high = min(left, right), max(left, right)
    assert (left < right) == (case.lower < case.upper)
    if case.monotone:
        assert not [x for x in points if low < x < high]


def check_estimates(roots) -> None:
    """Every estimate lies within its bracket."""
    low, high = torch.minimum(roots.lower, roots.upper), torch.maximum(roots.lower, roots.upper)
    assert ((roots.root < low) | (roots.root > high)).nonzero().flatten().tolist() == []


def test_the_family_is_large_and_of_both_kinds():
    assert len(CASES) == 26 * 13
    assert 100 < sum(case.lower < case.upper for case in CASES) < 300
    assert 100 < sum(sign(case, case.lower) < 0 for case in CASES) < 300
    assert bool(INSIDE["exact"].all())
    assert not bool(INSIDE["upper"].any() | INSIDE["below lower"].any() | INSIDE["nan"].any())


# --- tracked ------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("guess", GUESSES)
def test_brackets_are_valid(guess, iterations):
    function = recorded()
    roots = WarmStart(max_iterations=iterations)(function, *ends(), start=doubted(GUESSES[guess]))
    for i, case in enumerate(CASES):
        check_bracket(case, function.points[i], roots, i)
    assert roots.evaluations.tolist() == [len(points) for points in function.points]
    open_ = roots.status == RootStatus.ITERATION_LIMIT
    assert bool((open_ | (roots.status == RootStatus.CONVERGED)).all())
    assert int(roots.evaluations.max()) <= 1 + iterations


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("guess", GUESSES)
def test_estimates_lie_in_their_brackets(guess, iterations):
    check_estimates(
        WarmStart(max_iterations=iterations)(recorded(), *ends(), start=doubted(GUESSES[guess]))
    )


@pytest.mark.parametrize("guess", [1e-8, 5e-8, 1.5e-7, 2e-7])
def test_an_estimate_below_the_tolerance_is_not_beyond_the_left_end(guess):
    """The root is 1e-7 from it, the tolerance 1e-6: a radius must not be negative."""
    lower, upper = torch.zeros(1), torch.full((1,), 0.1)
    roots = WarmStart(max_iterations=1)(
        lambda x, lanes: x - 1e-7, lower, upper, start=doubted(torch.tensor([guess]))
    )
    check_estimates(roots)
    assert roots.root.item() >= 0


@pytest.mark.parametrize("tolerances", [(XTOL, RTOL), (1e-12, 1e-12)], ids=["default", "tight"])
@pytest.mark.parametrize(
    "guess", [name for name in GUESSES if name not in {"beyond upper", "inf", "-inf"}]
)
def test_roots_of_smooth_functions_are_those_of_scipy(guess, tolerances):
    """Lines and exponentials; a function with jumps or several roots may stop elsewhere."""
    xtol, rtol = tolerances
    few = slice(0, 3 * 26)
    roots = WarmStart(xtol=xtol, rtol=rtol, max_iterations=1000)(
        recorded(CASES[few]), LOWER[few], UPPER[few], start=doubted(GUESSES[guess][few])
    )
    assert set(roots.status.tolist()) == {RootStatus.CONVERGED}
    exact = ROOTS[few]
    distance = (exact - LOWER[few]).abs()
    assert ((roots.root - exact).abs() <= xtol + rtol * distance + 1e-12).all()


@pytest.mark.parametrize("iterations", [0, 1, 2, 100])
@pytest.mark.parametrize("guess", GUESSES)
def test_known_values_are_not_evaluated_again(guess, iterations):
    """f at the left end; the count is the same as if it had been evaluated."""
    function, plain = recorded(), recorded()
    values = torch.tensor([case.function(case.lower) for case in CASES], dtype=torch.float64)
    solver = WarmStart(max_iterations=iterations)
    roots = solver(function, *ends(), values=(values, None), start=doubted(GUESSES[guess]))
    for known, found in zip(
        roots, solver(plain, *ends(), start=doubted(GUESSES[guess])), strict=True
    ):
        assert torch.equal(known, found)
    assert roots.evaluations.tolist() == [len(points) + 1 for points in function.points]
    for i, case in enumerate(CASES):
        assert case.lower not in function.points[i]


@pytest.mark.parametrize("guess", GUESSES)
def test_without_iterations_every_lane_is_taken_at_its_word(guess):
    function = recorded()
    values = torch.tensor([case.function(case.lower) for case in CASES], dtype=torch.float64)
    roots = WarmStart(max_iterations=0)(
        function, *ends(), values=(values, None), start=doubted(GUESSES[guess])
    )
    assert function.calls == 0
    expected = torch.where(INSIDE[guess], GUESSES[guess], UPPER)
    torch.testing.assert_close(roots.root, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(roots.root[~INSIDE[guess]], UPPER[~INSIDE[guess]])
    assert torch.equal(roots.lower, LOWER)
    assert torch.equal(roots.upper, UPPER)
    assert set(roots.status.tolist()) == {RootStatus.ITERATION_LIMIT}
    assert set(roots.evaluations.tolist()) == {1}


@pytest.mark.parametrize("guess", GUESSES)
def test_one_iteration_evaluates_the_guesses_alone(guess):
    """The upper end where a guess says nothing, or more than it."""
    function = recorded()
    values = torch.tensor([case.function(case.lower) for case in CASES], dtype=torch.float64)
    WarmStart(max_iterations=1)(
        function, *ends(), values=(values, None), start=doubted(GUESSES[guess])
    )
    points = torch.tensor(function.points, dtype=torch.float64)[:, 0]
    expected = torch.where(INSIDE[guess], GUESSES[guess], UPPER)
    torch.testing.assert_close(points, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(points[~INSIDE[guess]], UPPER[~INSIDE[guess]])


@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_what_is_not_doubtful_is_not_evaluated(iterations):
    """The lanes with less doubt than the tolerance keep their estimates, whatever the others do."""
    guess, xtol = GUESSES["5 % too far"], 0.01
    doubt = torch.where(torch.arange(len(CASES)) % 3 == 0, 0.009, torch.inf).double()
    function = recorded()
    values = torch.tensor([case.function(case.lower) for case in CASES], dtype=torch.float64)
    solver = WarmStart(xtol=xtol, rtol=1e-12, max_iterations=iterations)
    roots = solver(function, *ends(), values=(values, None), start=Estimate(guess, doubt))
    sure = doubt < xtol
    assert [not points for points in function.points] == sure.tolist()
    kept = torch.where(INSIDE["5 % too far"], guess, UPPER)
    torch.testing.assert_close(roots.root[sure], kept[sure], rtol=1e-12, atol=1e-12)
    assert set(roots.status[sure].tolist()) == {RootStatus.ITERATION_LIMIT}
    every = solver(recorded(), *ends(), values=(values, None), start=doubted(guess))
    assert torch.equal(roots.root[~sure], every.root[~sure])


@pytest.mark.parametrize(("slack", "passes"), [(0.0, 3), (1.0, 1), (7.0, 0)])
def test_lanes_are_left_that_are_hardly_doubtful_together(slack, passes):
    """Of 10 lanes 6 have doubt 1; then the 2 whose function is not linear have less than 1/2."""
    functions = [*[lambda x: x - 0.5] * 8, *[lambda x: math.exp(9 * x) - math.exp(4.5)] * 2]
    function = Recorded(functions)
    at_lower = torch.tensor([-0.5] * 8 + [1 - math.exp(4.5)] * 2).double()
    guess = torch.tensor([0.5] * 8 + [0.6] * 2).double()
    doubt = torch.tensor([0.0] * 4 + [1.0] * 6).double()
    tolerance = Tolerance(torch.tensor(1e-3), RTOL, torch.tensor(slack))
    found = approach(function, at_lower, guess, doubt, tolerance, 3)
    assert function.calls == len(found.opened) == passes
    assert found.at[:8].tolist() == pytest.approx([0.5] * 8)
    doubtful = [*[False] * 4, *[passes == 0] * 4, *[True] * 2]
    assert tolerance.exceeded(found.at, found.doubt).tolist() == doubtful


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.95, 1.0, 1.05, 1.5])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.3, 2.0])
def test_the_second_correction_is_exact_for_any_power(power, share):
    """f = k (x^p - a^p): the logarithms of x and of the rise lie on a line."""
    a, k = torch.linspace(0.1, 0.6, 20).double(), torch.linspace(0.2, 9, 20).double()
    roots = WarmStart(max_iterations=2)(
        lambda x, lanes: k[lanes] * (x**power - a[lanes] ** power),
        torch.zeros(20).double(),
        torch.ones(20).double(),
        start=doubted(share * a),
    )
    torch.testing.assert_close(roots.root, a, rtol=1e-9, atol=1e-12)


def test_corrections_by_hand():
    """f = x - 1 on [0, 4], first in the middle, where the rise is twice the one to the root."""
    first = 2 * 0.5 ** (1 / (1 + 0.5**2 * (0.6 + math.log(2))))
    once, again = (
        WarmStart(max_iterations=iterations)(
            Recorded([lambda x: x - 1]),
            torch.zeros(1).double(),
            torch.full((1,), 4.0).double(),
            start=doubted(torch.tensor([2.0]).double()),
        )
        for iterations in (1, 2)
    )
    assert once.root.tolist() == pytest.approx([first])
    assert (once.lower.tolist(), once.upper.tolist()) == ([0], [2])
    assert again.root.tolist() == pytest.approx([1])
    assert again.upper.tolist() == pytest.approx([first])


def test_a_steep_right_side_does_not_look_like_convergence():
    """Margins that shoot up: the chord hardly moves from the left point, far from the root."""
    function = Recorded([lambda x: 0.1 * (x - 0.7) if x < 0.75 else 1e4 * (x - 0.7)] * 2)
    ends = torch.zeros(2).double(), torch.ones(2).double()
    guess = torch.tensor([0.3, 0.9]).double()
    roots = WarmStart(xtol=0.02, max_iterations=30)(function, *ends, start=doubted(guess))
    assert roots.root.tolist() == pytest.approx([0.7, 0.7], abs=0.02)


def test_a_right_guess_is_found_at_once():
    """f = x - 3/8 at 3/8: the root, converged, after one evaluation and the left end."""
    function = Recorded([lambda x: x - 0.375] * 2)
    ends = torch.zeros(2), torch.ones(2)
    for iterations in (1, 2, 100):
        guess = torch.full((2,), 0.375)
        roots = WarmStart(max_iterations=iterations)(function, *ends, start=doubted(guess))
        assert roots.root.tolist() == roots.upper.tolist() == [0.375] * 2
        assert roots.status.tolist() == [RootStatus.CONVERGED] * 2
        assert roots.evaluations.tolist() == [2] * 2


@pytest.mark.parametrize("iterations", [2, 3, 100])
@pytest.mark.parametrize("guess", [0.3, 0.9, 0.999, 1.0, 1.2, -1.0, math.nan])
def test_no_bracket(guess, iterations):
    """f(upper) is still negative, whatever the way there; a lane beside it has a root."""
    function = Recorded([lambda x: x - 2, lambda x: -1.0, lambda x: x - 0.5, lambda x: -1 - x])
    roots = WarmStart(max_iterations=iterations)(
        function, torch.zeros(4), torch.ones(4), start=doubted(torch.full((4,), guess))
    )
    none = RootStatus.NO_BRACKET
    assert roots.status[[0, 1, 3]].tolist() == [none] * 3
    assert roots.status[2] != none
    assert roots.root.isnan().tolist() == [True, True, False, True]
    assert roots.lower[[0, 1, 3]].tolist() == roots.upper[[0, 1, 3]].tolist() == [1] * 3
    assert all(1.0 in function.points[i] for i in (0, 1, 3))


def test_a_root_at_either_end():
    """At the left end it is known before the guess is tried; at the right end met last."""
    function = Recorded([lambda x: x, lambda x: x - 1])
    roots = WarmStart()(
        function, torch.zeros(2), torch.ones(2), start=doubted(torch.full((2,), 0.5))
    )
    assert roots.root.tolist() == pytest.approx([0, 1], abs=2e-4)
    assert roots.status.tolist() == [RootStatus.CONVERGED] * 2
    assert function.points[0] == [0]
    assert int(roots.evaluations[0]) == 1


@pytest.mark.parametrize("iterations", [1, 2, 100])
def test_nan_ends_its_own_lane_only(iterations):
    """At the left end, at the guess, at the right end; brackets end before it."""
    broken = [
        lambda x: math.nan if x == 0 else x - 0.5,
        lambda x: math.nan if x == 0.25 else x - 0.5,
        lambda x: math.nan if x > 0.9 else x - 2,
    ]
    healthy = [case.function for case in CASES[::40]]
    lower = torch.cat([torch.zeros(3).double(), LOWER[::40]])
    upper = torch.cat([torch.ones(3).double(), UPPER[::40]])
    guess = torch.cat([torch.full((3,), 0.25).double(), GUESSES["5 % too far"][::40]])
    together = WarmStart(max_iterations=iterations)(
        Recorded(broken + healthy), lower, upper, start=doubted(guess)
    )
    alone = WarmStart(max_iterations=iterations)(
        Recorded(healthy), lower[3:], upper[3:], start=doubted(guess[3:])
    )
    for part, expected in zip(together, alone, strict=True):
        assert torch.equal(part[3:], expected)
    bad = RootStatus.NOT_FINITE
    assert together.status[:2].tolist() == [bad] * 2
    assert int(together.status[2]) == (bad if iterations > 1 else RootStatus.ITERATION_LIMIT)
    assert together.lower[:3].tolist() == [0, 0, 0.25]


@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_infinite_values_are_signs_like_others(iterations):
    """An overflow to the right of the root, as margins have it."""
    function = Recorded([lambda x: x - 0.3 if x < 0.4 else math.inf] * 4)
    guess = torch.tensor([0.2, 0.3, 0.5, 1.0]).double()
    lower, upper = torch.zeros(4).double(), torch.ones(4).double()
    roots = WarmStart(max_iterations=iterations)(function, lower, upper, start=doubted(guess))
    assert bool(roots.root.isfinite().all())
    assert bool((roots.lower < 0.3 + 1e-9).all() & (roots.upper >= 0.3 - 1e-9).all())
    if iterations == 100:
        assert roots.status.tolist() == [RootStatus.CONVERGED] * 4
        assert roots.root.tolist() == pytest.approx([0.3] * 4, abs=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 2, 100])
@pytest.mark.parametrize("guess", ["5 % too near", "far too high", "beyond upper", "nan"])
def test_lanes_do_not_disturb_each_other(guess, iterations):
    together = WarmStart(max_iterations=iterations)(
        recorded(), *ends(), start=doubted(GUESSES[guess])
    )
    for i in range(0, len(CASES), 13):
        alone = WarmStart(max_iterations=iterations)(
            recorded(CASES[i : i + 1]),
            LOWER[i : i + 1],
            UPPER[i : i + 1],
            start=doubted(GUESSES[guess][i : i + 1]),
        )
        for one, every in zip(alone, together, strict=True):
            assert torch.equal(one[0], every[i])


def test_guesses_of_all_kinds_in_one_batch():
    """Each lane ends as in a batch where all guesses are of its kind."""
    kinds = list(GUESSES)
    which = torch.arange(len(CASES)) % len(kinds)
    guess = torch.stack([GUESSES[kind] for kind in kinds])[which, torch.arange(len(CASES))]
    mixed = WarmStart()(recorded(), *ends(), start=doubted(guess))
    for number, kind in enumerate(kinds):
        pure = WarmStart()(recorded(), *ends(), start=doubted(GUESSES[kind]))
        for part, expected in zip(mixed, pure, strict=True):
            assert torch.equal(part[which == number], expected[which == number])


def test_good_guesses_save_evaluations():
    """5 % off costs less than no guess, by the mean over exponentials of both curvatures."""
    smooth = slice(26, 3 * 26)
    chosen = CASES[smooth]
    lower, upper = ends(chosen)
    cold = WarmStart()(recorded(chosen), lower, upper).evaluations.double().mean()
    for kind in ("exact", "5 % too far", "5 % too near"):
        roots = WarmStart()(recorded(chosen), lower, upper, start=doubted(GUESSES[kind][smooth]))
        assert roots.evaluations.double().mean() < cold


# --- fused --------------------------------------------------------------------------------

CANDIDATES = [1, 2, 3, 4, 8, 16]


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_brackets_of_fused_are_valid(candidates, iterations):
    function = recorded()
    roots = Multipoint(candidates=candidates, max_iterations=iterations)(function, *ends())
    for i, case in enumerate(CASES):
        check_bracket(case, function.points[i], roots, i)
        assert float(roots.upper[i]) in function.points[i]
    check_estimates(roots)
    for i in range(len(CASES)):
        passes, rest = divmod(len(function.points[i]) - 2, candidates)
        assert rest == 0
        assert passes <= iterations
        # Every point lies strictly inside the bracket it had.
        assert len(set(function.points[i])) >= 2 + passes
    assert roots.evaluations.tolist() == [len(points) for points in function.points]


@pytest.mark.parametrize("tolerances", [(XTOL, RTOL), (1e-12, 1e-12)], ids=["default", "tight"])
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_fused_converges_to_the_roots_of_scipy(candidates, tolerances):
    xtol, rtol = tolerances
    roots = Multipoint(candidates=candidates, xtol=xtol, rtol=rtol)(recorded(), *ends())
    assert set(roots.status.tolist()) == {RootStatus.CONVERGED}
    for i, case in enumerate(CASES):
        left, right, root = (float(part[i]) for part in (roots.lower, roots.upper, roots.root))
        tolerance = xtol + rtol * abs(root) + 1e-13
        assert abs(right - left) <= tolerance
        exact = float(ROOTS[i]) if case.monotone else scipy_root(case, left, right)
        assert abs(root - exact) <= tolerance


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_lanes_of_fused_do_not_disturb_each_other(candidates):
    together = Multipoint(candidates=candidates)(recorded(), *ends())
    for i in range(0, len(CASES), 13):
        alone = Multipoint(candidates=candidates)(
            recorded(CASES[i : i + 1]), LOWER[i : i + 1], UPPER[i : i + 1]
        )
        # Powers of a single number may be rounded otherwise than those of a vector.
        for one, every in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], every[i], rtol=1e-12, atol=1e-13)


def convex_family() -> tuple[list, Tensor]:
    """Functions from a negative value at 0 to a positive one at 1, all of them convex."""
    functions, found = [], []
    for a in torch.linspace(0.02, 0.98, 25).tolist():
        for k in (0.5, 2.0, 5.0):
            functions.append(lambda x, a=a, k=k: math.exp(k * x) - math.exp(k * a))
            functions.append(lambda x, a=a, k=k: (x - a) * (x + k))
            found += [a, a]
        for power in (1.0, 1.5, 2.0, 3.0):
            functions.append(lambda x, a=a, power=power: x**power - a**power)
            found.append(a)
    return functions, torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("candidates", "passes"), [(1, 20), (4, 8), (8, 4), (16, 4)])
def test_fused_takes_few_passes_on_convex_functions(candidates, passes):
    """Beyond the two ends."""
    functions, exact = convex_family()
    function = Recorded(functions)
    lower = torch.zeros_like(exact)
    roots = Multipoint(candidates=candidates)(function, lower, torch.ones_like(exact))
    assert set(roots.status.tolist()) == {RootStatus.CONVERGED}
    assert bool(((roots.root - exact).abs() <= XTOL + RTOL * exact).all())
    assert function.calls - 2 <= passes


# --- lanes counted late -------------------------------------------------------------------


def late(self: OpenLanes, open_: Tensor) -> Tensor:
    """As on a device that nobody waits for: of one call before, in multiples of 16."""
    earlier, self.previous = self.previous, int(open_.sum())
    if earlier is None:
        return torch.arange(len(open_))
    assert self.previous <= earlier, "lanes only ever finish"
    return first_open(open_, min(-(-earlier // BUCKET) * BUCKET, len(open_)))


def total(self: OpenLanes, open_: Tensor) -> Tensor:
    """Every lane, every time, until none is open."""
    return torch.arange(len(open_) if bool(open_.any()) else 0)


def solve(solver: str, iterations: int, guess: str | None, chosen=CASES) -> tuple[object, Recorded]:
    options = {"start": doubted(GUESSES[guess][: len(chosen)])} if guess else {}
    function = recorded(chosen)
    lower, upper = ends(chosen)
    return SOLVERS[solver](max_iterations=iterations)(function, lower, upper, **options), function


@pytest.mark.parametrize("chosen", [late, total], ids=["late", "all"])
@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("solver", "guess"),
    [*((solver, None) for solver in SOLVERS), *(("tracked", guess) for guess in GUESSES)],
    ids=str,
)
def test_too_many_lanes_change_nothing(solver, guess, iterations, chosen, monkeypatch):
    """Bit by bit, evaluations included, though more was evaluated than was asked for."""
    expected, few = solve(solver, iterations, guess)
    monkeypatch.setattr(OpenLanes, "chosen", chosen)
    roots, many = solve(solver, iterations, guess)
    for part, ordinary in zip(roots, expected, strict=True):
        assert torch.equal(part.nan_to_num(-99), ordinary.nan_to_num(-99))
        assert torch.equal(part.isnan(), ordinary.isnan())
    counts = [sum(map(len, function.points)) for function in (few, many)]
    assert counts[1] >= counts[0]
    if iterations == 100 and guess is None:
        assert counts[1] > counts[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_too_many_lanes_with_some_that_are_broken(solver, monkeypatch):
    """A NaN that a finished lane meets is not its own any more."""

    def touchy(x: float) -> float:
        return math.nan if 0 < abs(x - 0.3) < 1e-7 else x - 0.3

    functions = [touchy, lambda x: x + 2, lambda x: math.nan, lambda x: x, lambda x: x - 1]
    functions += [lambda x, a=a: x**3 - a for a in torch.linspace(0.01, 0.9, 60).tolist()]
    lower, upper = torch.zeros(len(functions)).double(), torch.ones(len(functions)).double()
    expected = SOLVERS[solver]()(Recorded(functions), lower, upper)
    monkeypatch.setattr(OpenLanes, "chosen", late)
    roots = SOLVERS[solver]()(Recorded(functions), lower, upper)
    for part, ordinary in zip(roots, expected, strict=True):
        torch.testing.assert_close(part, ordinary, rtol=0, atol=0, equal_nan=True)
    statuses = {RootStatus.CONVERGED, RootStatus.NO_BRACKET, RootStatus.NOT_FINITE}
    assert set(roots.status.tolist()) == statuses


def test_exactly_the_open_lanes_are_chosen_on_the_cpu():
    watch = OpenLanes()
    for open_ in ([True, False, True], [False, False, True], [False] * 3):
        open_ = torch.tensor(open_)
        assert watch.chosen(open_).tolist() == open_.nonzero().flatten().tolist()


class Stream:
    """A stream of CUDA whose events have always happened."""

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(("most", "first"), [(None, 100), (0, 0), (1, 16), (17, 32), (99, 100)])
def test_counts_of_lanes_are_those_of_one_call_before(most, first, monkeypatch):
    """On CUDA: in multiples of 16, and in the first call as many as there are at most."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    watch, open_ = OpenLanes(most), torch.arange(100) < 20
    assert watch.count(open_) == first
    assert watch.count(open_ & (torch.arange(100) < 3)) == 32
    assert watch.count(torch.zeros(100, dtype=torch.bool)) == 16
    assert watch.count(torch.zeros(100, dtype=torch.bool)) == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_lanes_that_are_not_open_have_no_value(count):
    """Lanes 1 and 3 are open; others follow in order, but what they give is not seen."""
    seen = []

    def function(x: Tensor, lanes: Tensor) -> Tensor:
        seen.append(lanes.tolist())
        return 10 * x

    open_ = torch.tensor([False, True, False, True, False])
    lanes = first_open(open_, count)
    for x in (torch.arange(5.0), torch.stack([torch.arange(5.0), -torch.arange(5.0)])):
        values = evaluate(function, x, open_, lanes)
        assert torch.equal(values[..., open_], 10 * x[..., open_])
        assert bool(values[..., ~open_].isnan().all())
    assert seen == [[1, 3, 0, 2, 4][:count]] * 2


def test_few_evaluations_of_smooth_functions_from_near_guesses():
    """Two beside the guess and f(lower): what remains is below the tolerance by far."""
    zeros = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    for rate, share in itertools.product((2.0, 4.0), (0.95, 1.05)):

        def rise(x: Tensor, lanes: Tensor, rate: float = rate) -> Tensor:
            return torch.exp(rate * x) - torch.exp(rate * zeros[lanes])

        ends = torch.zeros_like(zeros), torch.ones_like(zeros)
        roots = WarmStart(xtol=XTOL, rtol=RTOL)(rise, *ends, start=doubted(share * zeros))
        assert bool(((roots.root - zeros).abs() < XTOL + RTOL * zeros).all())
        assert roots.status.eq(RootStatus.CONVERGED).all()
        assert float(roots.evaluations.double().mean()) <= 4


def test_constants_are_on_the_cpu_whatever_the_default_device():
    """They are made at the first import, which may be anywhere."""
    with torch.device("meta"):
        assert constant(2.0).device.type == "cpu"
    assert bool(constant(0.5) < torch.ones(1, dtype=torch.float64))
