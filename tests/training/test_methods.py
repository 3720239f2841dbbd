"""The methods' losses against the paper's formulas, on networks small enough to see through."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from ibpcore import Interval
from ibpcore.attacks.pgd import Attack
from ibpcore.certification.radii import certified_radii
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSequential
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass
from ibpcore.training.config import make_config
from ibpcore.training.methods import METHODS, CleanBatch, estimators

ADVERSARIAL = importlib.import_module("ibpcore.training.methods.adversarial")


def linear_model(weight):
    """f(x) = weight x on images of one pixel."""
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(1, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weight))
    return model


def clean_batch(model, images, labels):
    logits, network = clean_pass(model, images)
    return CleanBatch(network, logits, images, labels, torch.full((len(images),), torch.nan))


def settings(method, **overrides):
    return make_config("digits", method, **{"regularizer": 0.0, "solver": "brentq", **overrides})


@pytest.fixture
def two_pixels():
    """f_0 - f_1 = x: with label 0, x = 0.5 is certified up to 0.5, x = 0 has margin 0."""
    model = linear_model([[0.5], [-0.5]])
    images = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    return clean_batch(model, images, torch.tensor([0, 0]))


def test_fastibp_by_hand(two_pixels):
    """Unclipped, the worst f_1 - f_0 at radius 0.1 is -(x - 0.1)."""
    result = METHODS["fastibp"](two_pixels, 0.1, settings("fastibp", clip=False))
    worst = torch.tensor([-0.4, 0.1])
    torch.testing.assert_close(result.loss, F.softplus(worst).mean())
    torch.testing.assert_close(result.radii, torch.tensor([0.1, 0.1]))


def test_clipping_keeps_pixels_in_range(two_pixels):
    """The second pixel is 0: its ball is [0, 0.1] and the worst point of it is 0."""
    result = METHODS["fastibp"](two_pixels, 0.1, settings("fastibp"))
    torch.testing.assert_close(result.loss, F.softplus(torch.tensor([-0.4, 0.0])).mean())


def test_kappa_mixes_the_two_losses(two_pixels):
    """Eq. 11."""
    result = METHODS["fastibp"](two_pixels, 0.1, settings("fastibp", clip=False, kappa=0.3))
    standard = F.softplus(torch.tensor([-0.5, 0.0])).mean()
    robust = F.softplus(torch.tensor([-0.4, 0.1])).mean()
    torch.testing.assert_close(result.loss, 0.3 * standard + 0.7 * robust)


def test_standard_ignores_epsilon(two_pixels):
    result = METHODS["standard"](two_pixels, 0.1, settings("standard"))
    torch.testing.assert_close(result.loss, F.softplus(torch.tensor([-0.5, 0.0])).mean())
    assert result.activations is None


def test_acert_by_hand(two_pixels):
    """Radius 0.1 = the cap for the first, 0 for the second, which is not classified."""
    result = METHODS["acert"](two_pixels, 0.1, settings("acert", clip=False))
    torch.testing.assert_close(result.radii, torch.tensor([0.1, 0.0]))
    torch.testing.assert_close(result.loss, F.softplus(torch.tensor([-0.4, 0.0])).mean())


def test_acert_stops_at_the_root(two_pixels):
    """The cap 0.8 lies beyond the first sample's root 0.5, where the margin is 0."""
    result = METHODS["acert"](two_pixels, 0.8, settings("acert", clip=False))
    torch.testing.assert_close(result.radii, torch.tensor([0.5, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.loss, F.softplus(torch.zeros(2)).mean(), atol=1e-4, rtol=0)


def test_acert_fast_takes_the_cap_where_correct(two_pixels):
    result = METHODS["acert"](two_pixels, 0.8, settings("acert", clip=False, max_iterations=0))
    torch.testing.assert_close(result.radii, torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(result.loss, F.softplus(torch.tensor([0.3, 0.0])).mean())


def test_acert_trains_at_the_radii_of_this_batch():
    """In training mode, radii by the batch's own statistics, as `certified_radii` finds them."""
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=3, hidden=8).train()
    images = torch.rand(16, 1, 8, 8)
    labels = model(images).argmax(1)
    batch = clean_batch(model, images, labels)
    result = METHODS["acert"](batch, 0.3, settings("acert"))
    expected = certified_radii(batch.network, images, labels, 0.3)
    assert expected.radius.max() > 0
    torch.testing.assert_close(result.radii, expected.root)


VARIANTS = {
    "standard": ("standard", {}),
    "fastibp": ("fastibp", {}),
    "acert": ("acert", {}),
    "acert-fast": ("acert", {"max_iterations": 0}),
    "acert, fused": ("acert", {"solver": "fused"}),
    "acert, tracked": ("acert", {"solver": "tracked"}),
    "acert, tracked to the end": ("acert", {"solver": "tracked", "max_iterations": 100}),
    "random-ibp": ("random-ibp", {}),
    "sabr, random": ("sabr", {"random_radii": True}),
    "ibp": ("ibp", {"epsilon_max": 0.01}),
    "crown-ibp": ("crown-ibp", {}),
    "crown-ibp, fused": ("crown-ibp", {"loss_fusion": True}),
    "crown-ibp, adaptive": ("crown-ibp", {"adaptive": True}),
    "sabr": ("sabr", {}),
    "sabr, shrinking": ("sabr", {"relu_shrinkage": 0.2}),
    "sabr, adaptive": ("sabr", {"adaptive": True}),
    "mtl-ibp": ("mtl-ibp", {}),
    "mtl-ibp, adaptive": ("mtl-ibp", {"adaptive": True}),
    "cc-ibp": ("cc-ibp", {}),
    "cc-ibp, adaptive": ("cc-ibp", {"adaptive": True}),
    "exp-ibp": ("exp-ibp", {}),
    "exp-ibp, adaptive": ("exp-ibp", {"adaptive": True}),
    "taps": ("taps", {"epsilon_max": 0.01}),
    "taps, shrinking": ("taps", {"epsilon_max": 0.01, "relu_shrinkage": 0.2}),
    "taps, warm-up": ("taps", {}),
    "staps": ("staps", {"epsilon_max": 0.01, "classifier_size": 3}),
    "staps, adaptive": ("staps", {"epsilon_max": 0.01, "adaptive": True}),
    "adversarial": ("mtl-ibp", {"ibp_weight": 0.0}),
    "by CROWN-IBP": ("ibp", {"epsilon_max": 0.01, "train_bound": "crown-ibp"}),
    "by CROWN": ("fastibp", {"train_bound": "crown"}),
    "by CROWN, adaptive": ("acert", {"train_bound": "crown"}),
    "by optimised CROWN": ("cc-ibp", {"train_bound": "alpha-crown"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    """Also those of batch norm, through the statistics that the interval pass shares."""
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=3, hidden=8).train()
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    method, given = VARIANTS[variant]
    config = settings(method, **given)
    METHODS[method](clean_batch(model, images, labels), 0.01, config).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias before batch norm has no effect, so its gradient is zero by theory.
        if not (name.endswith("bias") and parameter.grad.abs().max() < 1e-6):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        *((method, "ibp") for method in ("fastibp", "sabr", "mtl-ibp", "cc-ibp", "exp-ibp")),
        *(("fastibp", bound) for bound in ("crown-ibp", "crown")),
        *((method, "ibp") for method in ("taps", "staps")),
    ],
)
def test_the_gradient_is_that_of_the_loss(method, bound, monkeypatch):
    """Against central differences in float64, batch statistics included, at given points.

    In latent boxes these are corners, where the connector of TAPS is exact.
    """
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=2, hidden=4).double().train()
    images, labels = torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 3
    of_taps = {"epsilon_max": 0.05, "classifier_size": 2, "taps_weight": 1.0}
    config = settings(method, kappa=0.5, relu_shrinkage=0.2, train_bound=bound, **of_taps)
    box = Interval.ball(images, 0.05)
    points = box.mid + (2 * torch.rand_like(images) - 1) * box.rad
    monkeypatch.setattr(ADVERSARIAL, "pgd", lambda *_, **__: Attack(points, points))

    def corners(network, latent, lanes, sizes, **_):
        signs = torch.rand(latent.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
        return Attack(latent.mid + signs * latent.rad, latent.mid)

    monkeypatch.setattr(estimators, "pgd", corners)

    def loss():
        return METHODS[method](clean_batch(model, images, labels), 0.05, config).loss

    loss().backward()
    step = 1e-6
    for parameter in model.parameters():
        index = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
        values = []
        for sign in (1, -1):
            parameter.data[index] += sign * step
            values.append(loss().item())
            parameter.data[index] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(parameter.grad[index].item(), rel=1e-4, abs=1e-6)
