"""TAPS and STAPS: the connector, estimates by attacks, and losses by numbers worked by hand."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from ibpcore import Interval, UserError
from ibpcore.bounds.ibp import box_logits
from ibpcore.bounds.interval import between
from ibpcore.bounds.network import FoldedNetwork, split
from ibpcore.bounds.operators import RELU, Sum, run
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass, fold
from ibpcore.training.config import make_config
from ibpcore.training.methods import METHODS, CleanBatch, estimators
from ibpcore.training.methods.estimators import (
    connected,
    estimated_differences,
    latent_steps,
    worst_points,
)

PGD = importlib.import_module("ibpcore.attacks.pgd")
EPSILON = 0.1


def settings(method, **given):
    """At the end of the warm-up epsilon is 0.1."""
    fixed = {"regularizer": 0.0, "solver": "brentq", "epsilon_max": EPSILON}
    fixed |= {"attack_steps": 10, "attack_step_size": 0.4, "attack_restarts": 2}
    return make_config("digits", method, **{**fixed, "kappa": 0.0, "taps_weight": 4.0, **given})


def clean_batch(model, images, labels, **given):
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.dim() == 1:
        images = images.view(-1, 1, 1, 1).to(next(model.parameters()))
    logits, network = clean_pass(model, images)
    return CleanBatch(
        network, logits, images, labels, torch.full((len(images),), torch.nan), **given
    )


def two_latents(second=1.0, biases=(0.0, -0.5, -0.3), scale=1.0):
    """f = (0, h_1 - h_2, h_2 - h_1) + biases of h = relu((x, second x)), times `scale`.

    The classifier computes 2 h_1 - h_1 - h_2 with a relu each, all active, so its bounds over
    boxes are wider than what an attack finds.
    """
    model = IntervalSequential(
        *(IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU()),
        *(IntervalLinear(2, 3), IntervalReLU(), IntervalLinear(3, 3)),
    ).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [second]]))
        model[1].bias.zero_()
        model[3].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        model[3].bias.zero_()
        out = [[0.0, 0.0, 0.0], [2.0, -1.0, -1.0], [-2.0, 1.0, 1.0]]
        model[5].weight.copy_(scale * torch.tensor(out, dtype=torch.float64))
        model[5].bias.copy_(scale * torch.tensor(biases, dtype=torch.float64))
    return model


def cross_entropy(*others):
    """That of logits 0 (the label's) and `others`."""
    return math.log1p(sum(math.exp(x) for x in others))


def random_network(classes=4, seed=0):
    torch.manual_seed(seed)
    return cnn7((1, 8, 8), classes, width=3, hidden=8).train()


@pytest.fixture
def from_the_middle(monkeypatch):
    monkeypatch.setattr(PGD, "_random", lambda box, generator: box.mid)


class TestSplit:
    @pytest.mark.parametrize(("size", "place"), [(1, 10), (2, 8), (3, 6), (5, 2), (6, 0)])
    def test_a_cnn7(self, size, place):
        """Five convolutions with their relus, then flatten, linear, batch norm, relu, linear."""
        network = fold(random_network().eval())
        features, classifier = split(network, size)
        assert len(features.operators) == place
        relus = [sum(x == RELU for x in part.operators) for part in (features, classifier)]
        assert relus == [6 - size, size]
        if place:
            assert features.operators[-1] == RELU
        images = torch.rand(3, 1, 8, 8)
        assert torch.equal(classifier(features(images)), network(images))

    def test_a_fork_is_not_cut(self):
        fork = Sum((RELU, RELU), ())
        network = FoldedNetwork((RELU, fork, RELU))
        for size, expected in ((1, 2), (2, 1), (3, 1), (4, 0)):
            features, classifier = split(network, size)
            assert features.operators == network.operators[:expected]
            assert classifier.operators == network.operators[expected:]

    @pytest.mark.parametrize("size", [7, 100])
    def test_too_few_layers(self, size):
        with pytest.raises(UserError, match=f"classifier_size must be at most 6, .* but is {size}"):
            split(fold(random_network().eval()), size)

    def test_a_linear_network(self):
        with pytest.raises(UserError, match="without nonlinear layers"):
            split(FoldedNetwork(()), 1)


class TestConnector:
    PLACES = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])  # of points in their boxes, 1 the upper end
    LOWER = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0])
    UPPER = torch.tensor([0.0, 0.0, 0.0, 0.25, 1.0])

    def test_by_hand(self):
        """Boxes [1, 5]: the gradient of an end is that of the points times these shares."""
        mid, rad = torch.full((1, 5), 3.0), torch.full((1, 5), 2.0)
        lower, upper = (mid - rad).requires_grad_(), (mid + rad).requires_grad_()
        points = (mid + rad * self.PLACES)[:, None]
        found = connected(between(lower, upper), points)
        assert torch.equal(found, points)
        given = torch.tensor([3.0, -2.0, 5.0, 4.0, -1.0])
        found.backward(given.view(1, 1, 5))
        torch.testing.assert_close(lower.grad[0], given * self.LOWER)
        torch.testing.assert_close(upper.grad[0], given * self.UPPER)

    def test_the_points_of_a_box_add_up(self):
        lower, upper = (
            torch.tensor([[1.0]]).requires_grad_(),
            torch.tensor([[5.0]]).requires_grad_(),
        )
        points = (3 + 2 * self.PLACES).view(1, 5, 1)
        connected(between(lower, upper), points).sum().backward()
        assert (lower.grad.item(), upper.grad.item()) == (1.5, 1.25)

    def test_a_box_without_width_is_a_point(self):
        """Both ends are the point: its gradient goes to the middle, in full."""
        mid, rad = torch.tensor([[2.0, -1.0]]).requires_grad_(), torch.zeros(1, 2).requires_grad_()
        connected(Interval(mid=mid, rad=rad), mid.detach()[:, None]).sum().backward()
        assert (mid.grad.tolist(), rad.grad.tolist()) == ([[1, 1]], [[0, 0]])


class TestEstimates:
    def test_steps(self):
        assert latent_steps(5, 0.8) == (0.8,) * 5
        assert latent_steps(10, 0.5) == (0.5,) * 7 + (0.1,) * 3

    def box(self, size):
        model, images = random_network(), torch.rand(7, 1, 8, 8)
        features, classifier = split(clean_pass(model, images)[1], size)
        return classifier, features(Interval.ball(images, 0.05))

    @pytest.mark.parametrize("size", [1, 2, 6])
    def test_between_the_middle_and_the_bounds(self, size):
        classifier, box = self.box(size)
        labels = torch.arange(7) % 4
        found = estimated_differences(classifier, box, labels, 4, settings("taps"))
        bounds = box_logits(classifier, box, labels, BoundOptions())
        logits = classifier(box.mid)
        middle = logits - logits.gather(1, labels[:, None])
        rounding = 1e-5
        assert (found <= bounds + rounding).all()
        assert (found >= middle - rounding).all()
        assert (found > middle + 1e-3).any()
        assert torch.equal(found.gather(1, labels[:, None]), torch.zeros(7, 1))
        for row in torch.rand(50, *box.mid.shape):
            sampled = classifier(box.mid + (2 * row - 1) * box.rad)
            sampled = sampled - sampled.gather(1, labels[:, None])
            assert (found >= sampled - 0.02).all()

    @pytest.mark.parametrize("size", [1, 2, 6])
    def test_points_lie_in_the_box(self, size):
        classifier, box = self.box(size)
        labels = torch.arange(7) % 4
        others = (labels[:, None] + torch.arange(1, 4)) % 4
        points = worst_points(classifier, box, labels, others, settings("taps"))
        assert points.shape == (7, 3, *box.shape[1:])
        assert (points >= box.lower[:, None]).all()
        assert (points <= box.upper[:, None]).all()

    def test_a_point_for_each_class(self):
        """Over [0.4, 0.6]^2, h_1 - h_2 is largest at (0.6, 0.4), and h_2 - h_1 at (0.4, 0.6)."""
        features, classifier = split(fold(two_latents().eval()), 1)
        box = features(Interval.ball(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.1))
        points = worst_points(
            classifier, box, torch.tensor([0]), torch.tensor([[1, 2]]), settings("taps")
        )
        expected = torch.tensor([[[0.6, 0.4], [0.4, 0.6]]], dtype=torch.float64)
        torch.testing.assert_close(points, expected)

    @pytest.mark.parametrize("budget", [1, 100_000])
    def test_in_chunks(self, budget, monkeypatch, from_the_middle):
        classifier, box = self.box(2)
        labels = torch.arange(7) % 4
        whole = estimated_differences(classifier, box, labels, 4, settings("taps"))
        calls = []
        counted = estimators.pgd
        monkeypatch.setattr(estimators, "default_budget", lambda device: budget)
        monkeypatch.setattr(
            estimators, "pgd", lambda *a, **k: calls.append(len(a[2])) or counted(*a, **k)
        )
        found = estimated_differences(classifier, box, labels, 4, settings("taps"))
        assert sum(calls) == 21
        assert len(calls) > 1
        torch.testing.assert_close(found, whole)


class TestLoss:
    """x = 0.5, label 0, epsilon 0.1: latents [0.4, 0.6]^2.

    Attacks find 0.6 - 0.4 for h_1 - h_2 and h_2 - h_1, IBP 2 * 0.6 - 0.4 - 0.4 for both. Biases
    of -0.5 and -0.3 come on top.
    """

    TAPS = cross_entropy(0.2 - 0.5, 0.2 - 0.3)
    IBP = cross_entropy(0.4 - 0.5, 0.4 - 0.3)

    def test_by_hand(self):
        batch = clean_batch(two_latents(), [0.5], [0])
        result = METHODS["taps"](batch, EPSILON, settings("taps"))
        assert result.loss.item() == pytest.approx(self.TAPS * self.IBP, rel=1e-12)
        assert result.radii.tolist() == pytest.approx([EPSILON])

    @pytest.mark.parametrize("weight", [1.0, 4.0])
    def test_gradients_by_hand(self, weight):
        """w L_IBP dL_TAPS + L_TAPS dL_IBP. Attacks end at corners, so that the connector is exact.

        With p the probabilities: by the weights of h, of which the ends are 0.6 and 0.4 times
        them, TAPS has p_1 (0.6, -0.4) + p_2 (-0.4, 0.6); IBP p_1 (1.2 - 0.4, -0.4) + p_2 (0.6
        - 0.8, 0.6). By the second row of the last weights, TAPS has p_1 (0.6, 0.6, 0.4); IBP
        p_1 (0.6, 0.4, 0.4).
        """
        model = two_latents()
        batch = clean_batch(model, [0.5], [0])
        METHODS["taps"](batch, EPSILON, settings("taps", taps_weight=weight)).loss.backward()
        taps, ibp = (
            torch.tensor([0, *others], dtype=torch.float64).softmax(0)[1:]
            for others in ((-0.3, -0.1), (-0.1, 0.1))
        )
        rows = {
            model[1].weight: ([[0.6, -0.4], [-0.4, 0.6]], [[0.8, -0.4], [-0.2, 0.6]]),
            model[5].weight: ([[0.6, 0.6, 0.4], [0.0] * 3], [[0.6, 0.4, 0.4], [0.0] * 3]),
        }
        for parameter, (by_attack, by_ibp) in rows.items():
            by_attack, by_ibp = (torch.tensor(x, dtype=torch.float64) for x in (by_attack, by_ibp))
            expected = weight * self.IBP * (taps @ by_attack) + self.TAPS * (ibp @ by_ibp)
            found = parameter.grad[:, 0] if parameter is model[1].weight else parameter.grad[1]
            torch.testing.assert_close(found, expected)

    def test_a_mean_over_the_batch_before_the_product(self):
        """0.5 and 0.9, whose ball is [0.8, 1]: of the same width."""
        loss = METHODS["taps"](
            clean_batch(two_latents(), [0.5, 0.9], [0, 0]), EPSILON, settings("taps")
        ).loss
        assert loss.item() == pytest.approx(self.TAPS * self.IBP)
        # Label 1 of the second: its own f_1 is lower by 0.5, and f_2 - f_1 = 2 (h_2 - h_1) + 0.2.
        taps = (self.TAPS + cross_entropy(0.2 + 0.5, 0.4 + 0.2)) / 2
        ibp = (self.IBP + cross_entropy(0.4 + 0.5, 0.8 + 0.2)) / 2
        loss = METHODS["taps"](
            clean_batch(two_latents(), [0.5, 0.9], [0, 1]), EPSILON, settings("taps")
        ).loss
        assert loss.item() == pytest.approx(taps * ibp)

    def test_staps_by_hand(self):
        """h = (x, x / 2): f_1 rises with x, to 0.6. The box of size 0.4 is [0.52, 0.6]."""
        model = two_latents(second=0.5, biases=(0.0, -0.2, -2.0))
        taps = cross_entropy(0.6 - 0.26 - 0.2, 0.3 - 0.52 - 2)
        ibp = cross_entropy(1.2 - 0.52 - 0.26 - 0.2, 0.6 + 0.3 - 1.04 - 2)
        config = settings("staps", box_size=0.4)
        result = METHODS["staps"](clean_batch(model, [0.5], [0]), EPSILON, config)
        assert result.loss.item() == pytest.approx(taps * ibp, rel=1e-9)

    def test_shrinkage_by_hand(self):
        """relu(x - 0.45), of [-0.05, 0.15], has its top at 0.8 * 0.15 = 0.12, to attacks too."""
        model = two_latents()
        with torch.no_grad():
            model[1].bias.copy_(torch.tensor([-0.45, 0.0], dtype=torch.float64))
        taps = cross_entropy(0.12 - 0.4 - 0.5, 0.6 - 0.3)
        ibp = cross_entropy(0.24 - 0.4 - 0.5, 0.12 + 0.6 - 0.3)
        config = settings("taps", relu_shrinkage=0.2)
        result = METHODS["taps"](clean_batch(model, [0.5], [0]), EPSILON, config)
        assert result.loss.item() == pytest.approx(taps * ibp, rel=1e-7)

    def test_kappa_mixes_in_the_standard_loss(self):
        config = settings("taps", kappa=0.3)
        result = METHODS["taps"](clean_batch(two_latents(), [0.5], [0]), EPSILON, config)
        expected = 0.3 * cross_entropy(-0.5, -0.3) + 0.7 * self.TAPS * self.IBP
        assert result.loss.item() == pytest.approx(expected)

    @pytest.mark.parametrize("method", ["taps", "staps"])
    @pytest.mark.parametrize("biases", [(0.0, -9.0, -9.0), (0.0, -0.3, -0.3)])
    def test_losses_of_0_have_finite_gradients(self, method, biases):
        """Scale 1000: both are 0, or of the second the attacks' alone, with margins 0.2 - 0.3."""
        model = two_latents(biases=biases, scale=1e3)
        result = METHODS[method](clean_batch(model, [0.5], [0]), EPSILON, settings(method))
        assert result.loss.item() == pytest.approx(0, abs=1e-12)
        for part in torch.autograd.grad(result.loss, tuple(model.parameters())):
            assert part.abs().max().item() == pytest.approx(0, abs=1e-12)

    def test_an_overflow_is_not_hidden(self):
        model = two_latents(scale=1e308)
        result = METHODS["taps"](clean_batch(model, [0.5], [0]), EPSILON, settings("taps"))
        assert not result.loss.isfinite()


class TestWarmup:
    @pytest.mark.parametrize(("method", "other"), [("taps", "fastibp"), ("staps", "sabr")])
    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_it_is_the_ibp_loss(self, method, other, share):
        """Loss and gradient, to the last bit: those of FastIBP and of SABR."""
        found = []
        for name in (method, other):
            model = random_network()
            torch.manual_seed(1)
            batch = clean_batch(model, torch.rand(9, 1, 8, 8), torch.arange(9) % 4)
            attack = {"attack_steps": 3, "attack_step_size": 0.5, "attack_restarts": 2}
            given = {} if name == "fastibp" else attack
            config = make_config("digits", name, regularizer=0.0, **given)
            result = METHODS[name](batch, share * config.epsilon_max, config)
            found.append(
                [result.loss, *torch.autograd.grad(result.loss, tuple(model.parameters()))]
            )
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)

    def test_shrinkage(self):
        """As SABR of the whole ball."""
        losses = []
        for method, given in (("taps", {}), ("sabr", {"box_size": 1.0})):
            batch = clean_batch(random_network(), torch.rand(9, 1, 8, 8), torch.arange(9) % 4)
            config = (
                settings(method, relu_shrinkage=0.2, **given)
                if method == "taps"
                else (make_config("digits", method, regularizer=0.0, relu_shrinkage=0.2, **given))
            )
            losses.append(METHODS[method](batch, 0.05, config).loss)
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("method", ["taps", "staps"])
class TestAdaptive:
    def batch(self):
        model = random_network()
        torch.manual_seed(1)
        images = torch.rand(9, 1, 8, 8)
        labels = clean_pass(model, images, track=False)[0].argmax(1)
        labels[::3] = (labels[::3] + 1) % 4
        return clean_batch(model, images, labels)

    def test_loss_by_its_formula(self, method, from_the_middle):
        """Misclassified samples have their clean differences in both factors."""
        config = (
            settings(method, adaptive=True, box_size=0.4)
            if method == "staps"
            else (settings(method, adaptive=True))
        )
        batch = self.batch()
        result = METHODS[method](batch, EPSILON, config)
        acert = make_config("digits", "acert", regularizer=0.0, solver="brentq")
        assert torch.equal(result.radii, METHODS["acert"](batch, EPSILON, acert).radii)
        assert (result.radii > 0).sum() == 6

        whole = Interval.ball(batch.images, result.radii)
        if method == "staps":
            sizes = PGD.decaying_steps(10, 0.4)
            attacked = PGD.pgd(
                batch.network, whole, batch.labels, sizes, objective=PGD.cross_entropy
            ).images
            rad = 0.4 * whole.rad
            slack = whole.rad - rad
            whole = Interval(mid=attacked.clamp(whole.mid - slack, whole.mid + slack), rad=rad)
        features, classifier = split(batch.network, config.classifier_size)
        latent = run(features.operators, whole)
        factors = [
            F.cross_entropy(x, batch.labels)
            for x in (
                estimated_differences(classifier, latent, batch.labels, 4, config),
                box_logits(classifier, latent, batch.labels, BoundOptions()),
            )
        ]
        torch.testing.assert_close(result.loss, factors[0] * factors[1], rtol=1e-4, atol=1e-6)

    def test_without_any_ball(self, method):
        """All misclassified: both factors are the standard loss."""
        batch = clean_batch(two_latents(), [0.5, 0.3], [1, 1])
        result = METHODS[method](batch, EPSILON, settings(method, adaptive=True))
        standard = F.cross_entropy(batch.logits, batch.labels)
        torch.testing.assert_close(result.loss, standard**2)
        assert result.radii.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["taps", "staps"])
def test_without_epsilon_it_is_the_standard_loss(method):
    model = random_network()
    batch = clean_batch(model, torch.rand(9, 1, 8, 8), torch.arange(9) % 4)
    result = METHODS[method](batch, 0.0, settings(method))
    torch.testing.assert_close(result.loss, F.cross_entropy(batch.logits, batch.labels))
