"""The engine agrees with the independent oracle: layers singly, mixed nets, CNN7s, batching."""

import copy

import oracle
import pytest
import torch
from activations import ACTIVATIONS, DROPOUTS

from ibpcore import Interval, certified_margins, cnn7
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDivide,
    IntervalDropout,
    IntervalFlatten,
    IntervalIndexSelect,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaxPool2d,
    IntervalNormalize,
    IntervalPermute,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSigmoid,
    IntervalSlice,
    IntervalSubtract,
    IntervalTanh,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.folding import clean_pass, fold

CLIPS = [(0.0, 1.0), None]


def generator(seed: int = 0) -> torch.Generator:
    torch.manual_seed(seed)  # layers draw their weights from the global one
    return torch.Generator().manual_seed(seed)


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-10 for float64; 1e-4 of the largest value for float32."""
    tolerance = 1e-10 if actual.dtype == torch.float64 else 1e-4
    floor = tolerance * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=floor)


def random_cnn7(in_shape, classes=4, normalise=True, seed=0):
    images, _ = batch(in_shape, classes, size=8, seed=seed + 7)
    rng = generator(seed)
    channels = in_shape[0]
    mean = torch.rand(channels, generator=rng).tolist() if normalise else ()
    std = (0.2 + torch.rand(channels, generator=rng)).tolist() if normalise else ()
    model = cnn7(in_shape, classes, width=3, hidden=7, mean=mean, std=std)
    return oracle.randomize_batch_norm(model.double(), images, rng)


def mixed_net() -> IntervalSequential:
    """(2, 9, 9) to 3 classes: every layer type, residuals with either kind of shortcut."""
    return IntervalSequential(
        IntervalNormalize([0.4, 0.5], [0.3, 0.2]),
        IntervalConv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False),
        IntervalBatchNorm(4),
        IntervalLeakyReLU(0.1),
        IntervalResidual(
            IntervalSequential(
                IntervalConv2d(4, 4, 3, padding=2, dilation=2),
                IntervalBatchNorm(4),
                IntervalReLU(),
                IntervalConv2d(4, 4, (1, 3), padding=(0, 1)),
            )
        ),
        IntervalBatchNorm(4),
        IntervalTanh(),
        IntervalMaxPool2d(2, stride=1),
        IntervalResidual(
            IntervalSequential(IntervalConv2d(4, 6, 1), IntervalBatchNorm(6)),
            IntervalConv2d(4, 6, 3, padding=1),
        ),
        IntervalReLU(),
        IntervalAvgPool2d(2),
        IntervalFlatten(),
        IntervalLinear(6 * 2 * 2, 8),
        IntervalBatchNorm(8),
        IntervalSigmoid(),
        IntervalDropout(0.5),
        IntervalLinear(8, 3),
    )


def batch(in_shape, classes, size=5, seed=1):
    rng = generator(seed)
    images = torch.rand(size, *in_shape, generator=rng, dtype=torch.float64)
    labels = torch.randint(classes, (size,), generator=rng)
    return images, labels


def filled(layer):
    """With weights, which the layer itself starts at 0."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(0))
    return layer


SINGLE = {
    "conv": IntervalConv2d(4, 6, 3),
    "conv, strided and padded": IntervalConv2d(4, 6, 3, stride=2, padding=1),
    "conv, dilated": IntervalConv2d(4, 3, 3, dilation=2, padding=(2, 1)),
    "conv, grouped": IntervalConv2d(4, 6, 3, groups=2),
    "conv, a group a channel": IntervalConv2d(4, 8, (3, 2), groups=4, stride=(1, 2), bias=False),
    "conv, padding same": IntervalConv2d(4, 2, 3, padding="same"),
    "conv, reflecting": IntervalConv2d(4, 2, 3, padding=(1, 2), padding_mode="reflect"),
    "conv of rows": IntervalSequential(
        IntervalFlatten(2), IntervalConv1d(4, 6, 3, 2, 1, dilation=3, groups=2)
    ),
    "conv of rows, circular": IntervalSequential(
        IntervalFlatten(2), IntervalConv1d(4, 2, 5, padding=2, padding_mode="circular")
    ),
    "conv of rows and batch norm": IntervalSequential(
        IntervalFlatten(2), IntervalConv1d(4, 3, 4, bias=False), IntervalBatchNorm(3)
    ),
    "transposed conv": IntervalConvTranspose2d(4, 3, 2, stride=2),
    "transposed conv, grouped and cropped": IntervalConvTranspose2d(
        4, 6, (3, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 2), groups=2
    ),
    "transposed conv, dilated": IntervalConvTranspose2d(
        4, 2, 3, padding=5, output_padding=1, dilation=2, bias=False
    ),
    "transposed conv and batch norm": IntervalSequential(
        IntervalConvTranspose2d(4, 6, 3, stride=2, groups=2), IntervalBatchNorm(6)
    ),
    "product with a matrix": filled(IntervalMatMul(8, 5)),
    "linear over the last dimension": IntervalLinear(8, 5),
    "linear, no bias": IntervalSequential(IntervalFlatten(), IntervalLinear(256, 5, bias=False)),
    "batch norm": IntervalBatchNorm(4),
    "batch norm, not affine": IntervalBatchNorm(4, affine=False),
    "batch norm, flat": IntervalSequential(IntervalFlatten(), IntervalBatchNorm(256)),
    "conv and batch norm": IntervalSequential(IntervalConv2d(4, 3, 3), IntervalBatchNorm(3)),
    "linear and batch norm": IntervalSequential(
        IntervalFlatten(), IntervalLinear(256, 3, bias=False), IntervalBatchNorm(3)
    ),
    "linear over the last dimension and batch norm over the channels": IntervalSequential(
        IntervalLinear(8, 4), IntervalBatchNorm(4)
    ),
    "normalize": IntervalNormalize([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.2, 3.0]),
    "relu": IntervalReLU(),
    "leaky relu": IntervalLeakyReLU(0.3),
    "sigmoid": IntervalSigmoid(),
    "tanh": IntervalTanh(),
    **{name: make(4) for name, make in (ACTIVATIONS | DROPOUTS).items()},
    "flatten": IntervalFlatten(),
    "flatten some": IntervalFlatten(2),
    "average pool": IntervalAvgPool2d(2),
    "average pool, padded": IntervalAvgPool2d(3, stride=2, padding=1),
    "average pool, padding left out": IntervalAvgPool2d(3, 2, 1, True, count_include_pad=False),
    "average pool, own divisor": IntervalAvgPool2d((2, 3), divisor_override=5),
    "max pool": IntervalMaxPool2d(2),
    "max pool, padded and dilated": IntervalMaxPool2d(3, 2, padding=1, dilation=2, ceil_mode=True),
    "scale": IntervalScale(4, [0.5, -2.0, 0.0, 1.5], [[0.1], [-0.2], [3.0], [0.0]]),
    "scale, one for all": IntervalScale(4, -1.5, 0.3),
    "scale, an image": IntervalScale(4, 1.5, torch.linspace(-1, 1, 256).view(4, 8, 8)),
    "subtract": IntervalSubtract(4, [0.5, -2.0, 0.0, 1.5]),
    "subtract, an image": IntervalSubtract(4, torch.linspace(-1, 1, 64).view(8, 8)),
    "divide": IntervalDivide(4, [0.5, -2.0, 0.1, 1.5]),
    "divide, a row": IntervalDivide(4, torch.linspace(-1, 1, 8)),
    "reshape": IntervalReshape((8, 2, 16)),
    "permute": IntervalPermute((0, 3, 1, 2)),
    "pad": IntervalZeroPad((1, 0, 2, 3)),
    "slice": IntervalSlice([[1, 4, 1], [0, 8, 2], [2, 3, 1]]),
    "index select": IntervalIndexSelect([7, 0, 0, 3], 2),
    "upsample": IntervalUpsample((2, 3)),
    "product": IntervalProduct(IntervalConv2d(4, 2, 1), IntervalConv2d(4, 2, 1)),
    "product, gate": IntervalProduct(
        IntervalSequential(
            IntervalAvgPool2d(8),
            IntervalConv2d(4, 4, 1),
            IntervalSigmoid(),
            IntervalUpsample((8, 8)),
        )
    ),
    "product, in place": IntervalProduct(
        IntervalSequential(IntervalReLU(inplace=True), IntervalBatchNorm(4)), IntervalTanh()
    ),
    "concatenation": IntervalConcat(
        [
            IntervalSequential(),
            IntervalSequential(IntervalConv2d(4, 2, 1), IntervalBatchNorm(2), IntervalReLU()),
            IntervalConcat([IntervalTanh(), IntervalConv2d(4, 3, 1)]),
        ]
    ),
    "concatenation, batch norm and relu in place": IntervalSequential(
        IntervalConcat([IntervalReLU(inplace=True), IntervalSequential()], dim=1),
        IntervalBatchNorm(8),
    ),
    "concatenation of rows": IntervalConcat([IntervalReLU(), IntervalTanh()], dim=2),
    "residual, identity": IntervalResidual(IntervalConv2d(4, 4, 3, padding=1)),
    "residual, two branches": IntervalResidual(IntervalConv2d(4, 2, 1), IntervalConv2d(4, 2, 1)),
    "residual, in place": IntervalResidual(
        IntervalSequential(IntervalReLU(inplace=True), IntervalConv2d(4, 4, 1))
    ),
}


@pytest.mark.parametrize("folded", [False, True], ids=["as is", "folded"])
@pytest.mark.parametrize("name", SINGLE)
def test_one_layer(name, folded):
    rng = generator()
    model = IntervalSequential(copy.deepcopy(SINGLE[name])).double()
    mid = torch.randn(3, 4, 8, 8, generator=rng, dtype=torch.float64)
    rad = torch.rand(3, 4, 8, 8, generator=rng, dtype=torch.float64)
    oracle.randomize_batch_norm(model, mid, rng)

    bounds = (fold(model) if folded else model)(Interval(mid=mid, rad=rad))

    expected = oracle.propagate(model, oracle.State(mid - rad, mid + rad, mid))
    assert_agrees(bounds.lower, expected.lower)
    assert_agrees(bounds.upper, expected.upper)


@pytest.mark.parametrize("name", SINGLE)
def test_the_model_itself_is_what_is_bounded(name):
    rng = generator()
    model = IntervalSequential(copy.deepcopy(SINGLE[name])).double()
    x = torch.randn(3, 4, 8, 8, generator=rng, dtype=torch.float64)
    oracle.randomize_batch_norm(model, x, rng)
    expected = oracle.propagate(model, oracle.State(x, x, x)).clean

    assert_agrees(fold(model)(x), expected)
    assert_agrees(model(x.clone()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("clip", CLIPS, ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("in_shape", "normalise"),
    [((1, 8, 8), True), ((3, 8, 8), False), ((1, 28, 28), False), ((3, 32, 32), True)],
    ids=str,
)
def test_cnn7(in_shape, normalise, train, elide, clip, dtype):
    check_margins(random_cnn7(in_shape, normalise=normalise), in_shape, train, elide, clip, dtype)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("channels", [1, 3])
def test_cnn7_of_64_pixels(channels, train):
    in_shape = (channels, 64, 64)
    check_margins(random_cnn7(in_shape), in_shape, train, True, (0.0, 1.0), torch.float64)


@pytest.mark.parametrize("clip", CLIPS, ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_net(train, elide, clip, seed):
    rng = generator(seed)
    images, _ = batch((2, 9, 9), classes=3, size=8)
    model = oracle.randomize_batch_norm(mixed_net().double(), images, rng)
    check_margins(model, (2, 9, 9), train, elide, clip, torch.float64)


def check_margins(model, in_shape, train, elide, clip, dtype):
    """Margins equal the oracle's at three radii, and the buffers are left alone."""
    model = model.to(dtype).train(train)
    images, labels = batch(in_shape, classes=model[-1].out_features)
    images = images.to(dtype)
    epsilons = torch.tensor([[0.0], [1e-4], [0.15]], dtype=dtype).repeat(1, len(images))
    epsilons[1] *= torch.linspace(0.5, 2, len(images), dtype=dtype)
    buffers = copy.deepcopy(dict(model.named_buffers()))

    with torch.no_grad():
        actual = certified_margins(model, images, labels, epsilons, elide=elide, clip=clip)

    for row, radii in zip(actual, epsilons, strict=True):
        assert_agrees(row, oracle.margins(model, images, labels, radii, elide, clip))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_batch_norm_after_the_last_linear_layer_is_elided_too():
    rng = generator()
    body = IntervalSequential(IntervalFlatten(), IntervalLinear(9, 6), IntervalReLU())
    last, norm = IntervalLinear(6, 3), IntervalBatchNorm(3)
    images, labels = batch((1, 3, 3), classes=3)
    model = IntervalSequential(*body, last, norm).double()
    oracle.randomize_batch_norm(model, images, rng)
    merged = copy.deepcopy(last)
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        merged.weight.copy_(last.weight * scale[:, None])
        merged.bias.copy_((last.bias - norm.running_mean) * scale + norm.bias)

    actual = certified_margins(model, images, labels, 0.1).detach()

    expected = oracle.margins(
        IntervalSequential(*body, merged), images, labels, 0.1, True, (0.0, 1.0)
    )
    assert_agrees(actual, expected)


def test_elision_is_tighter_than_eq_3():
    model = random_cnn7((1, 8, 8)).double().eval()
    images, labels = batch((1, 8, 8), classes=4)
    with torch.no_grad():
        elided = certified_margins(model, images, labels, 0.05)
        separate = certified_margins(model, images, labels, 0.05, elide=False)
    assert bool((elided < separate).all())


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_many_radii_equal_separate_calls(train):
    model = random_cnn7((3, 8, 8)).double().train(train)
    images, labels = batch((3, 8, 8), classes=4)
    epsilons = torch.rand(4, len(images), dtype=torch.float64) / 10
    with torch.no_grad():
        together = certified_margins(model, images, labels, epsilons)
        singly = torch.stack([certified_margins(model, images, labels, e) for e in epsilons])
    torch.testing.assert_close(together, singly, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_a_batch_equals_its_images_one_by_one(elide):
    model = random_cnn7((1, 8, 8)).double().eval()
    images, labels = batch((1, 8, 8), classes=4)
    epsilons = torch.linspace(0, 0.1, len(images), dtype=torch.float64)
    with torch.no_grad():
        together = certified_margins(model, images, labels, epsilons, elide=elide)
        singly = [
            certified_margins(model, images[i : i + 1], labels[i : i + 1], epsilons[i], elide=elide)
            for i in range(len(images))
        ]
    torch.testing.assert_close(together, torch.cat(singly), rtol=1e-12, atol=1e-12)


def test_a_scalar_radius_is_the_same_radius_for_all():
    model = random_cnn7((1, 8, 8)).double().eval()
    images, labels = batch((1, 8, 8), classes=4)
    with torch.no_grad():
        scalar = certified_margins(model, images, labels, 0.05)
        filled = certified_margins(model, images, labels, images.new_full((5,), 0.05))
    torch.testing.assert_close(scalar, filled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("track", [False, True])
def test_clean_pass_in_training_gives_the_batch_its_own_statistics(track):
    model = random_cnn7((1, 8, 8)).double().train()
    images, _ = batch((1, 8, 8), classes=4)
    expected = oracle.propagate(model, oracle.ball(images, 0.0)).clean

    with torch.no_grad():
        logits, network = clean_pass(model, images, track=track)

    assert_agrees(logits, expected)
    assert_agrees(network(images), expected)
    assert [int(m.num_batches_tracked) for m in model if isinstance(m, IntervalBatchNorm)] == [
        int(track)
    ] * 6
