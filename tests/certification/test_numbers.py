"""Awkward numbers: each gives the right answer or a clear error, with every solver and bound."""

import math
import random
import struct
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import ibpcore.certification.radii
from ibpcore import UserError, certified_margins, certified_radii, cnn7
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import RadiusStatus
from ibpcore.certification.summary import summarize
from ibpcore.data.batches import Batch, as_pixels
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.roots import SOLVERS, Estimate, RootStatus
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.methods import METHODS
from ibpcore.training.state import start_state

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
every_way = pytest.mark.parametrize(
    ("device", "solver", "bound"),
    [
        pytest.param(*device.values, solver, bound, marks=device.marks)
        if not isinstance(device, str)
        else (device, solver, bound)
        for device in DEVICES
        for solver in sorted(SOLVERS)
        for bound in BOUNDS
    ],
)
DENORMAL = 2.0**-149


def network(*layers: IntervalLinear | nn.Module) -> IntervalSequential:
    return IntervalSequential(IntervalFlatten(), *layers).eval()


@torch.no_grad()
def linear(weight, bias) -> IntervalLinear:
    """With these weights, (out, in)."""
    weight = torch.tensor(weight, dtype=torch.float32)
    layer = IntervalLinear(weight.shape[1], weight.shape[0])
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.tensor(bias))
    return layer


def pixels(*values: float) -> Tensor:
    """(B, 1, 1, 1) images of one pixel."""
    return torch.tensor(values).view(-1, 1, 1, 1)


def line() -> IntervalSequential:
    """f = (x, 1 - x): the margin of class 0 is 1 - 2 (x - e), of class 1 2 (x + e) - 1."""
    return network(linear([[1.0], [-1.0]], [0.0, 1.0]))


def radii_of(model, images, labels, epsilon_max, device, solver, bound="ibp", **options):
    """`certified_radii`, each radius above 0 checked by a bound pass of its own."""
    model, images = model.to(device), images.to(device)
    labels = torch.as_tensor(labels, device=device)
    given = {"solver": solver, "bound": bound, **options}
    radii = certified_radii(model, images, labels, epsilon_max, **given)
    margins = certified_margins(model, images, labels, radii.radius, bound=bound)
    assert bool((margins[radii.radius > 0] < 0).all())
    return type(radii)(*(part.cpu() for part in radii))


@every_way
def test_black_white_denormal_and_the_same_twice(device, solver, bound):
    images = pixels(0.0, 1.0, DENORMAL, 1 - 2**-24, 0.0, 1.0)
    radii = radii_of(line(), images, [1, 0, 1, 0, 1, 0], 1.0, device, solver, bound)
    assert radii.radius.tolist() == pytest.approx([0.5] * 6, abs=1e-4)
    assert bool((radii.radius < 0.5).all())
    assert radii.status.tolist() == [RadiusStatus.CONVERGED] * 6
    for part in radii:
        assert torch.equal(part[:2], part[4:])


@every_way
@pytest.mark.parametrize("epsilon_max", [1e-45, 1e-38, 1e-7])
def test_a_ball_smaller_than_rounding(device, solver, bound, epsilon_max):
    """Nothing in it reaches the other class. ACR is a share all the same."""
    radii = radii_of(line(), pixels(0.0, 1.0, 0.5), [1, 0, 0], epsilon_max, device, solver, bound)
    first, second, tie = radii.radius.tolist()
    # The nearest float not below.
    assert epsilon_max <= first == second <= epsilon_max * (1 + 2**-23) + DENORMAL
    assert tie == 0
    assert radii.status.tolist() == [1, 1, 0]
    data = ImageSet(
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([1, 0])
    )
    summary = summarize(
        certify(line(), data, CertificationOptions(epsilon_max)), epsilon_max, ["0.1"]
    )
    assert summary["acr"] == summary["accuracy"] == 1
    assert list(summary["certified_accuracy"].values()) == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_epsilon_zero_is_the_clean_margin(device, bound):
    torch.manual_seed(0)
    model, images = (
        cnn7((1, 4, 4), 3, 2, 4).eval().to(device),
        torch.rand(5, 1, 4, 4, device=device),
    )
    labels = torch.tensor([0, 1, 2, 0, 1], device=device)
    logits = model(images).detach()
    clean = torch.stack(
        [
            (logits[i] - logits[i, y])[torch.arange(3, device=device) != y].max()
            for i, y in enumerate(labels.tolist())
        ]
    )
    for epsilon in (0.0, DENORMAL):
        margins = certified_margins(model, images, labels, epsilon, bound=bound).detach()
        torch.testing.assert_close(margins, clean, rtol=1e-4, atol=1e-5)
    for bad in (0.0, -1e-45, math.nan):
        with pytest.raises(UserError, match="epsilon_max must be finite and above 0"):
            certified_radii(model, images, labels, bad, bound=bound)


HIDDEN = {
    "constant": lambda: network(linear([[0.0]] * 3, [1.0, 0.0, -1.0])),
    "dead at once": lambda: network(
        linear([[0.0]] * 2, [0.0, 0.0]), IntervalReLU(), linear([[5.0, 5.0]] * 3, [1.0, 0.0, -1.0])
    ),
    "dead in the middle": lambda: network(
        linear([[1.0], [-1.0]], [-9.0, -9.0]),
        IntervalReLU(),
        linear([[5.0, -5.0]] * 3, [1.0, 0.0, -1.0]),
    ),
}


@every_way
@pytest.mark.parametrize("name", HIDDEN)
def test_constant_outputs(device, solver, bound, name):
    """Class 0 wins whatever the image: radius epsilon_max, and 0 for all other labels."""
    radii = radii_of(HIDDEN[name](), pixels(0.2, 0.0, 1.0), [0, 1, 0], 1.0, device, solver, bound)
    assert radii.radius.tolist() == radii.upper.tolist() == [1, 0, 1]
    assert radii.status.tolist() == [1, 0, 1]
    assert radii.evaluations.tolist() == [1, 0, 1]


@every_way
def test_ties_are_not_certified(device, solver, bound):
    """Two equal logits, always or at epsilon 0 only; argmax says class 0 all the same."""
    always = network(linear([[1.0], [1.0], [0.0]], [0.0, 0.0, -1.0]))
    radii = radii_of(always, pixels(0.0, 0.5, 1.0), [0, 0, 1], 1.0, device, solver, bound)
    assert radii.radius.tolist() == [0, 0, 0]
    assert radii.status.tolist() == [RadiusStatus.MISCLASSIFIED] * 3
    here = radii_of(line(), pixels(0.5), [0], 1.0, device, solver, bound)
    assert (here.radius.tolist(), here.status.tolist()) == ([0], [0])


@pytest.mark.parametrize("device", DEVICES)
def test_one_class_is_no_choice(device):
    model = network(linear([[1.0]], [0.0])).to(device)
    images, labels = pixels(0.5).to(device), torch.zeros(1, dtype=torch.int64, device=device)
    for bound in BOUNDS:
        with pytest.raises(UserError, match="of a single class"):
            certified_radii(model, images, labels, 0.5, bound=bound)
        with pytest.raises(UserError, match="of a single class"):
            certified_margins(model, images, labels, 0.5, bound=bound)
    data = ImageSet(torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device), labels)
    with pytest.raises(UserError, match="of a single class"):
        certify(model, data, CertificationOptions(0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_ten_thousand_classes(device):
    """f_i = -i / 10000 + (x where i = 0): all margins but that of class 1 are lower."""
    count = 10_000
    weight = torch.zeros(count, 1)
    weight[0] = 1.0
    bias = -torch.arange(count) / count
    model = network(linear(weight.tolist(), bias.tolist()))
    for bound in BOUNDS:
        radii = radii_of(model, pixels(0.25, 0.25), [0, 9999], 1.0, device, "brentq", bound)
        # f_0 - f_1 = x - e + 1e-4 is 0 at e = x + 1e-4, where the pixel would be below black.
        assert radii.radius.tolist() == [1, 0]
    bare = certified_radii(
        model.cpu(), pixels(0.25), torch.tensor([0]), 1.0, clip=None, xtol=1e-7, rtol=1e-6
    )
    assert float(bare.radius) == pytest.approx(0.2501, abs=1e-6)


# Training


def dataset_of(images: Tensor, labels: list[int], classes: int) -> Dataset:
    part = ImageSet(images, torch.tensor(labels))
    return Dataset("digits", "made up", tuple(map(str, range(classes))), part, part)


def one_step(method, data: Dataset, device, share=0.5, **given):
    """A step of training on all images at once: its result, and the state after it."""
    usual = {"width": 1, "hidden": 2, "batch_size": 8, "epochs": 2, "warmup": (1, 2), **given}
    config = make_config("digits", method, **usual)
    state = start_state(config, data, device)
    state.model.train()
    images = as_pixels(data.train.images).to(device)
    labels = data.train.labels.to(device)
    samples = torch.arange(len(labels), device=device)
    return train_step(state, Batch(images, labels, samples), share, config), state


AWKWARD = {
    "all black": (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), [0, 1, 2, 0], 3),
    "all white": (torch.full((4, 1, 4, 4), 255, dtype=torch.uint8), [0, 0, 0, 0], 2),
    "one pixel": (
        torch.tensor([0, 99, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1),
        [0, 0, 1, 1],
        2,
    ),
    "two samples": (torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4), [0, 1], 2),
    "many classes": (torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4), [0, 999], 1000),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", AWKWARD)
def test_a_step_on_awkward_images_stays_finite(device, method, name):
    if method == "crown-ibp" and name == "many classes":
        pytest.skip("a row for each class: the same as with few, only longer")
    result, state = one_step(method, dataset_of(*AWKWARD[name]), device)
    assert bool(torch.stack([*result.sums]).isfinite().all())
    assert all(bool(tensor.isfinite().all()) for tensor in state.model.state_dict().values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon_max", [1e-45, 1.0])
def test_a_step_at_the_least_and_the_largest_epsilon(device, method, epsilon_max):
    data = dataset_of(*AWKWARD["two samples"])
    for share in (0.0, 1e-30, 1.0):
        result, _ = one_step(method, data, device, share, epsilon_max=epsilon_max)
        assert bool(torch.stack([*result.sums]).isfinite().all())
        assert 0 <= float(result.sums[2]) <= 2 * (epsilon_max + DENORMAL)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_one_has_no_statistics(device):
    data = dataset_of(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [0], 2)
    config = make_config("digits", "acert", width=1, hidden=2)
    with pytest.raises(UserError, match="1 training image cannot be trained on"):
        start_state(config, data, device)
    model = cnn7((1, 4, 4), 2, 1, 2).train().to(device)
    images, labels = (
        torch.zeros(1, 1, 4, 4, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    with pytest.raises(UserError, match="batch norm"):
        certified_margins(model, images, labels, 0.1)
    with pytest.raises(UserError, match="evaluation mode"):
        certified_radii(model, images, labels, 0.1)


# Margins that jump


def bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def noise(x: float, seed: int) -> int:
    """As good as random, but the same for the same point."""
    return random.Random(bits(x) * 1009 + seed).randrange(4)


ADVERSARIES = {
    "a step of one ulp": lambda x, s: -DENORMAL if x < 0.1 * (s % 9) + 0.03 else DENORMAL,
    "a step to infinity": lambda x, s: -3e38 if x < 0.1 * (s % 9) + 0.03 else math.inf,
    "signs at random": lambda x, s: (-1.0, 1.0, -DENORMAL, 3e38)[noise(x, s)],
    "signs at random near the root": lambda x, s: (
        x - 0.5 if abs(x - 0.5) > 1e-3 else (-1e-9, 1e-9, -1.0, 1.0)[noise(x, s)]
    ),
    "last bit": lambda x, s: -1.0 if bits(x) % 2 else 1.0,
    "flat, then a cliff": lambda x, s: -1e-30 if x < 0.999 else 1e30,
    "flat at zero": lambda x, s: min(x - 0.3, 0.0) + max(x - 0.7, 0.0),
    "a plateau a rounding below zero": lambda x, s: -DENORMAL if 0.2 < x < 0.8 else x - 0.5,
    "stairs": lambda x, s: math.floor((x - 0.37) * 10) / 10 + 0.05,
    "saw": lambda x, s: (x - 0.5) + 0.2 * (noise(x, s) - 1.5),
    "a hole of NaN": lambda x, s: math.nan if 0.4 < x < 0.6 else x - 0.55,
    "NaN at random": lambda x, s: math.nan if noise(x, s) == 0 else x - 0.4,
    "falls in between": lambda x, s: math.sin(25 * x + s) - 0.2,
    "negative nearly everywhere": lambda x, s: -1.0 if x < 1 - 1e-6 else 1e-38,
    "positive nearly everywhere": lambda x, s: -1.0 if x < 1e-7 else 1.0,
}
LANES = 12


class Recorded:
    """An adversary on several lanes, negative at 0; keeps what was evaluated."""

    def __init__(self, function):
        self.function, self.seen = function, [{} for _ in range(LANES)]
        self.points = [0] * LANES

    def value(self, x: float, lane: int) -> float:
        self.points[lane] += 1
        value = -1.0 if x == 0 else self.function(x, lane)
        self.seen[lane][x] = value
        return value

    def __call__(self, x: Tensor, lanes: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1]).tolist()
        values = [
            [self.value(p, lane) for p, lane in zip(row, lanes.tolist(), strict=True)]
            for row in rows
        ]
        return torch.tensor(values, device=x.device).view_as(x)


TOLERANCES = (1e-6, 1e-4), (1.2e-38, 4.8e-7)
GUESSES = (None, [0.0, 1.0, 0.5, 0.03, math.nan, math.inf, 2.0, 1.2, -1.0, DENORMAL, 0.999, 0.3])


def doubted(guess: Tensor) -> Estimate:
    """Estimates of which each is evaluated."""
    return Estimate(guess, torch.full_like(guess, torch.inf))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", ADVERSARIES)
def test_no_solver_reports_more_than_it_evaluated(name, solver, device):
    guesses = GUESSES if solver == "tracked" else GUESSES[:1]
    for guess, iterations, (xtol, rtol) in product(guesses, (100, 7, 0), TOLERANCES):
        recorded = Recorded(ADVERSARIES[name])
        extra = {} if guess is None else {"start": doubted(torch.tensor(guess, device=device))}
        ends = torch.zeros(LANES, device=device), torch.ones(LANES, device=device)
        roots = SOLVERS[solver](xtol=xtol, rtol=rtol, max_iterations=iterations)(
            recorded, *ends, **extra
        )
        per_pass = 8 if solver == "fused" else 1
        for lane in range(LANES):
            seen, lower, upper = (
                recorded.seen[lane],
                float(roots.lower[lane]),
                float(roots.upper[lane]),
            )
            status = int(roots.status[lane])
            assert recorded.points[lane] <= 2 + per_pass * iterations
            if device == "cpu":  # elsewhere a finished lane may be evaluated once more
                assert recorded.points[lane] <= int(roots.evaluations[lane])
            assert 0 <= lower <= 1
            if status == RootStatus.NO_BRACKET:
                assert seen[1.0] < 0
                continue
            assert seen[lower] < 0
            assert lower < upper or (lower == upper == 1.0)
            if status == RootStatus.CONVERGED and upper in seen:
                assert not seen[upper] < 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", ADVERSARIES)
def test_a_radius_is_where_a_margin_was_negative(name, solver, device, monkeypatch):
    """Whatever the margins do between; the image is classified correctly, by a margin of 1."""
    recorded = Recorded(ADVERSARIES[name])
    lane_of = torch.arange(1, LANES + 1) / 100

    def margins(network, images, labels, epsilons, options):
        lanes = (images.flatten()[:, None].cpu() == lane_of).nonzero()[:, 1]
        return recorded(epsilons, lanes)

    model = network(linear([[0.0], [0.0]], [1.0, 0.0])).to(device)
    monkeypatch.setattr(ibpcore.certification.radii, "margins", margins)
    images, labels = lane_of.view(-1, 1, 1, 1).to(device), torch.zeros(LANES, dtype=torch.int64)
    radii = certified_radii(model, images, labels.to(device), 1.0, solver=solver)
    for lane, (radius, status) in enumerate(
        zip(radii.radius.tolist(), radii.status.tolist(), strict=True)
    ):
        assert radius == 0 or recorded.seen[lane][radius] < 0
        assert radius < 1 or status == RadiusStatus.EPSILON_MAX
        assert recorded.points[lane] <= int(radii.evaluations[lane]) <= 1 + 8 * 100


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_tolerances_that_no_bracket_can_meet_are_refused(solver):
    """The numbers near 0 are too few: a solver would halve a bracket that cannot be halved."""
    ends = torch.zeros(2), torch.ones(2)
    with pytest.raises(UserError, match="xtol must be at least"):
        SOLVERS[solver](xtol=1e-40)(lambda x, lanes: x, *ends)
    least = torch.finfo(torch.float32).tiny
    roots = SOLVERS[solver](xtol=least, max_iterations=10**9)(
        lambda x, lanes: torch.where(x > 0, 1.0, -1.0), *ends
    )
    assert roots.lower.tolist() == [0, 0]
    assert bool((roots.evaluations < 1200).all())
