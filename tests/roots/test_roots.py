"""Root finders: `brentq` is SciPy's in every lane, brackets are valid, lanes independent."""

import itertools
import math

import pytest
import scipy.optimize
import torch
from torch import Tensor

from ibpcore import UserError
from ibpcore.roots import SOLVERS, Bisection, Brent, RootStatus

EPS = torch.finfo(torch.float64).eps
LOOSE = {"xtol": 0.2, "rtol": 0.1}
DEFAULT = {"xtol": 1e-6, "rtol": 1e-4}
TIGHT = {"xtol": 1e-13, "rtol": 4 * EPS}


class Lanes:
    """One Python function a lane, called as the solvers call; keeps what was evaluated.

    Attributes:
        points: for each lane the list of points it was evaluated at.
        calls: for each call the list of lanes it was for.
    """

    def __init__(self, functions):
        self.functions = functions
        self.points = [[] for _ in functions]
        self.calls = []

    def __call__(self, x: Tensor, lanes) -> Tensor:
        chosen = torch.arange(len(self.functions))[lanes].tolist()
        assert x.shape[-1:] == (len(chosen),)
        self.calls.append(chosen)
        rows = x.tolist() if x.dim() == 2 else [x.tolist()]
        values = [self.row(chosen, points) for points in rows]
        return torch.tensor(values, dtype=x.dtype).view_as(x)

    def row(self, chosen, points):
        values = []
        for lane, point in zip(chosen, points, strict=True):
            self.points[lane].append(point)
            values.append(self.functions[lane](point))
        return values


def family():
    """A few hundred (function, lower, upper), each with a change of sign in between."""
    rng = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))

    kinds = [
        lambda a, k: lambda x: (x - a) * (x**2 + k),
        lambda a, k: lambda x: x**3 - 2 * k * x - (a**3 - 2 * k * a),
        lambda a, k: lambda x: math.exp(k * x) - math.exp(k * a),
        lambda a, k: lambda x: 1 - math.exp(-k * (x - a)),
        lambda a, k: lambda x: (x - a) ** 9,
        lambda a, k: lambda x: math.tanh(100 * k * (x - a)),
        lambda a, k: lambda x: max(k * (x - a), 0.01 * (x - a)),
        lambda a, k: lambda x: min(max(x - a, -0.1), 0.02) + 1e-3 * k * (x - a),
        lambda a, k: lambda x: a - x,
        lambda a, k: lambda x: math.atan(k * (a - x)),
        lambda a, k: lambda x: -1.0 if x < a else 1.0,
        lambda a, k: lambda x: math.copysign(math.sqrt(abs(x - a)), x - a),
    ]
    cases = []
    for kind in kinds:
        while len(cases) % 30 or not cases or cases[-1][3] is not kind:
            a, k = uniform(-1, 1), uniform(0.3, 3)
            function = kind(a, k)
            lower, upper = a - uniform(1e-3, 2), a + uniform(1e-3, 2)
            if (function(lower) < 0) != (function(upper) < 0):
                cases.append((function, lower, upper, kind))
    return [case[:3] for case in cases]


CASES = family()


def tensors(cases) -> tuple[Tensor, Tensor]:
    lower, upper = ([case[i] for case in cases] for i in (1, 2))
    return torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)


def test_the_family_is_large():
    assert len(CASES) == 12 * 30


@pytest.mark.parametrize("iterations", [100, 0, 1, 2, 5])
@pytest.mark.parametrize("tolerances", [LOOSE, DEFAULT, TIGHT], ids=["loose", "default", "tight"])
def test_brentq_takes_the_steps_of_scipy(tolerances, iterations):
    lanes = Lanes([case[0] for case in CASES])

    roots = Brent(max_iterations=iterations, **tolerances)(lanes, *tensors(CASES))

    for i, (function, lower, upper) in enumerate(CASES):
        seen = []

        def recorded(x, function=function, seen=seen):
            seen.append(x)
            return function(x)

        root, report = scipy.optimize.brentq(
            recorded,
            lower,
            upper,
            maxiter=iterations,
            full_output=True,
            disp=False,
            **tolerances,
        )
        assert lanes.points[i] == pytest.approx(seen, rel=1e-12, abs=1e-15)
        assert int(roots.evaluations[i]) == len(lanes.points[i]) == report.function_calls
        assert (int(roots.status[i]) == RootStatus.CONVERGED) == report.converged
        assert float(roots.root[i]) == pytest.approx(root, rel=1e-12, abs=1e-15)


def test_a_root_at_an_end_is_found_before_the_first_step():
    lower, upper = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    lanes = Lanes([lambda x: x] * 3)
    roots = Brent()(lanes, lower, upper)
    assert roots.root.tolist() == [0, 0, 0]
    assert roots.status.tolist() == [RootStatus.CONVERGED] * 3
    assert roots.evaluations.tolist() == [2] * 3
    assert len(lanes.calls) == 2


def test_bisect_halves():
    """f = x - 0.3 on [0, 1] by hand: 0.5 (+), 0.25 (-), 0.375 (+)."""
    lanes = Lanes([lambda x: x - 0.3])
    start = torch.tensor([0.0]).double()
    roots = Bisection(max_iterations=3)(lanes, start, start + 1)
    assert lanes.points == [[0, 1, 0.5, 0.25, 0.375]]
    assert (float(roots.lower), float(roots.upper), float(roots.root)) == (0.25, 0.375, 0.3125)
    assert int(roots.status) == RootStatus.ITERATION_LIMIT
    assert int(roots.evaluations) == 5


def test_bisect_stops_where_its_bracket_is_within_the_tolerance():
    start = torch.tensor([0.0]).double()
    roots = Bisection(xtol=0.13, rtol=1e-9)(Lanes([lambda x: x - 0.3]), start, start + 1)
    assert (float(roots.lower), float(roots.upper)) == (0.25, 0.375)
    assert int(roots.status) == RootStatus.CONVERGED
    assert int(roots.evaluations) == 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_analytic_roots(solver, dtype):
    cases = [
        (lambda x: x**2 - 2, 0, 2, math.sqrt(2)),
        (lambda x: math.exp(x) - 3, 0, 5, math.log(3)),
        (lambda x: math.cos(x), 0, 3, math.pi / 2),
        (lambda x: 1e-3 - x**3, -1, 1, 0.1),
        (lambda x: x - 0.7, 1, 0, 0.7),
    ]
    lower, upper = (part.to(dtype) for part in tensors(cases))
    expected = torch.tensor([case[3] for case in cases], dtype=dtype)
    roots = SOLVERS[solver]()(Lanes([case[0] for case in cases]), lower, upper)
    assert roots.status.tolist() == [RootStatus.CONVERGED] * len(cases)
    assert bool(((roots.root - expected).abs() <= 1e-6 + 1e-4 * expected).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 100])
def test_brackets_hold_a_change_of_sign_between_evaluated_points(solver, iterations):
    lanes = Lanes([case[0] for case in CASES])
    lower, upper = tensors(CASES)

    roots = SOLVERS[solver](max_iterations=iterations)(lanes, lower, upper)

    for i, (function, start, _) in enumerate(CASES):
        left, right = float(roots.lower[i]), float(roots.upper[i])
        assert left in lanes.points[i]
        assert right in lanes.points[i]
        assert left < right
        assert function(left) != 0
        assert (function(left) < 0) == (function(start) < 0)
        assert function(right) == 0 or (function(right) < 0) != (function(start) < 0)
        assert left <= float(roots.root[i]) <= right
        # No evaluated point lies strictly inside: the bracket is the tightest known.
        assert not [x for x in lanes.points[i] if left < x < right]


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_brackets_are_narrow_enough(solver):
    """The root is within the tolerance of the only root; for bisect, the bracket too."""
    cases = CASES[:30] + CASES[60:]  # those between are cubics with up to three roots
    lower, upper = tensors(cases)
    roots = SOLVERS[solver]()(Lanes([case[0] for case in cases]), lower, upper)
    exact = Brent(**TIGHT)(Lanes([case[0] for case in cases]), lower, upper).root
    assert set(roots.status.tolist()) == {RootStatus.CONVERGED}
    tolerance = 1e-6 + 1e-4 * roots.root.abs()
    assert bool(((roots.root - exact).abs() <= tolerance).all())
    if solver == "bisect":
        assert bool((roots.upper - roots.lower <= tolerance).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_finished_lanes_are_never_evaluated_again(solver):
    lanes = Lanes([case[0] for case in CASES])
    roots = SOLVERS[solver]()(lanes, *tensors(CASES))
    for earlier, later in itertools.pairwise(lanes.calls):
        assert set(later) <= set(earlier)
    assert roots.evaluations.tolist() == [len(points) for points in lanes.points]
    assert len(set(roots.evaluations.tolist())) > 1
    assert len(lanes.calls[-1]) < len(CASES)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lanes_do_not_disturb_each_other(solver):
    lower, upper = tensors(CASES)
    together = SOLVERS[solver]()(Lanes([case[0] for case in CASES]), lower, upper)
    for i in range(0, len(CASES), 17):
        alone = SOLVERS[solver]()(Lanes([CASES[i][0]]), lower[i : i + 1], upper[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            # torch's pow and exp may round the last bit otherwise for one number than for many.
            exact = {"rtol": 1e-12, "atol": 1e-12} if solver == "fused" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(one[0], all_[i], **exact)


def nan_near_zero(x: float) -> float:
    return math.nan if abs(x) < 0.2 else x


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_ends_its_own_lane_only(solver):
    healthy = [case[0] for case in CASES[::40]]
    lower, upper = tensors(CASES[::40])
    expected = SOLVERS[solver]()(Lanes(healthy), lower, upper)
    ends = torch.tensor([-1.0, -1.0]).double(), torch.tensor([0.9, 1.0]).double()
    lanes = Lanes([nan_near_zero, lambda x: math.nan, *healthy])

    roots = SOLVERS[solver]()(lanes, torch.cat([ends[0], lower]), torch.cat([ends[1], upper]))

    assert roots.status[:2].tolist() == [RootStatus.NOT_FINITE] * 2
    assert nan_near_zero(float(roots.lower[0])) < 0 < nan_near_zero(float(roots.upper[0]))
    assert roots.evaluations[:2].tolist() == [len(points) for points in lanes.points[:2]]
    assert int(roots.evaluations[1]) == 2
    for part, alone in zip(roots, expected, strict=True):
        assert torch.equal(part[2:], alone)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_root_beside_a_nan_end_is_no_bracket(solver):
    """f(lower) is NaN: the left end has no sign, though f(upper) = 0."""
    ends = torch.tensor([0.0]), torch.tensor([1.0])
    values = torch.tensor([math.nan]), torch.tensor([0.0])
    roots = SOLVERS[solver]()(lambda x, lanes: x - 1, *ends, values=values)
    assert int(roots.status) == RootStatus.NOT_FINITE


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_bracket(solver):
    lanes = Lanes([lambda x: x + 2, lambda x: x - 0.5])
    roots = SOLVERS[solver]()(lanes, torch.zeros(2), torch.ones(2))
    assert roots.status.tolist() == [RootStatus.NO_BRACKET, RootStatus.CONVERGED]
    assert roots.root.isnan().tolist() == [True, False]
    assert len(lanes.points[0]) == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_infinite_values_are_signs_like_others(solver):
    lanes = Lanes([lambda x: -1.0 if x < 0.3 else math.inf, lambda x: x - 0.3])
    roots = SOLVERS[solver]()(lanes, torch.zeros(2), torch.ones(2))
    assert roots.status.tolist() == [RootStatus.CONVERGED] * 2
    assert roots.root.tolist() == pytest.approx([0.3, 0.3], abs=1e-4)
    assert bool((roots.lower < 0.3).all())


def test_bisect_closes_in_on_the_leftmost_of_many_roots():
    lanes = Lanes([lambda x: min(x - 0.2, 0.0) + max(x - 0.7, 0.0)])
    roots = Bisection()(lanes, torch.tensor([0.0]).double(), torch.tensor([1.0]).double())
    assert float(roots.lower) < 0.2 <= float(roots.upper)
    assert float(roots.root) == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_end_values_are_not_evaluated_again(solver):
    ends = torch.zeros(1), torch.ones(1)
    lanes = Lanes([lambda x: x - 0.3])
    roots = SOLVERS[solver]()(lanes, *ends, values=(ends[0] - 0.3, ends[1] - 0.3))
    assert not {0.0, 1.0} & set(lanes.points[0])
    assert int(roots.evaluations) == len(lanes.points[0]) + 2
    for known, found in zip(roots, SOLVERS[solver]()(lanes, *ends), strict=True):
        assert torch.equal(known, found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_lanes_at_all(solver):
    roots = SOLVERS[solver]()(Lanes([]), torch.zeros(0), torch.zeros(0))
    assert roots.root.shape == roots.status.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("options", "ends", "named"),
    [
        ({"xtol": 0.0}, {}, "xtol"),
        ({"xtol": -1.0}, {}, "xtol"),
        ({"xtol": math.nan}, {}, "xtol"),
        ({"rtol": 1e-9}, {}, "rtol"),
        ({"rtol": math.nan}, {}, "rtol"),
        ({"max_iterations": -1}, {}, "max_iterations"),
        ({}, {"upper": torch.ones(3)}, "lower and upper"),
        ({}, {"lower": torch.zeros(2, 1), "upper": torch.ones(2, 1)}, "lower and upper"),
        ({}, {"lower": torch.zeros(2, dtype=torch.int64)}, "lower and upper"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(solver, options, ends, named):
    ends = {"lower": torch.zeros(2), "upper": torch.ones(2)} | ends
    with pytest.raises(UserError, match=named):
        SOLVERS[solver](**options)(lambda x, lanes: x - 0.3, **ends)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_never_waits_and_agrees_with_the_cpu(solver):
    rng = torch.Generator().manual_seed(0)
    target, slope = torch.rand(2, 500, generator=rng, dtype=torch.float64)

    def solve(device: str):
        a, k = target.to(device), (slope + 0.1).to(device)
        ends = torch.zeros_like(a), torch.ones_like(a)

        def function(x: Tensor, lanes) -> Tensor:
            return ((x - a[lanes]) * k[lanes]).clamp(min=-0.3)

        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else before)
        try:
            return SOLVERS[solver]()(function, *ends)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    for cpu, cuda in zip(solve("cpu"), solve("cuda"), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-12, atol=1e-15)
