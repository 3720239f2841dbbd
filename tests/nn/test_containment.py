"""No point of a ball leaves its bounds, and none has a margin above the certified one.

Random small nets of random layers; the points are random ones, corners, and the corners that
the gradient points to.
"""

from typing import NamedTuple

import oracle
import pytest
import torch
from activations import ACTIVATIONS
from balls import points, worst_corners
from hypothesis import given, settings
from hypothesis import strategies as st

from ibpcore import Interval, UserError, certified_margins
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
from ibpcore.nn.folding import clean_pass

SLACK = 1e-9
CLASSES = 3
FREELY = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def filled(layer):
    """With weights, which the layer itself starts at 0."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


# Each takes the number of channels, which it keeps, as it does height and width.
LAYERS = {
    "conv": lambda c: IntervalConv2d(c, c, 3, padding=1),
    "dilated": lambda c: IntervalConv2d(c, c, 3, padding=2, dilation=2, bias=False),
    "grouped": lambda c: IntervalConv2d(c, c, (1, 3), padding=(0, 1), groups=c),
    "norm": IntervalBatchNorm,
    "normalize": lambda c: IntervalNormalize([0.1 * i for i in range(c)], [0.5] * c),
    "relu": lambda c: IntervalReLU(),
    "leaky": lambda c: IntervalLeakyReLU(0.2),
    "sigmoid": lambda c: IntervalSigmoid(),
    "tanh": lambda c: IntervalTanh(),
    **ACTIVATIONS,
    "average": lambda c: IntervalAvgPool2d(3, stride=1, padding=1),
    "max": lambda c: IntervalMaxPool2d(3, stride=1, padding=1),
    "dropout": lambda c: IntervalDropout(0.5),
    "linear": lambda c: IntervalLinear(5, 5),
    "scale": lambda c: IntervalScale(c, [-0.5 + i for i in range(c)], 0.2),
    "subtract": lambda c: IntervalSubtract(c, torch.linspace(-1, 1, 25 * c).view(c, 5, 5)),
    "divide": lambda c: IntervalDivide(c, [-0.5 - i for i in range(c)]),
    "transposed": lambda c: IntervalConvTranspose2d(c, c, 3, padding=1),
    "matrix": lambda c: filled(IntervalMatMul(5, 5)),
    "rows": lambda c: IntervalSequential(
        IntervalFlatten(2), IntervalConv1d(c, c, 3, padding=1), IntervalReshape((c, 5, 5))
    ),
    "chosen": lambda c: IntervalIndexSelect([4, 0, 2, 2, 3], 3),
    "product": lambda c: IntervalProduct(
        IntervalSequential(IntervalConv2d(c, c, 1), IntervalTanh()), IntervalConv2d(c, c, 1)
    ),
    "square": lambda c: IntervalProduct(IntervalSequential()),
    "turned": lambda c: IntervalPermute((0, 1, 3, 2)),
    "moved": lambda c: IntervalSequential(
        IntervalZeroPad((1, 1, 0, 0)), IntervalSlice([[0, c, 1], [0, 5, 1], [0, 5, 1]])
    ),
    "reshaped": lambda c: IntervalSequential(
        IntervalReshape((5, c, 5)), IntervalPermute((0, 2, 3, 1))
    ),
    "upsampled": lambda c: IntervalSequential(
        IntervalAvgPool2d(5), IntervalUpsample((5, 5)), IntervalConv2d(c, c, 1)
    ),
    "concatenation": lambda c: IntervalSequential(
        IntervalConcat([IntervalConv2d(c, 2, 1), IntervalSequential(), IntervalTanh()]),
        IntervalReLU(),
        IntervalConv2d(2 + 2 * c, c, 1),
    ),
    "residual": lambda c: IntervalResidual(
        IntervalSequential(IntervalConv2d(c, c, 1), IntervalReLU(), IntervalConv2d(c, c, 1))
    ),
    "two branches": lambda c: IntervalResidual(
        IntervalSequential(IntervalBatchNorm(c), IntervalTanh()), IntervalConv2d(c, c, 1)
    ),
}


class Facts(NamedTuple):
    """What a problem is built from; small, so that a failure reads well."""

    seed: int
    channels: int
    layers: list[str]
    clip: tuple[float, float] | None
    largest: float


facts_strategy = st.builds(
    Facts,
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 3),
    layers=st.lists(st.sampled_from(sorted(LAYERS)), max_size=6),
    clip=st.sampled_from([(0.0, 1.0), None]),
    # Wide balls make loose bounds, which hide mistakes; narrow ones do not.
    largest=st.sampled_from([0.001, 0.05, 0.8]),
)


def build(facts: Facts):
    """A net in evaluation, images (B, C, 5, 5), labels (B,) and radii (B,), in float64."""
    torch.manual_seed(facts.seed)
    rng = torch.Generator().manual_seed(facts.seed)
    model = IntervalSequential(
        *(LAYERS[name](facts.channels) for name in facts.layers),
        IntervalFlatten(),
        IntervalLinear(25 * facts.channels, 6),
        IntervalReLU(),
        IntervalLinear(6, CLASSES),
    )
    images = torch.rand(3, facts.channels, 5, 5, generator=rng, dtype=torch.float64)
    oracle.randomize_batch_norm(model.double(), images, rng)
    labels = torch.randint(CLASSES, (3,), generator=rng)
    radii = facts.largest * torch.rand(3, generator=rng, dtype=torch.float64)
    return model, images, labels, radii, facts.clip, rng


def true_margins(network, x, labels):
    logits = network(x.flatten(0, 1)).view(*x.shape[:2], -1)
    index = labels.expand(len(x), -1)[..., None]
    differences = logits - logits.gather(2, index)
    return differences.scatter(2, index, -torch.inf).amax(2)


@FREELY
@given(facts=facts_strategy)
def test_points_stay_inside_the_bounds(facts):
    model, images, labels, radii, clip, rng = build(facts)
    corners = worst_corners(model, images, labels, radii, clip)
    x = torch.cat([points(images, radii, clip, rng), corners])

    with torch.no_grad():
        bounds = model(Interval.ball(images, radii, clip))
        logits = model(x.flatten(0, 1)).view(*x.shape[:2], -1)

    assert bool((logits >= bounds.lower - SLACK).all())
    assert bool((logits <= bounds.upper + SLACK).all())


@FREELY
@given(facts=facts_strategy, elide=st.booleans())
def test_no_point_beats_the_certified_margin(facts, elide):
    model, images, labels, radii, clip, rng = build(facts)
    corners = worst_corners(model, images, labels, radii, clip)
    x = torch.cat([points(images, radii, clip, rng), corners])

    with torch.no_grad():
        bound = certified_margins(model, images, labels, radii, elide=elide, clip=clip)
        reached = true_margins(model, x, labels).amax(0)

    assert bool((reached <= bound + SLACK).all())


@pytest.mark.parametrize("seed", range(5))
def test_containment_under_the_statistics_of_a_training_batch(seed):
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = IntervalSequential(
        *(LAYERS[name](2) for name in ("conv", "norm", "relu", "two branches", "norm", "max")),
        IntervalFlatten(),
        IntervalLinear(50, CLASSES),
    ).double()
    images = torch.rand(4, 2, 5, 5, generator=rng, dtype=torch.float64)
    oracle.randomize_batch_norm(model, images, rng)
    labels = torch.randint(CLASSES, (4,), generator=rng)
    radii = torch.full((4,), 0.05, dtype=torch.float64)
    _, network = clean_pass(model.train(), images, track=False)
    corners = worst_corners(network, images, labels, radii, (0.0, 1.0))
    x = torch.cat([points(images, radii, (0.0, 1.0), rng), corners])

    with torch.no_grad():
        bound = certified_margins(model, images, labels, radii)
        reached = true_margins(network, x, labels).amax(0)

    assert bool((reached <= bound + SLACK).all())


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_the_ball_by_hand(clip):
    images = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]], dtype=torch.float64)
    ball = Interval.ball(images, torch.tensor([0.25, 0.5], dtype=torch.float64), clip)
    lower, upper = [[-0.25, 0.25, 0.75], [-0.25] * 3], [[0.25, 0.75, 1.25], [0.75] * 3]
    if clip is not None:
        lower, upper = [[0, 0.25, 0.75], [0] * 3], [[0.25, 0.75, 1], [0.75] * 3]
    assert ball.lower.tolist() == lower
    assert ball.upper.tolist() == upper


def test_the_ball_around_whole_numbers_is_not_a_point():
    """Binary images as integers: either refused, or a ball that holds 0.3 either way."""
    images = torch.tensor([[0, 1]])
    try:
        ball = Interval.ball(images, 0.3)
    except UserError:
        return
    assert ball.upper.tolist()[0] == pytest.approx([0.3, 1.0])
    assert ball.lower.tolist()[0] == pytest.approx([0.0, 0.7])


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), torch.zeros(3)], ids=str)
def test_a_bad_radius_of_a_ball_is_named(epsilon):
    with pytest.raises(UserError, match="epsilon"):
        Interval.ball(torch.zeros(2, 1), epsilon)


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_bad_pixels_of_a_ball_are_named(pixel, clip):
    with pytest.raises(UserError, match="images"):
        Interval.ball(torch.full((2, 1), pixel), 0.1, clip)


def test_the_bounds_of_a_linear_net_are_reached():
    """Without this, bounds of plus and minus infinity would pass this file."""
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(25, CLASSES)).double().eval()
    images = torch.full((1, 1, 5, 5), 0.5, dtype=torch.float64)
    labels, radii = torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64)
    corners = worst_corners(model, images, labels, radii, (0.0, 1.0))
    with torch.no_grad():
        bound = certified_margins(model, images, labels, radii)
        reached = true_margins(model, corners, labels).amax(0)
    torch.testing.assert_close(reached, bound, rtol=1e-12, atol=1e-12)
