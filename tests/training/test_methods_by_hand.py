"""SABR, the expressive losses and losses by other bounds than IBP's, by numbers worked by hand;
adaptive radii for all methods."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from ibpcore import Interval
from ibpcore.bounds.interval import between
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.operators import Relu, Sum
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass
from ibpcore.training.config import make_config
from ibpcore.training.methods import METHODS, CleanBatch
from ibpcore.training.methods.base import kappa_at
from ibpcore.training.methods.sabr import ShrinkingRelu, shrinking, small_box
from ibpcore.training.regularizers import Sums, activation_sums, warmup_regularizer

ADVERSARIAL = importlib.import_module("ibpcore.training.methods.adversarial")
EXPRESSIVE = ("mtl-ibp", "cc-ibp", "exp-ibp")
BOUNDED = ("ibp", "fastibp", "sabr", *EXPRESSIVE)
EPSILON = 0.1


def settings(method, **overrides):
    return make_config("digits", method, **{"regularizer": 0.0, "solver": "brentq", **overrides})


def hidden_model(weight, bias, out, out_bias):
    """f_0 = 0 and f_1 = out relu(weight x + bias) + out_bias on images of one pixel."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU(), IntervalLinear(2, 2)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weight)[:, None])
        model[1].bias.copy_(torch.tensor(bias))
        model[3].weight.copy_(torch.tensor([[0.0, 0.0], out]))
        model[3].bias.copy_(torch.tensor([0.0, out_bias]))
    return model


def clean_batch(model, images, labels, relu_inputs=None):
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.dim() == 1:
        images = images.view(-1, 1, 1, 1)
    logits, network = clean_pass(model, images)
    slopes = torch.full((len(images),), torch.nan)
    return CleanBatch(network, logits, images, labels, slopes, relu_inputs)


def twice_less_once(scale=1.0):
    """f_1 - f_0 = 2 x - x - 1 = x - 1, bounded over [l, u] by 2 u - l - 1; times `scale`.

    Label 0 for 0.5 and 0.95, radius 0.1: balls [0.4, 0.6] and, clipped, [0.85, 1].
    """
    model = hidden_model([1.0, 1.0], [0.0, 0.0], [-scale, 2 * scale], -scale)
    return clean_batch(model, [0.5, 0.95], [0, 0])


CLEAN = torch.tensor([-0.5, -0.05])
ATTACKED = torch.tensor([-0.4, 0.0])  # at the upper ends
BOUNDS = torch.tensor([-0.2, 0.15])  # 1.2 - 0.4 - 1 and 2 - 0.85 - 1
SMALL = torch.tensor([-0.32, 0.06])  # of size 0.4: [0.52, 0.6] and [0.94, 1]


def mean_loss(values):
    return F.softplus(values).mean()


def loss_and_gradient(method, batch, model, epsilon, config):
    torch.manual_seed(0)
    loss = METHODS[method](batch, epsilon, config).loss
    return loss, torch.autograd.grad(loss, tuple(model.parameters()))


def random_batch(samples=12):
    """A network in training mode on images of which it knows some."""
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=3, hidden=8).train()
    images = torch.rand(samples, 1, 8, 8)
    labels = clean_pass(model, images, track=False)[0].argmax(1)
    labels[::3] = (labels[::3] + 1) % 3
    return model, images, labels


class TestSmallBox:
    def test_by_hand(self):
        """Pixels 0.1 and 0.5, radius 0.2: [0, 0.3] and [0.3, 0.7]; size 0.4: 0.06 and 0.08."""
        whole = Interval.ball(torch.tensor([0.1, 0.5]).view(1, 1, 1, 2).expand(4, 1, 1, 2), 0.2)
        center = torch.tensor([[0.0, 0.3], [0.1, 0.5], [0.25, 0.61], [0.3, 0.7]])
        box = small_box(whole, center.view(4, 1, 1, 2), 0.4)
        torch.testing.assert_close(box.rad, torch.tensor([0.06, 0.08]).expand_as(box.rad))
        expected = torch.tensor([[0.06, 0.38], [0.1, 0.5], [0.24, 0.61], [0.24, 0.62]])
        torch.testing.assert_close(box.mid.flatten(1), expected)

    @pytest.mark.parametrize("size", [0.01, 0.4, 0.9, 1.0])
    def test_inside_the_ball_and_as_near_as_can_be(self, size):
        """Sampled boxes: all that fit are at least as far from the centre asked for."""
        torch.manual_seed(0)
        images = torch.rand(64, 1, 4, 4).mul(1.4).sub(0.2).clamp(0, 1)
        whole = Interval.ball(images, torch.rand(64) * 0.5)
        center = whole.mid + (2 * torch.rand_like(images) - 1) * whole.rad
        box = small_box(whole, center, size)
        rounding = 1e-7
        assert torch.equal(box.rad, size * whole.rad)
        assert (box.lower >= whole.lower - rounding).all()
        assert (box.upper <= whole.upper + rounding).all()
        assert box.lower.min() >= -rounding
        assert box.upper.max() <= 1 + rounding
        distance = (box.mid - center).abs()
        for _ in range(50):
            other = whole.mid + (2 * torch.rand_like(images) - 1) * (whole.rad - box.rad)
            assert (distance <= (other - center).abs() + rounding).all()
        # A box whose centre fits stays where it was asked for.
        fits = (center - whole.mid).abs() <= whole.rad - box.rad
        assert torch.equal(box.mid[fits], center[fits])

    def test_the_whole_ball_has_only_one_place(self):
        whole = Interval.ball(torch.rand(5, 1, 4, 4), 0.3)
        box = small_box(whole, whole.upper, 1.0)
        assert torch.equal(box.mid, whole.mid)
        assert torch.equal(box.rad, whole.rad)


class TestSabr:
    def test_by_hand(self):
        config = settings("sabr", box_size=0.4)
        result = METHODS["sabr"](twice_less_once(), EPSILON, config)
        torch.testing.assert_close(result.loss, mean_loss(SMALL))
        torch.testing.assert_close(result.radii, torch.full((2,), EPSILON))

    def test_a_box_of_size_1_is_ibp(self):
        """Loss and gradient, to the last bit."""
        results = {}
        for method in ("fastibp", "sabr"):
            model, images, labels = random_batch()
            batch = clean_batch(model, images, labels)
            config = settings(method, box_size=1.0)
            results[method] = loss_and_gradient(method, batch, model, 0.03, config)
        assert torch.equal(results["sabr"][0], results["fastibp"][0])
        for one, other in zip(results["sabr"][1], results["fastibp"][1], strict=True):
            assert torch.equal(one, other)

    def test_smaller_boxes_lose_less(self):
        losses = []
        for size in (0.05, 0.4, 0.7, 1.0):
            model, images, labels = random_batch()
            batch = clean_batch(model, images, labels)
            config = settings("sabr", box_size=size)
            losses.append(loss_and_gradient("sabr", batch, model, 0.03, config)[0].item())
        assert losses == sorted(losses)
        assert losses[0] < losses[-1]

    @pytest.mark.parametrize(("shrinkage", "top"), [(0.0, 3.0), (0.2, 2.4), (0.5, 1.5)])
    def test_only_unstable_neurons_shrink(self, shrinkage, top):
        """[-1, 3] loses a share at the top; always active (from 0 on) and inactive ones none."""
        x = between(
            torch.tensor([-1.0, 1.0, 0.0, -3.0, -3.0]), torch.tensor([3.0, 3.0, 2.0, -1.0, 0.0])
        )
        y = ShrinkingRelu(shrinkage)(x)
        torch.testing.assert_close(y.lower, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))
        torch.testing.assert_close(y.upper, torch.tensor([top, 3.0, 2.0, 0.0, 0.0]))
        points = torch.tensor([-1.0, 2.0])
        assert torch.equal(ShrinkingRelu(shrinkage)(points), F.relu(points))

    def test_shrinkage_in_a_loss_by_hand(self):
        """f_1 - f_0 = relu(x - 0.5) + relu(x) - 1 over [0.4, 0.6].

        Of the whole ball the first neuron is in [-0.1, 0.1], the top 0.1 of it becomes
        0.08: 0.08 + 0.6 - 1. Of the box [0.52, 0.6] it is active: 0.1 + 0.6 - 1.
        """
        model = hidden_model([1.0, 1.0], [-0.5, 0.0], [1.0, 1.0], -1.0)
        for size, worst in ((1.0, -0.32), (0.4, -0.3)):
            config = settings("sabr", box_size=size, relu_shrinkage=0.2)
            result = METHODS["sabr"](clean_batch(model, [0.5], [0]), EPSILON, config)
            torch.testing.assert_close(result.loss, mean_loss(torch.tensor([worst])))

    def test_every_relu_shrinks_also_in_a_branch(self):
        operators = twice_less_once().network.operators
        both, last = shrinking(FoldedNetwork((Sum(operators, operators), Relu())), 0.2).operators
        relus = [x for x in (*both.branch, *both.shortcut, last) if isinstance(x, Relu)]
        assert [relu.shrinkage for relu in relus] == [0.2] * 3

    def test_the_regularizer_sees_the_small_box(self):
        """As published: tightness is that of what was bounded, pixel intervals of 0.08."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -1.0)
        batch = clean_batch(model, [0.5], [0], relu_inputs=[torch.tensor([[0.5, 0.5]])])
        result = METHODS["sabr"](batch, EPSILON, settings("sabr", box_size=0.4))
        torch.testing.assert_close(result.activations.first.rad.flatten(), torch.tensor([0.04]))
        hidden = Sums(*result.activations.bounded[0])
        torch.testing.assert_close(hidden.mid - hidden.rad, torch.tensor(2 * 0.52))
        # As wide inside as outside; no neuron is off: q_mean = 0; q_var = 0 / 0, left out.
        assert warmup_regularizer(activation_sums(result.activations)).item() == pytest.approx(1)


class TestExpressiveLosses:
    @pytest.mark.parametrize("alpha", [0.0, 0.08, 0.5, 1.0])
    def test_by_hand(self, alpha):
        attacked, bounds = mean_loss(ATTACKED), mean_loss(BOUNDS)
        expected = {
            "mtl-ibp": (1 - alpha) * attacked + alpha * bounds,
            "cc-ibp": mean_loss((1 - alpha) * ATTACKED + alpha * BOUNDS),
            "exp-ibp": attacked ** (1 - alpha) * bounds**alpha,
        }
        for method in EXPRESSIVE:
            config = settings(method, ibp_weight=alpha)
            result = METHODS[method](twice_less_once(), EPSILON, config)
            torch.testing.assert_close(result.loss, expected[method])
            torch.testing.assert_close(result.radii, torch.full((2,), EPSILON))

    @pytest.mark.parametrize("method", EXPRESSIVE)
    def test_alpha_1_is_ibp(self, method):
        """Loss and gradient of `fastibp`."""
        model, images, labels = random_batch()
        batch = clean_batch(model, images, labels)
        expected = loss_and_gradient("fastibp", batch, model, 0.03, settings("fastibp"))
        batch = clean_batch(model, images, labels)
        config = settings(method, ibp_weight=1.0)
        found = loss_and_gradient(method, batch, model, 0.03, config)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("method", EXPRESSIVE)
    def test_alpha_0_is_adversarial_training(self, method):
        """Loss and gradient of the cross-entropy at the points that an attack finds."""
        model, images, labels = random_batch()
        torch.manual_seed(0)
        batch = clean_batch(model, images, labels)
        box = Interval.ball(images, 0.03)
        points = ADVERSARIAL.pgd(
            batch.network, box, labels, (10.0,), objective=ADVERSARIAL.cross_entropy
        ).images
        loss = F.cross_entropy(batch.network(points), labels)
        expected = loss, torch.autograd.grad(loss, tuple(model.parameters()))
        batch = clean_batch(model, images, labels)
        config = settings(method, ibp_weight=0.0)
        found = loss_and_gradient(method, batch, model, 0.03, config)
        torch.testing.assert_close(found, expected)
        assert found[0] > F.cross_entropy(batch.logits, labels)

    @pytest.mark.parametrize("method", EXPRESSIVE)
    def test_the_attack_may_go_further_than_the_bounds(self, method):
        """Scale 2: the ball [0.3, 0.7], worst at 0.7, with the bounds of [0.4, 0.6]."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -1.0)
        batch = clean_batch(model, [0.5], [0])
        attacked, bounds = F.softplus(torch.tensor([[-0.3], [-0.2]]))
        expected = {
            "mtl-ibp": 0.7 * attacked + 0.3 * bounds,
            "cc-ibp": F.softplus(torch.tensor([0.7 * -0.3 + 0.3 * -0.2])),
            "exp-ibp": attacked**0.7 * bounds**0.3,
        }
        config = settings(method, ibp_weight=0.3, attack_scale=2.0)
        result = METHODS[method](batch, EPSILON, config)
        torch.testing.assert_close(result.loss, expected[method].squeeze())
        torch.testing.assert_close(result.radii, torch.tensor([EPSILON]))

    @pytest.mark.parametrize("alpha", [0.0, 0.04, 0.5, 0.96, 1.0])
    @pytest.mark.parametrize("scale", [400.0, 60.0, 40.0, 1.0])
    @pytest.mark.parametrize("image", [0.5, 0.2])
    def test_exp_ibp_has_a_finite_gradient_near_0(self, image, scale, alpha):
        """A loss of 0 has an infinite derivative to a power below 1, and 0 * inf is NaN.

        Scale 400: at 0.2 margins of -280 and -200, both losses 0; so they are at 0.5 with
        -160 and -80. Scale 40: at 0.2 with -28 and -20 rounding makes them 0, and at 0.5
        -16 and -8 give 1e-7 and 3e-4. Scale 60: at 0.5 with -24 and -12, 0 and 6e-6.
        """
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-scale, 2 * scale], -scale)
        batch = clean_batch(model, [image], [0])
        config = settings("exp-ibp", ibp_weight=alpha)
        loss, gradient = loss_and_gradient("exp-ibp", batch, model, EPSILON, config)
        assert loss.isfinite()
        assert all(part.isfinite().all() for part in gradient)
        margins = scale * torch.tensor([image - 0.9, image - 0.7])
        logits, labels = torch.stack([torch.zeros(2), margins], 1), torch.tensor([0, 0])
        attacked, bounds = F.cross_entropy(logits, labels, reduction="none").tolist()
        assert loss.item() == pytest.approx(attacked ** (1 - alpha) * bounds**alpha, rel=1e-3)

    def test_exp_ibp_hides_no_nan(self):
        """f_1 - f_0 = 3e38 (x - x): 0, but bounded over [-0.4, 1.4] by infinity."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-3e38, 3e38], 0.0)
        config = settings("exp-ibp", clip=False)
        assert METHODS["exp-ibp"](clean_batch(model, [0.5], [0]), 0.9, config).loss.isnan()


@pytest.mark.parametrize("method", BOUNDED)
class TestKappa:
    def test_mixes_the_two_losses(self, method):
        """Eq. 11, whatever the robust loss."""
        given = {"initial_kappa": None}
        config = settings(method, kappa=0.0, **given)
        robust = METHODS[method](twice_less_once(), EPSILON, config).loss
        config = settings(method, kappa=0.3, **given)
        mixed = METHODS[method](twice_less_once(), EPSILON, config).loss
        assert robust > mean_loss(CLEAN)
        torch.testing.assert_close(mixed, 0.3 * mean_loss(CLEAN) + 0.7 * robust)

    def test_moves_with_epsilon(self, method):
        """From 1 at 0 to 1/2 at epsilon_max = 0.4; at 0.1, a quarter of the way, 0.875."""
        config = settings(method, kappa=0.0, initial_kappa=None)
        robust = METHODS[method](twice_less_once(), EPSILON, config).loss
        config = settings(method, kappa=0.5, initial_kappa=1.0, epsilon_max=0.4)
        mixed = METHODS[method](twice_less_once(), EPSILON, config).loss
        torch.testing.assert_close(mixed, 0.875 * mean_loss(CLEAN) + 0.125 * robust)
        assert [kappa_at(e, config) for e in (0.0, 0.2, 0.4)] == pytest.approx([1, 0.75, 0.5])

    def test_at_epsilon_0_all_is_the_standard_loss(self, method):
        """Whatever kappa and alpha: every ball is a point."""
        model, images, labels = random_batch()
        expected = F.cross_entropy(clean_pass(model, images)[0], labels)
        expected = expected, torch.autograd.grad(expected, tuple(model.parameters()))
        batch = clean_batch(model, images, labels)
        config = settings(method, kappa=0.25, initial_kappa=None, ibp_weight=0.3)
        result = METHODS[method](batch, 0.0, config)
        gradient = torch.autograd.grad(result.loss, tuple(model.parameters()))
        torch.testing.assert_close((result.loss, gradient), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result.radii, torch.zeros(len(images)))


class TestGowal:
    def test_the_preset(self):
        assert make_config("mnist", "ibp").schedule == "smoothed", "our choice for MNIST"
        config = make_config("cifar10", "ibp")
        assert (config.initialization, config.regularizer) == ("ibp", 0)
        assert (config.schedule, config.initial_kappa, config.kappa) == ("linear", 1, 0.5)
        assert (config.learning_rate_schedule, config.adaptive) == ("multistep", False)

    def test_by_hand(self):
        """Half of each loss at the end, 3/4 standard half-way."""
        config = settings("ibp", epsilon_max=EPSILON)
        result = METHODS["ibp"](twice_less_once(), EPSILON, config)
        torch.testing.assert_close(result.loss, (mean_loss(CLEAN) + mean_loss(BOUNDS)) / 2)
        config = settings("ibp", epsilon_max=2 * EPSILON)
        result = METHODS["ibp"](twice_less_once(), EPSILON, config)
        expected = 0.75 * mean_loss(CLEAN) + 0.25 * mean_loss(BOUNDS)
        torch.testing.assert_close(result.loss, expected)


class TestCrownIbp:
    """The hidden neurons are active, so CROWN-IBP is exact: what an attack finds."""

    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
    def test_by_hand(self, share):
        """beta falls from 1 to 0 as epsilon grows to epsilon_max = 0.1 / share."""
        config = settings("crown-ibp", epsilon_max=EPSILON / share if share else 1.0)
        beta = 1 - EPSILON / config.epsilon_max
        result = METHODS["crown-ibp"](twice_less_once(), EPSILON, config)
        torch.testing.assert_close(result.loss, mean_loss(beta * ATTACKED + (1 - beta) * BOUNDS))
        assert result.radii.tolist() == pytest.approx([EPSILON] * 2)

    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    def test_loss_fusion_by_hand(self, share):
        """IBP has f_1 - f_0 in [2 l - u - 1, 2 u - l - 1]: [-0.8, -0.2] and [-0.3, 0.15].

        The chord of exp over that, at the exact upper ends -0.4 and 0.
        """
        lower = torch.tensor([-0.8, -0.3])
        slope = (BOUNDS.exp() - lower.exp()) / (BOUNDS - lower)
        fused = (1 + lower.exp() + slope * (ATTACKED - lower)).log()
        config = settings("crown-ibp", epsilon_max=EPSILON / share, loss_fusion=True)
        result = METHODS["crown-ibp"](twice_less_once(), EPSILON, config)
        expected = (1 - share) * fused.mean() + share * mean_loss(BOUNDS)
        torch.testing.assert_close(result.loss, expected)
        assert expected >= mean_loss(ATTACKED)

    def test_it_ends_as_fastibp(self):
        """Loss and gradient, to the last bit."""
        results = {}
        for method in ("fastibp", "crown-ibp"):
            model, images, labels = random_batch()
            batch, config = clean_batch(model, images, labels), settings(method, epsilon_max=0.03)
            results[method] = loss_and_gradient(method, batch, model, 0.03, config)
        assert torch.equal(results["crown-ibp"][0], results["fastibp"][0])
        for ours, theirs in zip(results["crown-ibp"][1], results["fastibp"][1], strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("fusion", [False, True])
    def test_adaptive_radii(self, fusion):
        """0.5 has radius 1/6 by IBP, where CROWN-IBP says -1/3; label 1 is misclassified."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -1.0)
        config = settings("crown-ibp", adaptive=True, epsilon_max=1.0, loss_fusion=fusion)
        batch = clean_batch(model, [0.5, 0.5], [0, 1])
        result = METHODS["crown-ibp"](batch, 0.3, config)
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(result.radii, torch.tensor([1 / 6, 0.0]), **near)
        if not fusion:
            mixed = torch.tensor([0.7 * -1 / 3, 0.5])
            torch.testing.assert_close(result.loss, mean_loss(mixed), **near)
        assert result.loss > mean_loss(torch.tensor([-1 / 3, 0.5])) - 1e-4


def twice_hidden():
    """f_1 - f_0 = relu(z - 0.5) - 0.1 with z = relu(x) - relu(x - 0.46)."""
    model = IntervalSequential(
        *(IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU()),
        *(IntervalLinear(2, 1), IntervalReLU(), IntervalLinear(1, 2)),
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -0.46]))
        model[3].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[3].bias.copy_(torch.tensor([-0.5]))
        model[5].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[5].bias.copy_(torch.tensor([0.0, -0.1]))
    return model


class TestTrainBound:
    @pytest.mark.parametrize(
        ("bound", "worst"),
        [
            ("ibp", 0.0),
            ("crown-ibp", 0.2 * 0.1 / 0.34 - 0.1),
            ("crown", -0.1),
            ("alpha-crown", -0.1),
        ],
    )
    def test_by_hand(self, bound, worst):
        """x in [0.4, 0.6]: to IBP z - 0.5 is in [-0.24, 0.1], so f_1 - f_0 is at most 0.

        CROWN-IBP: below the line through (-0.24, 0) and (0.1, 0.1). The lower line of
        relu(x - 0.46) on [-0.06, 0.14] is x - 0.46, so z - 0.5 is at most -0.04. CROWN knows
        that already where it relaxes the second relu, which is 0.
        """
        batch = clean_batch(twice_hidden(), [0.5], [0])
        result = METHODS["fastibp"](batch, EPSILON, settings("fastibp", train_bound=bound))
        torch.testing.assert_close(result.loss, F.softplus(torch.tensor(worst)))

    @pytest.mark.parametrize(("bias", "worst", "slope"), [(-0.46, -0.04, 1.0), (-0.54, 0.1, 0.0)])
    def test_gradients_by_hand(self, bias, worst, slope):
        """f_1 - f_0 = x - relu(x + bias) - 0.5: the lower line of the relu is x + bias on
        [-0.06, 0.14] and 0 on [-0.14, 0.06], with a slope that is a constant to the gradient."""
        model = hidden_model([1.0, 1.0], [0.0, bias], [1.0, -1.0], -0.5)
        config = settings("fastibp", train_bound="crown")
        batch = clean_batch(model, [0.5], [0])
        loss, gradient = loss_and_gradient("fastibp", batch, model, EPSILON, config)
        worst = torch.tensor(worst)
        torch.testing.assert_close(loss, F.softplus(worst))
        torch.testing.assert_close(gradient[1], worst.sigmoid() * torch.tensor([1.0, -slope]))

    @pytest.mark.parametrize("method", ["ibp", "fastibp", *EXPRESSIVE])
    def test_every_method_that_takes_it(self, method):
        """Where all neurons are active, CROWN finds what an attack does."""
        given = {"kappa": 0.0, "initial_kappa": None, "train_bound": "crown"}
        result = METHODS[method](twice_less_once(), EPSILON, settings(method, **given))
        torch.testing.assert_close(result.loss, mean_loss(ATTACKED))

    def test_radii_are_searched_for_by_the_same_bound(self):
        """f_1 - f_0 = x - 0.8 has its root at 0.3, to IBP, which adds 2 r, at 0.1."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -0.8)
        for bound, radius in (("ibp", 0.1), ("crown", 0.3), ("alpha-crown", 0.3)):
            for solver in ("brentq", "tracked"):
                config = settings("acert", train_bound=bound, solver=solver, epsilon_max=1.0)
                result = METHODS["acert"](clean_batch(model, [0.5, 0.5], [0, 1]), 0.4, config)
                near = {"rtol": 1e-3, "atol": 1e-3}
                torch.testing.assert_close(result.radii, torch.tensor([radius, 0.0]), **near)
                expected = mean_loss(torch.tensor([0.0, 0.3]))
                torch.testing.assert_close(result.loss, expected, **near)

    @pytest.mark.parametrize("bound", ["crown-ibp", "crown", "alpha-crown"])
    def test_at_epsilon_0_there_is_nothing_to_bound(self, bound):
        for method in ("fastibp", "acert"):
            config = settings(method, train_bound=bound)
            result = METHODS[method](twice_less_once(), 0.0, config)
            torch.testing.assert_close(result.loss, mean_loss(CLEAN))
            assert result.radii.tolist() == [0, 0]

    @pytest.mark.parametrize("bound", ["crown-ibp", "crown", "alpha-crown"])
    def test_the_regularisers_are_those_of_ibp(self, bound):
        found = {}
        for name in ("ibp", bound):
            model, images, labels = random_batch()
            inputs = [torch.zeros(len(images), 1)]
            batch = clean_batch(model, images, labels, relu_inputs=inputs)
            config = settings("fastibp", train_bound=name)
            seen = METHODS["fastibp"](batch, 0.03, config).activations
            found[name] = warmup_regularizer(activation_sums(seen))
        assert found["ibp"] > 0
        assert found[bound].requires_grad
        assert torch.equal(found[bound], found["ibp"])


@pytest.mark.parametrize("method", ["sabr", "crown-ibp"])
def test_a_guess_that_nothing_corrected_is_not_remembered(method):
    """With no iterations a sample that was never visited is trained at epsilon, ever again."""
    model, images, labels = random_batch()
    batch = clean_batch(model, images, labels)
    config = settings(method, adaptive=True, solver="tracked", max_iterations=0, epsilon_max=0.2)
    assert METHODS[method](batch, 0.1, config).slopes.isnan().all()
    config = settings(method, adaptive=True, solver="tracked", epsilon_max=0.2)
    assert METHODS[method](batch, 0.1, config).slopes.isfinite().any()


@pytest.mark.parametrize("method", [*BOUNDED, "taps", "staps"])
class TestAdaptive:
    def settings(self, method, **given):
        kappas = {"kappa": 0.0, "initial_kappa": None}
        return settings(method, adaptive=True, ibp_weight=0.5, **kappas, **given)

    @pytest.mark.parametrize("given", [{}, {"max_iterations": 0}, {"solver": "fused"}], ids=str)
    def test_radii_are_those_of_acert(self, method, given):
        model, images, labels = random_batch()
        for epsilon in (0.005, 0.1):
            batch = clean_batch(model, images, labels)
            expected = METHODS["acert"](batch, epsilon, settings("acert", **given)).radii
            found = METHODS[method](batch, epsilon, self.settings(method, **given)).radii
            assert torch.equal(found, expected)
            assert 0 < (expected > 0).sum() < len(images)

    def test_by_hand(self, method):
        """0.5 has R(r) = 0.5 + 3 r - 1: radius 1/6, where the bound is 0, the worst -1/3.

        The box of size 0.4 at 2/3 is [0.5333, 0.6667]: 4/3 - 8/15 - 1 = -0.2.
        """
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -1.0)
        attacked, bounds, small = F.softplus(torch.tensor([[-1 / 3], [0.0], [-0.2]]))
        expected = {
            "ibp": bounds,
            "fastibp": bounds,
            "sabr": small,
            "mtl-ibp": (attacked + bounds) / 2,
            "cc-ibp": F.softplus(torch.tensor([-1 / 6])),
            "exp-ibp": (attacked * bounds) ** 0.5,
            "taps": attacked * bounds,
            "staps": attacked * small,
        }
        config = self.settings(method, box_size=0.4)
        result = METHODS[method](clean_batch(model, [0.5], [0]), 0.3, config)
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(result.radii, torch.tensor([1 / 6]), **near)
        torch.testing.assert_close(result.loss, expected[method].squeeze(), **near)

    def test_misclassified_samples_have_their_clean_loss(self, method):
        """Label 1 for 0.5: f_0 - f_1 = 0.5, radius 0, softplus(0.5). Beside it one at 0.1."""
        model = hidden_model([1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], -1.0)
        wrong = F.softplus(torch.tensor(0.5))
        factors = 2 if method in ("taps", "staps") else 1
        result = METHODS[method](clean_batch(model, [0.5], [1]), EPSILON, self.settings(method))
        torch.testing.assert_close(result.loss, wrong**factors)
        assert result.radii.tolist() == [0]

        both = clean_batch(model, [0.5, 0.5], [1, 0])
        attacked, bounds, small = torch.tensor([[0.5, -0.4], [0.5, -0.2], [0.5, -0.32]])
        expected = {
            "ibp": mean_loss(bounds),
            "fastibp": mean_loss(bounds),
            "sabr": mean_loss(small),
            "mtl-ibp": (mean_loss(attacked) + mean_loss(bounds)) / 2,
            "cc-ibp": mean_loss((attacked + bounds) / 2),
            "exp-ibp": (mean_loss(attacked) * mean_loss(bounds)) ** 0.5,
            "taps": mean_loss(attacked) * mean_loss(bounds),
            "staps": mean_loss(attacked) * mean_loss(small),
        }
        result = METHODS[method](both, EPSILON, self.settings(method, box_size=0.4))
        torch.testing.assert_close(result.radii, torch.tensor([0.0, EPSILON]))
        torch.testing.assert_close(result.loss, expected[method])
