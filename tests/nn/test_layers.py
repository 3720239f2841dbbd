"""Interval layers are their `torch.nn` twins: state dicts, outputs, gradients, shapes, errors."""

import copy
import math

import pytest
import torch
from torch import nn

from ibpcore import Interval, UserError, certified_margins, cnn7
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalCELU,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDropout,
    IntervalELU,
    IntervalFlatten,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaxPool2d,
    IntervalNormalize,
    IntervalPermute,
    IntervalReLU,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSigmoid,
    IntervalSoftplus,
    IntervalTanh,
    IntervalUpsample,
)
from ibpcore.nn.folding import clean_pass, fold
from ibpcore.nn.initialization import INITIALIZATIONS, ibp_initialization


def twins() -> tuple[nn.Sequential, IntervalSequential]:
    """The same net of plain and of interval layers, (B, 3, 8, 8) to 5; weights differ."""
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Sequential(nn.Conv2d(6, 4, 3, padding=2, dilation=2), nn.Tanh()),
        nn.BatchNorm2d(4, momentum=None),
        nn.MaxPool2d(2, 1),
        nn.AvgPool2d(3, 1, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(36, 7),
        nn.BatchNorm1d(7, momentum=0.3, affine=False),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(7, 5),
    )
    interval = IntervalSequential(
        IntervalConv2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False),
        IntervalBatchNorm(6),
        IntervalLeakyReLU(0.2),
        IntervalSequential(IntervalConv2d(6, 4, 3, padding=2, dilation=2), IntervalTanh()),
        IntervalBatchNorm(4, momentum=None),
        IntervalMaxPool2d(2, 1),
        IntervalAvgPool2d(3, 1, padding=1),
        IntervalSigmoid(),
        IntervalFlatten(),
        IntervalLinear(36, 7),
        IntervalBatchNorm(7, momentum=0.3, affine=False),
        IntervalReLU(),
        IntervalDropout(0.0),
        IntervalLinear(7, 5),
    )
    return plain, interval


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("forward", ["called", "clean pass"])
def test_state_dicts_and_outputs_are_the_twins(forward):
    torch.manual_seed(0)
    plain, interval = twins()
    interval.load_state_dict(plain.state_dict())
    again, _ = twins()
    again.load_state_dict(interval.state_dict())
    assert_same_state(plain, again)

    for mode in (True, True, False):  # two training steps, so that momenta count
        plain.train(mode)
        interval.train(mode)
        images = torch.rand(6, 3, 8, 8)
        output = interval(images) if forward == "called" else clean_pass(interval, images)[0]
        torch.testing.assert_close(output, plain(images))
        assert_same_state(plain, interval)
    assert int(interval[1].num_batches_tracked) == 2
    assert not torch.equal(interval[1].running_mean, torch.zeros(6))


def test_residual_sums_its_branches():
    torch.manual_seed(0)
    branch, shortcut = IntervalConv2d(2, 3, 1), IntervalConv2d(2, 3, 1)
    model = IntervalResidual(branch, shortcut)
    images = torch.rand(2, 2, 4, 4)
    torch.testing.assert_close(model(images), branch(images) + shortcut(images))
    model = IntervalResidual(IntervalSequential(IntervalTanh()))
    torch.testing.assert_close(model(images), images.tanh() + images)


def test_a_concatenation_by_hand():
    """[1, 3] and what 2 x - 1 makes of it, [1, 5]; side by side in the order of the branches."""
    double = IntervalScale(1, 2.0, -1.0)
    x = Interval(mid=torch.tensor([[2.0]]), rad=torch.tensor([[1.0]]))
    bounds = IntervalConcat([double, IntervalSequential()])(x)
    assert bounds.lower.tolist() == [[1, 1]]
    assert bounds.upper.tolist() == [[5, 3]]
    assert IntervalConcat([double, double], dim=2)(x.mid[:, :, None]).tolist() == [[[3, 3]]]


def test_a_scale_by_hand():
    model = IntervalScale(2, [-2.0, 0.5], 1.0)
    bounds = model(Interval(mid=torch.tensor([[1.0, 2.0]]), rad=torch.tensor([[0.5, 1.0]])))
    assert bounds.lower.tolist() == [[-2, 1.5]]
    assert bounds.upper.tolist() == [[0, 2.5]]


def test_upsampling_is_that_of_torch():
    x = torch.rand(2, 3, 4, 5)
    expected = nn.Upsample(scale_factor=(2, 3), mode="nearest")(x)
    assert torch.equal(IntervalUpsample((2, 3))(x), expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IntervalPermute((1, 0)), "dims must be 0"),
        (lambda: IntervalPermute((0, 2)), "dims must be 0"),
        (lambda: IntervalUpsample((2, 0)), "factors"),
        (lambda: IntervalConcat([]), "needs branches"),
        (lambda: IntervalConcat([IntervalReLU()], dim=0), "dimension of at least 1"),
    ],
)
def test_layers_that_cannot_be_are_refused(make, named):
    with pytest.raises(UserError, match=named):
        make()


def test_normalize_by_hand():
    model = IntervalNormalize([0.5, 0.25], [0.25, 0.5])
    images = torch.tensor([1.0, 0.75]).view(1, 2, 1, 1)
    assert model(images).flatten().tolist() == [2.0, 1.0]
    bounds = model(Interval(mid=images, rad=torch.full_like(images, 0.25)))
    assert bounds.lower.flatten().tolist() == [1.0, 0.5]
    assert bounds.upper.flatten().tolist() == [3.0, 1.5]
    assert set(model.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5], [0.0]), ([0.5], [-1.0]), ([0.5], [math.nan]), ([0.5, 0.5], [1.0])],
    ids=str,
)
def test_a_bad_normalization_is_refused(mean, std):
    with pytest.raises(UserError, match="std"):
        IntervalNormalize(mean, std)


def test_linear_bounds_by_hand():
    """[1, 3] and [-1, 1] through (2, -3) + 1: centre 5, radius 2 + 3."""
    layer = IntervalLinear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -3.0]]))
        layer.bias.fill_(1.0)
        bounds = layer(Interval(mid=torch.tensor([[2.0, 0.0]]), rad=torch.tensor([[1.0, 1.0]])))
    assert (bounds.lower.item(), bounds.upper.item()) == (0.0, 10.0)


def test_relu_bounds_by_hand():
    bounds = IntervalReLU()(Interval(mid=torch.tensor([-2.0, 0.0, 3.0]), rad=torch.ones(3)))
    assert bounds.lower.tolist() == [0, 0, 2]
    assert bounds.upper.tolist() == [0, 1, 4]


def test_interval_passes_leave_the_model_alone():
    torch.manual_seed(0)
    _, model = twins()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(4, 3, 8, 8)
    model(Interval.ball(images, 0.1))
    fold(model)(Interval.ball(images, 0.1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not [name for name in vars(model[0]) if "rad" in name or "lower" in name]


def test_dropout_acts_on_clean_batches_only():
    torch.manual_seed(0)
    layer = IntervalDropout(0.5)
    x = torch.ones(1, 1000)
    assert int((layer(x) == 0).sum()) in range(400, 600)
    bounds = layer(Interval(mid=x, rad=x / 10))
    assert torch.equal(bounds.mid, x)
    assert torch.equal(bounds.rad, x / 10)


# --- gradients ----------------------------------------------------------------------------


def tiny_net() -> IntervalSequential:
    torch.manual_seed(0)
    return IntervalSequential(
        IntervalNormalize([0.4], [0.5]),
        IntervalConv2d(1, 2, 2, bias=False),
        IntervalBatchNorm(2),
        IntervalLeakyReLU(0.3),
        IntervalResidual(IntervalSequential(IntervalConv2d(2, 2, 1), IntervalReLU())),
        IntervalFlatten(),
        IntervalLinear(8, 3),
        IntervalBatchNorm(3),
        IntervalTanh(),
        IntervalLinear(3, 3),
    ).double()


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients_of_margins(train, elide):
    """With respect to images, epsilon and all parameters; batch statistics included."""
    model = tiny_net().train(train)
    images = (0.2 + 0.6 * torch.rand(3, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    epsilon = torch.tensor([0.02, 0.03, 0.01], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2])

    # gradcheck moves the tensors in place, and the model's parameters are those tensors.
    def margins(images, epsilon, *parameters):
        return certified_margins(model, images, labels, epsilon, elide=elide)

    assert torch.autograd.gradcheck(margins, (images, epsilon, *model.parameters()))


def test_gradients_of_bounds():
    model = tiny_net().eval()
    mid = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    rad = torch.rand(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def bounds(mid, rad, *parameters):
        result = model(Interval(mid=mid, rad=rad))
        return result.lower, result.upper

    assert torch.autograd.gradcheck(bounds, (mid, rad, *model.parameters()))


def test_gradients_survive_an_earlier_pass_without_them():
    """A folded network may be searched without gradient first and then differentiated."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(4, 3), IntervalReLU(), IntervalLinear(3, 2)
    )
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    _, network = clean_pass(model, images)
    with torch.no_grad():
        certified_margins(network, images, labels, 0.2, elide=False)
    certified_margins(network, images, labels, 0.1, elide=False).sum().backward()
    searched = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    certified_margins(model, images, labels, 0.1, elide=False).sum().backward()
    for parameter, gradient in zip(model.parameters(), searched, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_folded_network_keeps_the_constants_that_it_was_made_of():
    gain = nn.Parameter(torch.tensor(2.0))
    model = IntervalSequential(IntervalScale(1, gain), IntervalLinear(1, 2))
    network = fold(model)
    with torch.no_grad():
        before = network(torch.ones(1, 1))
        gain.mul_(5)
        assert torch.equal(network(torch.ones(1, 1)), before)


def test_a_folded_network_is_one_network_even_after_a_step_of_the_optimizer():
    """All old or all new, never new weights beside an old |W|, which would be unsound."""
    torch.manual_seed(0)
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(4, 3), IntervalLeakyReLU(), IntervalLinear(3, 2)
    )
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    network = fold(model)
    with torch.no_grad():
        old = certified_margins(network, images, labels, 0.1)
        for parameter in model.parameters():
            parameter.mul_(5)
        new = certified_margins(model, images, labels, 0.1)
        margins = certified_margins(network, images, labels, 0.1)
    assert not torch.allclose(old, new)
    assert torch.allclose(margins, old) or torch.allclose(margins, new)


# --- what is refused ----------------------------------------------------------------------


def passes(model, images):
    """Every way into the interval rules."""
    return [
        lambda: model(Interval.ball(images, 0.1)),
        lambda: fold(model),
        lambda: clean_pass(model, images),
        lambda: certified_margins(model, images, torch.tensor([0]), 0.1),
    ]


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.Softmax(1), r"'1\.0\.1' \(Softmax\)"),
        (nn.Conv2d(1, 1, 1), r"'1\.0\.1' \(Conv2d\): use IntervalConv2d"),
        (nn.Sequential(), r"'1\.0\.1' \(Sequential\): use IntervalSequential"),
    ],
    ids=str,
)
def test_an_unsupported_layer_is_named_with_its_place(layer, advice):
    nested = IntervalSequential(IntervalSequential(IntervalTanh(), layer))
    model = IntervalSequential(IntervalReLU(), nested, IntervalFlatten()).eval()
    for attempt in passes(model, torch.rand(1, 1, 4, 4)):
        with pytest.raises(UserError, match=advice):
            attempt()


def test_an_unsupported_layer_in_a_residual_is_named():
    model = IntervalSequential(IntervalResidual(IntervalSequential(nn.Softmax(1)))).eval()
    for attempt in passes(model, torch.rand(1, 1, 4, 4)):
        with pytest.raises(UserError, match=r"'0\.branch\.0' \(Softmax\)"):
            attempt()


def test_a_plain_model_is_named_as_a_whole():
    model = nn.Linear(4, 2)
    with pytest.raises(UserError, match=r"the model is a plain Linear .* ibpcore\.convert"):
        fold(model)


def test_batch_norm_in_training_has_no_bounds_of_its_own():
    model = IntervalSequential(IntervalConv2d(1, 2, 1), IntervalBatchNorm(2)).train()
    with pytest.raises(UserError, match=r"batch norm .*eval"):
        model(Interval.ball(torch.rand(2, 1, 4, 4), 0.1))
    with pytest.raises(UserError, match="batch norm"):
        fold(model)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (IntervalLeakyReLU(-0.1), "negative_slope"),
        (IntervalELU(-0.1), "alpha >= 0"),
        (IntervalELU(math.nan), "alpha >= 0"),
        (IntervalCELU(-1.0), "alpha > 0"),
        (IntervalSoftplus(-1.0), "beta > 0"),
        (IntervalSoftplus(1.0, 5.0), "threshold >= 20"),
        (IntervalMaxPool2d(2, return_indices=True), "indices"),
        (IntervalAvgPool2d(2, divisor_override=-1), "divisor_override"),
    ],
    ids=str,
)
def test_options_without_a_sound_rule_are_refused(layer, named):
    with pytest.raises(UserError, match=named):
        layer(Interval(mid=torch.zeros(1, 1, 4, 4), rad=torch.ones(1, 1, 4, 4)))


# --- CNN7 ---------------------------------------------------------------------------------


def affine_layers(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("in_shape", "classes", "features", "strides"),
    [
        ((1, 28, 28), 10, 128 * 14 * 14, [1, 1, 2, 1, 1]),
        ((3, 32, 32), 10, 128 * 16 * 16, [1, 1, 2, 1, 1]),
        ((3, 64, 64), 200, 128 * 16 * 16, [1, 1, 2, 1, 2]),
    ],
    ids=["MNIST", "CIFAR-10", "TinyImageNet"],
)
def test_cnn7_is_that_of_table_3(in_shape, classes, features, strides):
    with torch.device("meta"):
        model = cnn7(in_shape, classes)
    *convolutions, hidden, last = affine_layers(model)
    assert [c.out_channels for c in convolutions] == [64, 64, 128, 128, 128]
    assert [c.stride for c in convolutions] == [(s, s) for s in strides]
    assert {c.kernel_size for c in convolutions} == {(3, 3)}
    assert {c.padding for c in convolutions} == {(1, 1)}
    assert (hidden.in_features, hidden.out_features) == (features, 512)
    assert (last.in_features, last.out_features) == (512, classes)
    norms = [m.num_features for m in model if isinstance(m, IntervalBatchNorm)]
    assert norms == [64, 64, 128, 128, 128, 512]
    assert not isinstance(model[-1], IntervalBatchNorm)

    # Weights and biases of the convolutions, the linear layers, the batch norms.
    counts = in_shape[0] * 9 * 64 + 64 * 9 * 64 + 64 * 9 * 128 + 2 * 128 * 9 * 128
    counts += 64 + 64 + 3 * 128 + features * 512 + 512 + 512 * classes + classes
    counts += 2 * (64 + 64 + 3 * 128 + 512)
    assert sum(p.numel() for p in model.parameters()) == counts


@pytest.mark.parametrize("side", [7, 28, 29, 32, 63, 64, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_cnn7_takes_images_of_any_side(channels, side):
    model = cnn7((channels, side, side), 4, width=2, hidden=3).eval()
    assert model(torch.rand(2, channels, side, side)).shape == (2, 4)


def test_cnn7_takes_images_that_are_not_square():
    model = cnn7((1, 12, 70), 4, width=2, hidden=3, mean=(0.1,), std=(0.3,)).eval()
    assert isinstance(model[0], IntervalNormalize)
    assert model(Interval.ball(torch.rand(2, 1, 12, 70), 0.1)).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"classes": 1}, "classes"),
        ({"width": 0}, "width"),
        ({"hidden": 0}, "hidden"),
        ({"mean": (0.5,)}, "mean and std"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, "mean and std"),
        ({"in_shape": (1, 0, 8)}, "in_shape"),
    ],
    ids=str,
)
def test_an_impossible_cnn7_is_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        cnn7(**{"in_shape": (1, 8, 8), "classes": 3, **arguments})


def test_part_of_a_cnn7_can_be_taken():
    """`nn.Sequential` allows slices; a slice of interval layers is still one."""
    model = cnn7((1, 8, 8), 3, width=2, hidden=3).eval()
    part = model[:3]
    assert isinstance(part, IntervalSequential)
    assert len(part) == 3


@pytest.mark.parametrize("initialize", INITIALIZATIONS.values(), ids=[*INITIALIZATIONS])
def test_the_initialization_of_other_layers_knows_their_products(initialize):
    """The outputs of each sum as many products as those of a linear layer of the same fan-in."""
    torch.manual_seed(0)
    layers = [
        IntervalLinear(36, 3000),
        IntervalMatMul(36, 3000),
        IntervalConv1d(24, 3000, 3, groups=2),
        IntervalConvTranspose2d(8, 3000, 3, groups=2),
        IntervalLinear(1, 1),
    ]
    before = [layer.weight.detach().clone() for layer in layers]
    initialize(IntervalSequential(*layers))
    if initialize is INITIALIZATIONS["own"]:
        assert all(torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True))
        return
    deviations = [float(layer.weight.detach().std()) for layer in layers[:-1]]
    assert deviations == pytest.approx([deviations[0]] * 4, rel=0.03)


def test_ibp_initialization():
    """std sqrt(2 pi) / fan_in, within 5 standard errors; the last layer keeps its default."""
    torch.manual_seed(0)
    model = cnn7((1, 16, 16), 50, width=32, hidden=200)
    *body, last = affine_layers(model)
    for layer in body:
        weight = layer.weight.detach()
        fan_in = weight.numel() // len(weight)
        expected = math.sqrt(2 * math.pi) / fan_in
        error = 1 / math.sqrt(2 * weight.numel())
        assert float(weight.std()) == pytest.approx(expected, rel=5 * error)
        assert abs(float(weight.mean())) < 5 * expected / math.sqrt(weight.numel())
        # A normal has a share of 4.6 % beyond two deviations; a uniform one has none.
        assert 0.02 < float((weight.abs() > 2 * expected).double().mean()) < 0.08
    bound = 1 / math.sqrt(200)  # the default of nn.Linear is uniform
    assert float(last.weight.detach().abs().max()) <= bound
    assert float(last.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_ibp_initialization_repeats_with_its_generator():
    models = [cnn7((1, 8, 8), 3, width=2, hidden=3) for _ in range(2)]
    last = copy.deepcopy(models[0][-1].state_dict())
    for model in models:
        ibp_initialization(model, torch.Generator().manual_seed(5))
    one, other = (affine_layers(model) for model in models)
    for first, second in zip(one[:-1], other[:-1], strict=True):
        assert torch.equal(first.weight, second.weight)
    assert torch.equal(models[0][-1].weight, last["weight"])


def test_hooks_are_refused():
    """What a hook does to the output, no bound would see."""
    model = IntervalSequential(IntervalConv2d(1, 2, 1), IntervalReLU())
    handle = model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(UserError, match="'0' has forward hooks"):
        fold(model)
    handle.remove()
    fold(model)
    model[0].forward = lambda x: x + 1
    with pytest.raises(UserError, match="a forward of its own"):
        fold(model)


def test_a_slice_of_a_cnn7_is_a_sequential():
    model = cnn7((1, 8, 8), 3, width=2, hidden=4).eval()
    images = torch.rand(2, 1, 8, 8)
    features = model[:-1]
    assert type(features) is IntervalSequential
    assert type(model[-1]) is IntervalLinear
    torch.testing.assert_close(model[-1](features(images)), model(images))


@pytest.mark.parametrize("twin", [nn.BatchNorm1d(2), nn.BatchNorm2d(2)])
def test_batch_norm_has_one_name_for_both(twin):
    with pytest.raises(UserError, match=r"use IntervalBatchNorm$"):
        fold(IntervalSequential(twin))
