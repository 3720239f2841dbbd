"""Warm-up regularisers and L1: numbers worked by hand, finite gradients in every corner."""

import math

import pytest
import torch
from torch import Tensor

from ibpcore import Interval
from ibpcore.bounds.ibp import robust_logits
from ibpcore.bounds.operators import RELU
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn import (
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalNormalize,
    IntervalReLU,
    IntervalSequential,
    IntervalSigmoid,
)
from ibpcore.nn.folding import clean_pass
from ibpcore.training.regularizers import (
    Activations,
    Sums,
    activation_sums,
    balance_regularizer,
    l1_norm,
    layer_sums,
    point_sums,
    tightness_regularizer,
    warmup_regularizer,
)


def tightness(first: Tensor, x: Interval) -> Tensor:
    """Of one layer, below an input of mean radius `first`."""
    return tightness_regularizer(layer_sums(x, first * len(x.mid))[None, None]).squeeze()


def relu_balance(x: Interval) -> Tensor:
    """Of one layer."""
    return balance_regularizer(layer_sums(x)[None, None]).squeeze()


def regularizer(activations: Activations) -> Tensor:
    return warmup_regularizer(activation_sums(activations))


def interval(mid, rad) -> Interval:
    mid = torch.tensor(mid, dtype=torch.float64)
    return Interval(mid=mid, rad=torch.tensor(rad, dtype=torch.float64).expand_as(mid))


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ([0.1, 0.3], [0.4, 1.2], 0.5),  # 0.2 / 0.8 = 0.25: (0.5 - 0.25) / 0.5
        ([0.2, 0.2], [0.4, 0.4], 0.0),  # just as wide as is tolerated
        ([0.2, 0.2], [0.1, 0.1], 0.0),
        ([0.0, 0.0], [0.4, 0.4], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),  # 0 / 0 is left out
        ([math.inf, 0.0], [1.0, 1.0], 0.0),
        ([0.1, 0.1], [math.nan, 1.0], 0.0),
    ],
)
def test_tightness(first, later, expected):
    centre = [0.0, 0.0]
    value = tightness(interval(centre, first).rad.mean(), interval(centre, later))
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_relu_balance_by_hand():
    """Centres 3, 1 active, -1 inactive, 0.1 open; their mean is 0.775.

    |centre|: 4 against 1, q = 0.25, term 0.5. Squared deviation: 2.225^2 + 0.225^2 = 5.00125
    against 1.775^2 = 3.150625, q = 0.62997, no term.
    """
    x = interval([[3.0, 1.0], [-1.0, 0.1]], 0.5)
    assert relu_balance(x).item() == pytest.approx(0.5)


def test_relu_balance_of_the_variance_by_hand():
    """Centres 2, -2, -2 and an open 0: 2 against 4 gives q = 0.5, no term.

    Mean -0.5; squared deviations 6.25 against 2 * 2.25 = 4.5, q = 0.72, no term. With 7 for
    the open one the mean is 1.25: 0.5625 against 2 * 10.5625, q = 0.026627, 1 - 2 q = 0.946746.
    """
    wide = torch.tensor([1.0, 1.0, 1.0, 9.0], dtype=torch.float64)
    balanced = Interval(mid=torch.tensor([2.0, -2.0, -2.0, 0.0], dtype=torch.float64), rad=wide)
    skewed = Interval(mid=torch.tensor([2.0, -2.0, -2.0, 7.0], dtype=torch.float64), rad=wide)
    assert relu_balance(balanced).item() == pytest.approx(0, abs=1e-12)
    assert relu_balance(skewed).item() == pytest.approx(1 - 2 * 0.5625 / 21.125)


def test_relu_balance_is_worst_when_all_neurons_are_on_one_side():
    """q = 0 for both: 1 + 1. With all neurons open there is nothing to weigh: 0."""
    assert relu_balance(interval([1.0, 2.0, 4.0], 0.5)).item() == 2
    assert relu_balance(interval([-1.0, -2.0, -4.0], 0.5)).item() == 2
    assert relu_balance(interval([1.0, -2.0, 4.0], 5.0)).item() == 0


def test_relu_balance_does_not_favour_a_side():
    x = interval([3.0, 1.0, -1.0, 0.1], 0.5)
    assert relu_balance(Interval(mid=-x.mid, rad=x.rad)).item() == relu_balance(x).item()


def test_the_regularizer_is_the_mean_over_relu_layers():
    """Tightness 0.5 and 0; balance 2 (all active) and 0 (all open): (2.5 + 0) / 2."""
    activations = Activations()
    activations.first = interval([[0.5], [0.5]], 0.2)
    for x in (interval([2.0, 3.0], 0.8), interval([0.1, -0.1], 0.2)):
        activations(RELU, x)
    assert regularizer(activations).item() == pytest.approx(1.25)


def observed(model: IntervalSequential, images: Tensor, epsilon: float) -> Activations:
    labels = torch.zeros(len(images), dtype=torch.int64)
    activations = Activations()
    _, network = clean_pass(model, images)
    radii = images.new_full((len(images),), epsilon)
    robust_logits(network, images, labels, radii, BoundOptions(), observe=activations)
    return activations


def small_net() -> IntervalSequential:
    torch.manual_seed(0)
    return IntervalSequential(
        IntervalNormalize([0.5], [0.25]),
        IntervalConv2d(1, 2, 3),
        IntervalReLU(),
        IntervalFlatten(),
        IntervalLinear(8, 4),
        IntervalSigmoid(),
        IntervalLinear(4, 4),
        IntervalReLU(),
        IntervalLinear(4, 2),
    ).double()


def test_an_observer_sees_the_normalised_images_and_every_relu_input():
    model, images = small_net(), torch.full((3, 1, 4, 4), 0.75, dtype=torch.float64)
    activations = observed(model, images, 0.1)
    assert torch.equal(activations.first.mid, torch.ones_like(images))
    torch.testing.assert_close(activations.first.rad, torch.full_like(images, 0.4))
    seen = [Sums(*sums) for sums in activations.bounded]
    assert [(int(x.samples), int(x.neurons)) for x in seen] == [(3, 24), (3, 12)]
    assert [x.width.item() for x in seen] == pytest.approx([3 * 0.4] * 2)


def test_without_relu_layers_there_is_nothing_to_regularize():
    assert regularizer(Activations()).item() == 0
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(16, 2)).double()
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    assert regularizer(observed(model, images, 0.1)).item() == 0


CORNERS = {
    "ordinary": lambda model: None,
    "all inactive": lambda model: [model[i].bias.fill_(-100.0) for i in (1, 6)],
    "all active": lambda model: [model[i].bias.fill_(100.0) for i in (1, 6)],
    "weights of zero": lambda model: [p.zero_() for p in model.parameters()],
    "first weights of zero": lambda model: model[1].weight.zero_(),
}


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.1, 1.0])
@pytest.mark.parametrize("corner", CORNERS)
def test_gradients_are_finite(corner, epsilon):
    model = small_net()
    with torch.no_grad():
        CORNERS[corner](model)
    value = regularizer(observed(model, torch.rand(3, 1, 4, 4).double(), epsilon))
    assert value.isfinite()
    assert value.item() >= 0
    value.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("rad", [0.0, 1e-20, 1.0])
@pytest.mark.parametrize("mid", [0.0, 1e-30, 1.0, 1e30])
def test_gradients_are_finite_at_very_different_scales(mid, rad):
    """In float32, where squares of both leave the range."""
    first = Interval(mid=torch.zeros(2), rad=torch.full((2,), 0.1, requires_grad=True))
    centres = torch.tensor([mid, -2 * mid], requires_grad=True)
    x = Interval(mid=centres, rad=torch.full((2,), rad, requires_grad=True))
    value = tightness(first.rad.mean(), x) + relu_balance(x)
    assert value.isfinite()
    gradients = torch.autograd.grad(value, [first.rad, x.mid, x.rad], allow_unused=True)
    for gradient in gradients:
        assert gradient is None or bool(gradient.isfinite().all())


def test_the_gradient_makes_bounds_tighter():
    """d/d rad_l of (0.5 - rad_0 / rad_l) / 0.5 is 2 rad_0 / rad_l^2, shared by two elements."""
    first = interval([0.0, 0.0], 0.2)
    rad = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    tightness(
        first.rad.mean(), Interval(mid=torch.zeros(2, dtype=torch.float64), rad=rad)
    ).backward()
    assert rad.grad.tolist() == pytest.approx([0.2, 0.2])


def test_it_does_not_matter_how_a_batch_is_cut():
    """Parts whose means are far apart; the gradient too."""
    generator = torch.Generator().manual_seed(0)
    mid = 1 + torch.randn(12, 5, generator=generator, dtype=torch.float64)
    mid = (mid + torch.linspace(0, 3, 12).double()[:, None]).requires_grad_()
    rad = torch.rand(12, 5, generator=generator, dtype=torch.float64).requires_grad_()
    width = torch.full((12,), 0.1, dtype=torch.float64)
    values = []
    for cuts in ([12], [1, 4, 7], [6, 6]):
        parts = zip(mid.split(cuts), rad.split(cuts), width.split(cuts), strict=True)
        sums = torch.stack([layer_sums(Interval(mid=m, rad=r), w.sum()) for m, r, w in parts])[
            :, None
        ]
        value = warmup_regularizer(sums)
        values.append((value, *torch.autograd.grad(value, [mid, rad])))
    value, by_mid, by_rad = values[0]
    assert value > 1
    assert min(by_mid.abs().max(), by_rad.abs().max()) > 1e-3
    for other in values[1:]:
        torch.testing.assert_close(other, values[0])


def test_l1_norm_counts_weights_of_affine_layers_only():
    model = IntervalSequential(
        IntervalNormalize([0.5], [0.25]),
        IntervalConv2d(1, 1, 2),
        IntervalFlatten(),
        IntervalLinear(2, 1),
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
        model[3].weight.copy_(torch.tensor([[-0.5, 0.25]]))
        model[1].bias.fill_(1000.0)
    norm = l1_norm(model)
    assert norm.item() == 10.75
    norm.backward()
    assert model[3].weight.grad.tolist() == [[-1.0, 1.0]]
    assert model[1].bias.grad is None


def written_out(mid: Tensor, rad: Tensor) -> Tensor:
    """The sums over a layer as autograd derives them."""
    active, inactive = mid > rad, mid < -rad
    shift = mid.detach().mean()
    size, square = mid.abs(), (mid - shift).square()
    parts = [x * side for x in (size, square) for side in (active, inactive)]
    return torch.stack([mid.sum(), rad.sum(), *(part.sum() for part in parts)])


def test_the_sums_of_a_layer_and_their_gradient():
    """By autograd, of neurons of all three kinds; only one tensor of their size is kept."""
    generator = torch.Generator().manual_seed(0)
    mid = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rad = torch.rand(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(6, generator=generator, dtype=torch.float64)
    found = Sums(*layer_sums(Interval(mid=mid, rad=rad)))
    assert 0 < found.actives < 30 - found.inactives < 30
    sums = (found.mid, found.rad, found.active, found.inactive)
    kept = torch.stack([*sums, found.active_square, found.inactive_square])
    expected = written_out(mid, rad)
    torch.testing.assert_close(kept, expected)
    ours = torch.autograd.grad(kept @ weights, [mid, rad])
    theirs = torch.autograd.grad(expected @ weights, [mid, rad])
    torch.testing.assert_close(ours, theirs)


def test_points_have_the_sums_of_intervals_without_width():
    """With 0, which is on neither side, in both memory formats; the gradient too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    x[0, 0, 0, :2] = 0
    weights = torch.randn(12, generator=generator, dtype=torch.float64)
    found = []
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        mid = images.clone().requires_grad_()
        both = point_sums(mid), layer_sums(Interval(mid=mid, rad=torch.zeros_like(mid)))
        found += [(sums.detach(), *torch.autograd.grad(sums @ weights, [mid])) for sums in both]
    assert (Sums(*found[0][0]).actives + Sums(*found[0][0]).inactives).item() == 298
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
