"""Only open samples are bounded: loss and gradients are those of bounding every sample."""

import importlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ibpcore.certification.radii
import ibpcore.training.methods.base
from ibpcore.bounds.ibp import robust_logits
from ibpcore.bounds.operators import RELU
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass
from ibpcore.roots import SOLVERS
from ibpcore.training.config import make_config
from ibpcore.training.methods import METHODS, CleanBatch
from ibpcore.training.methods.base import StepRadii
from ibpcore.training.methods.ibp import ibp_loss_at
from ibpcore.training.regularizers import Activations, activation_sums, warmup_regularizer

RADII = importlib.import_module("ibpcore.training.methods.adaptive_radii")
SAMPLES, CLASSES, EPSILON = 10, 4, 0.02
WRONG = {
    "some wrong": [0, 3, 4, 9],
    "one wrong": [5],
    "one right": [0, 1, 2, 3, 4, 5, 6, 8, 9],
    "all wrong": list(range(SAMPLES)),
    "all right": [],
}


@pytest.fixture(autouse=True, params=[True, False], ids=["leaving out", "with all"])
def leaving_out(request, monkeypatch):
    """Whether samples of radius 0 are left out, whatever the sizes."""
    monkeypatch.setattr(RADII, "worth_leaving_out", lambda *_: request.param)
    return request.param


class Problem(NamedTuple):
    """A CNN7 in training mode, and which samples it gets right."""

    model: torch.nn.Module
    images: Tensor
    labels: Tensor
    right: Tensor


def problem(wrong: list[int]) -> Problem:
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), CLASSES, 3, 6, (0.5,), (0.25,)).double().train()
    images = torch.rand(SAMPLES, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        labels = clean_pass(model, images)[0].argmax(1)
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    right = torch.ones(SAMPLES, dtype=torch.bool)
    right[wrong] = False
    return Problem(model, images, labels, right)


def clean_batch(given: Problem, warmup: bool, slopes: Tensor | None = None) -> CleanBatch:
    relu_inputs = [] if warmup else None

    def observe(operator, x):
        if warmup and operator == RELU:
            relu_inputs.append(x)

    logits, network = clean_pass(given.model, given.images, observe=observe)
    if slopes is None:
        slopes = torch.full((SAMPLES,), torch.nan)
    return CleanBatch(network, logits, given.images, given.labels, slopes, relu_inputs)


def settings(method: str, **overrides):
    return make_config("digits", method, **{"regularizer": 0.0, "solver": "brentq", **overrides})


def gradients(loss: Tensor, model) -> list[Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=False)


def dense(given: Problem, radii: Tensor, config, warmup: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss by its formula (eq. 11) with all samples in one interval pass."""
    logits, network = clean_pass(given.model, given.images)
    seen = Activations()
    robust = robust_logits(
        network,
        given.images,
        given.labels,
        radii,
        config.bound_options,
        observe=seen,
    )
    standard, worst = (F.cross_entropy(x, given.labels) for x in (logits, robust))
    loss = config.kappa * standard + (1 - config.kappa) * worst
    if warmup:
        loss = loss + 0.3 * warmup_regularizer(activation_sums(seen))
    return loss, gradients(loss, given.model)


def sparse(given: Problem, result, warmup: bool) -> tuple[Tensor, list[Tensor]]:
    loss = result.loss
    assert (result.activations is not None) == warmup
    if warmup:
        loss = loss + 0.3 * warmup_regularizer(activation_sums(result.activations))
    return loss, gradients(loss, given.model)


def check_same(given: Problem, result, config, warmup: bool) -> None:
    """Loss and every gradient; a bias before batch norm has none but for rounding."""
    loss, gradient = sparse(given, result, warmup)
    expected_loss, expected = dense(given, result.radii, config, warmup)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    for (name, _), a, b in zip(given.model.named_parameters(), gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: name + m)
    assert max(float(b.abs().max()) for b in expected) > 1e-3


class Bounded:
    """Which samples were given to an interval pass, for the loss and for a radius.

    Attributes:
        for_loss, for_radii: a list of sample numbers for each pass.
    """

    def __init__(self, images: Tensor, monkeypatch) -> None:
        self.images = images
        self.for_loss: list[list[int]] = []
        self.for_radii: list[list[int]] = []
        spied = [(ibpcore.training.methods.base, "robust_logits", self.for_loss)]
        spied += [(m, "margins", self.for_radii) for m in (ibpcore.certification.radii, RADII)]
        for module, name, seen in spied:
            monkeypatch.setattr(module, name, self.spy(getattr(module, name), seen))

    def spy(self, function, seen: list[list[int]]):
        def spying(network, images, *args, **kwargs):
            same = (images[:, None] == self.images).flatten(2).all(-1)
            assert same.sum(1).tolist() == [1] * len(images)
            seen.append(same.int().argmax(1).tolist())
            return function(network, images, *args, **kwargs)

        return spying

    @property
    def everyone(self) -> set[int]:
        return {i for seen in (*self.for_loss, *self.for_radii) for i in seen}


def numbers(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


SLOPES = {
    "never visited": None,
    "steep": torch.full((SAMPLES,), 1e3),
    "flat": torch.full((SAMPLES,), 1e-3),
    "some": torch.tensor([torch.nan, 20.0, torch.nan, 1.0, 500.0] * 2),
}


@pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("iterations", [None, 0, 1, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_acert_is_the_dense_computation(solver, iterations, wrong, warmup):
    given = problem(WRONG[wrong])
    config = settings("acert", solver=solver, max_iterations=iterations, kappa=0.5)
    result = METHODS["acert"](clean_batch(given, warmup, SLOPES["some"]), EPSILON, config)
    assert bool((result.radii[given.right] > 0).all())
    assert bool((result.radii[~given.right] == 0).all())
    check_same(given, result, config, warmup)


@pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("solver", ["brentq", "tracked"])
def test_acert_with_every_setting_of_the_loss(solver, kappa, elide, clip, warmup):
    given = problem(WRONG["some wrong"])
    config = settings("acert", solver=solver, kappa=kappa, elide=elide, clip=clip)
    result = METHODS["acert"](clean_batch(given, warmup, SLOPES["some"]), EPSILON, config)
    check_same(given, result, config, warmup)


@pytest.mark.parametrize("epsilon", [1e-4, 0.005, 0.1])
@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("iterations", [0, 1, 2, 100])
def test_tracked_radii_from_any_memory(iterations, slopes, epsilon):
    """At the smallest epsilon all samples reach it, at the largest none does."""
    given = problem(WRONG["some wrong"])
    xtol = 1e-6 if iterations == 100 else None
    config = settings("acert", solver="tracked", max_iterations=iterations, xtol=xtol)
    result = METHODS["acert"](clean_batch(given, False, SLOPES[slopes]), epsilon, config)
    check_same(given, result, config, False)
    if iterations == 100:
        exact = METHODS["acert"](clean_batch(given, False), epsilon, settings("acert")).radii
        torch.testing.assert_close(result.radii, exact, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("method", ["fastibp", "acert"])
def test_nothing_is_bounded_at_epsilon_0(method, kappa, wrong, warmup, monkeypatch):
    """The loss is the clean one twice, and still the dense one."""
    given = problem(WRONG[wrong])
    config = settings(method, kappa=kappa)
    bounded = Bounded(given.images, monkeypatch)
    result = METHODS[method](clean_batch(given, warmup), 0.0, config)
    assert bounded.for_loss == bounded.for_radii == []
    assert result.radii.tolist() == [0] * SAMPLES
    check_same(given, result, config, warmup)


@pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_rows_are_a_matter_of_speed(elide, wrong, warmup):
    """Radii 0 within `rows`, and the rows in any order: what `rows` leaves out has radius 0."""
    given = problem(WRONG[wrong])
    config = settings("acert", kappa=0.5, elide=elide)
    radii = torch.linspace(0, 0.03, SAMPLES, dtype=torch.float64) * given.right
    for rows in (radii > 0, given.right, torch.ones_like(given.right)):
        chosen = rows.nonzero().flatten().flip(0)
        batch = clean_batch(given, warmup)
        result = ibp_loss_at(batch, StepRadii(radii, chosen), EPSILON, config)
        assert torch.equal(result.radii, radii)
        check_same(given, result, config, warmup)
    batch = clean_batch(given, warmup)
    everyone = ibp_loss_at(batch, StepRadii(radii, None), EPSILON, config)
    check_same(given, everyone, config, warmup)


@pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])
@pytest.mark.parametrize("slopes", ["never visited", "some"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_misclassified_samples_are_not_bounded(
    solver, iterations, wrong, slopes, warmup, leaving_out, monkeypatch
):
    """And the others with gradient once, with those that it is not worth to leave out."""
    given = problem(WRONG[wrong])
    config = settings("acert", solver=solver, max_iterations=iterations)
    batch = clean_batch(given, warmup, SLOPES[slopes])
    bounded = Bounded(given.images, monkeypatch)
    METHODS["acert"](batch, EPSILON, config)
    right = numbers(given.right)
    assert {i for seen in bounded.for_radii for i in seen} <= set(right)
    out = leaving_out or warmup or (iterations == 0 and solver != "tracked")
    expected = right if out else [*range(SAMPLES)]
    assert [sorted(seen) for seen in bounded.for_loss] == ([expected] if right else [])
    if not right:
        assert bounded.for_radii == []
    if iterations == 0 and solver != "fused":
        assert len(bounded.for_radii) == 0
    if iterations is None and solver != "tracked" and right:
        assert len(bounded.for_radii) > 1


@pytest.mark.parametrize("wrong", WRONG)
def test_fastibp_bounds_every_sample_once(wrong, monkeypatch):
    given = problem(WRONG[wrong])
    bounded = Bounded(given.images, monkeypatch)
    METHODS["fastibp"](clean_batch(given, False), EPSILON, settings("fastibp"))
    assert bounded.for_loss == [list(range(SAMPLES))]
    assert bounded.for_radii == []


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_slope_to_remember_is_that_of_the_chord(solver):
    """(R(r) - R(0)) / r at the radius trained at; a misclassified sample keeps what it had."""
    given = problem(WRONG["some wrong"])
    config = settings("acert", solver=solver)
    memory = SLOPES["some"].double()
    batch = clean_batch(given, False, memory)
    result = METHODS["acert"](batch, EPSILON, config)
    with torch.no_grad():
        ends = [
            robust_logits(batch.network, given.images, given.labels, radii, BoundOptions())
            for radii in (torch.zeros_like(result.radii), result.radii)
        ]
    true = F.one_hot(given.labels, CLASSES).bool()
    at_zero, at_radius = (end.masked_fill(true, -torch.inf).amax(1) for end in ends)
    expected = torch.where(given.right, (at_radius - at_zero) / result.radii, memory)
    torch.testing.assert_close(result.slopes, expected, rtol=1e-9, atol=0, equal_nan=True)
    assert not result.slopes.requires_grad


@pytest.mark.parametrize("iterations", [None, 0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_radii_are_as_precise_as_images_whatever_the_logits(solver, iterations):
    """Under autocast: 2/255 in bfloat16 is 1.004 times as large."""
    batch = clean_batch(problem(WRONG["some wrong"]), False)
    batch = batch._replace(logits=batch.logits.bfloat16())
    found = RADII.adaptive_radii(
        batch, 2 / 255, settings("acert", solver=solver, max_iterations=iterations)
    )
    assert found.radii.dtype == batch.images.dtype
    assert 0 < float(found.radii.max()) <= 2 / 255
