"""CROWN-IBP: by hand, against dense float64 matrices, sampled points, gradients, and radii."""

import csv
import json
import math
from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from balls import points, worst_corners
from helpers import run_ibp
from hypothesis import given, settings
from test_chunking import NETWORKS, LiveBytes
from test_containment import FREELY, LAYERS, Facts, build, facts_strategy, filled
from torch import nn

from ibpcore import Interval, UserError, certified_margins, certified_radii, cnn7, save_model
from ibpcore.bounds.chunking import backward_chunk_size
from ibpcore.bounds.crown_ibp import crown_logits, fused_cross_entropy
from ibpcore.bounds.ibp import margins, robust_logits
from ibpcore.bounds.interval import between
from ibpcore.bounds.kernels import relaxed, relu_lines
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.bounds.relaxations import leaky_relu, product, relu, sigmoid, tanh
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import RadiusStatus
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalFlatten,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalNormalize,
    IntervalPermute,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalSequential,
    IntervalSlice,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.folding import clean_pass, fold

SLACK = 1e-9
ELIDE = pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def linear(weight, bias=None) -> IntervalLinear:
    layer = IntervalLinear(len(weight[0]), len(weight), bias=bias is not None).double()
    layer.weight.data = double(*weight)
    if bias is not None:
        layer.bias.data = double(*bias)
    return layer


def two_layers() -> IntervalSequential:
    """h = relu(x1 + x2, x1 - x2 + 1/4), f = (h1 - h2, h1 + h2)."""
    return IntervalSequential(
        linear([[1, 1], [1, -1]], [0, 0.25]), IntervalReLU(), linear([[1, -1], [1, 1]], [0, 0])
    )


def test_two_layers_by_hand():
    """Label 0 at x = 0, epsilon 1, bare ball: z1 in [-2, 2], z2 in [-7/4, 9/4].

    f_1 - f_0 = 2 h2. The chord of h2 is 9/16 (z2 + 7/4); z2 = x1 - x2 + 1/4 reaches 9/4
    in the ball, so CROWN gives 2 * 9/4 = 9/2, as IBP does.
    Label 1: f_0 - f_1 = -2 h2. Since 9/4 > 7/4 the line below h2 is z2, so -2 h2 <= -2 z2,
    at most 2 * 7/4 = 7/2, where IBP says 0.
    """
    network = fold(two_layers())
    images, epsilons = double([0, 0], [0, 0]), double(1, 1)
    labels = torch.tensor([0, 1])
    crown, ibp = crown_logits(network, images, labels, epsilons, BoundOptions(clip=None))
    assert ibp.tolist() == [[0, 4.5], [0, 0]]
    assert crown.tolist() == [[0, 4.5], [3.5, 0]]
    # Apart: f_0 = h1 - h2 <= (z1 + 2) / 2 - z2 = 3/4 - x1 / 2 + 3 x2 / 2, at most 11/4. And
    # -f_1 = -h1 - h2 <= -z2, for 2 is not above 2, at most 7/4. Together 9/2.
    crown, _ = crown_logits(
        network, images[1:], labels[1:], epsilons[1:], BoundOptions(elide=False, clip=None)
    )
    assert crown.tolist() == [[4.5, 0]]
    # The chord of exp over [0, 9/2] has the middle (1 + e^4.5) / 2 and the slope
    # (e^4.5 - 1) / 4.5; f_1 - f_0 reaches the end, so the sum is 1 + e^4.5.
    loss, _ = fused_cross_entropy(
        network, images[:1], labels[:1], epsilons[:1], BoundOptions(clip=None)
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(4.5)))


def test_two_branches_by_hand():
    """relu(2 x - 1) + relu(4 x - 1) against 0, x in [0, 1]: intervals [-1, 1] and [-1, 3].

    Upwards the chords x and 3 x, at most 4. Downwards 0 and 4 x - 1, at least -1.
    """
    branch = IntervalSequential(linear([[2]], [-1]), IntervalReLU())
    shortcut = IntervalSequential(linear([[4]], [-1]), IntervalReLU())
    model = IntervalSequential(IntervalResidual(branch, shortcut), linear([[1], [0]], [0, 0]))
    images, labels, epsilons = double([0.5], [0.5]), torch.tensor([1, 0]), double(0.5, 0.5)
    crown, ibp = crown_logits(fold(model), images, labels, epsilons, BoundOptions())
    assert ibp.tolist() == [[4, 0], [0, 0]]
    assert crown.tolist() == [[4, 0], [0, 1]]


def test_crown_sees_what_cancels():
    """relu(x + 10) - relu(x + 10) is 0, which IBP does not see."""
    model = IntervalSequential(
        linear([[1], [1]], [10, 10]),
        IntervalReLU(),
        linear([[1, -1], [0, 0]]),
        linear([[1, 0], [0, 0]]),
    )
    arguments = (fold(model), double([0.5]), torch.tensor([1]), double(0.25))
    crown, ibp = crown_logits(*arguments, BoundOptions())
    assert ibp.tolist() == [[0.5, 0]]
    assert crown.tolist() == [[0, 0]]


@ELIDE
def test_a_linear_network_gives_the_interval_bound_or_a_lesser_one(elide):
    """With a single layer they are the same; through two CROWN knows what cancels."""
    torch.manual_seed(0)
    images, labels, radii = torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0]), double(0.1)
    single = IntervalSequential(IntervalLinear(6, 3)).double()
    crown, ibp = crown_logits(
        fold(single), images, labels, radii.expand(4), BoundOptions(elide=elide)
    )
    torch.testing.assert_close(crown, ibp, rtol=1e-14, atol=1e-14)
    several = IntervalSequential(IntervalLinear(6, 5), IntervalLinear(5, 3)).double()
    crown, ibp = crown_logits(
        fold(several), images, labels, radii.expand(4), BoundOptions(elide=elide)
    )
    others = torch.arange(3) != labels[:, None]
    assert (crown < ibp)[others].all()
    if elide:  # and then it is exact
        rows = several[1].weight @ several[0].weight
        rows = rows - rows[labels][:, None]
        ball = oracle.ball(images, 0.1)
        center = several((ball.lower + ball.upper) / 2)
        exact = center - center.gather(1, labels[:, None])
        exact = exact + (rows.abs() @ (ball.upper - ball.lower)[..., None] / 2)[..., 0]
        torch.testing.assert_close(crown, exact, rtol=1e-12, atol=1e-12)


INTERVALS = [(-1, 3), (-3, 1), (-2, 2), (1, 2), (-2, -1), (0, 2), (-2, 0), (0, 0), (3, 3), (-9, 9)]
SHAPES = {
    "relu": (relu, torch.relu),
    "leaky": (partial(leaky_relu, negative_slope=0.2), nn.LeakyReLU(0.2)),
    "steep": (partial(leaky_relu, negative_slope=1.5), nn.LeakyReLU(1.5)),
    "straight": (partial(leaky_relu, negative_slope=1.0), nn.LeakyReLU(1.0)),
    "sigmoid": (sigmoid, torch.sigmoid),
    "tanh": (tanh, torch.tanh),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_lines_hold_the_function_and_touch_it(name):
    relaxation, function = SHAPES[name]
    ends = double(*INTERVALS)
    x = between(ends[:, 0], ends[:, 1])
    y = x.monotone(function)
    lower, upper, below, above = relaxation(x)
    above = torch.zeros_like(below) if above is None else above
    share = torch.linspace(-1, 1, 1001, dtype=torch.float64)[:, None]
    dy = function(x.mid + share * x.rad) - y.mid
    over = upper * share * x.rad + above - dy
    under = dy - lower * share * x.rad + below
    for gap in (over, under):
        assert (gap > -1e-12).all()
        assert (gap.amin(0) < 1e-5).all()
    assert (below >= 0).all()
    assert (above >= 0).all()


FACTORS = [(x, y) for x in INTERVALS for y in INTERVALS]


def test_the_planes_hold_a_product_and_touch_it():
    """At the corners, between which a product minus a plane has no extremes."""
    ends = double(*((*x, *y) for x, y in FACTORS))
    x, y = (between(ends[:, i], ends[:, i + 1]) for i in (0, 2))
    z = x * y
    corners = torch.stack([ends[:, i] * ends[:, j] for i in (0, 1) for j in (2, 3)])
    torch.testing.assert_close(z.lower, corners.amin(0))
    torch.testing.assert_close(z.upper, corners.amax(0))
    first, second = product(x, y)
    gaps = []
    for dx in (-x.rad, x.rad):
        for dy in (-y.rad, y.rad):
            dz = (x.mid + dx) * (y.mid + dy) - z.mid
            under = dz - first.lower_slope * dx - second.lower_slope * dy + first.lower_gap
            over = first.upper_slope * dx + second.upper_slope * dy + first.upper_gap - dz
            gaps.append(torch.stack([under, over]))
    assert (torch.stack(gaps) > -1e-12).all()
    assert (torch.stack(gaps).amin(0) < 1e-12).all()


def test_the_planes_of_a_product_by_hand():
    """[0, 2] times [0, 2]: above 2 x, or 2 y, or x + y between them; below 0, not 2 x + 2 y - 4."""
    x = Interval(mid=double(1), rad=double(1))
    first, second = product(x, x)
    assert (first.lower_slope.item(), second.lower_slope.item()) == (0, 0)
    assert (first.upper_slope.item(), second.upper_slope.item()) == (1, 1)
    # Both are relative to the middle of [0, 4].
    assert (first.lower_gap.item(), first.upper_gap.item()) == (2, 0)


def test_a_product_by_hand():
    """relu(2 x - 1) times x over [0, 1] is in [0, 1], and by its planes below x and above 0."""
    branch = IntervalSequential(linear([[2]], [-1]), IntervalReLU())
    model = IntervalSequential(IntervalProduct(branch), linear([[1], [0]], [0, 0]))
    images, labels, epsilons = double([0.5], [0.5]), torch.tensor([1, 0]), double(0.5, 0.5)
    crown, ibp = crown_logits(fold(model), images, labels, epsilons, BoundOptions())
    assert ibp.tolist() == [[1, 0], [0, 0]]
    assert crown.tolist() == [[1, 0], [0, 0]]


def test_the_lines_of_relu_by_hand():
    """[-1, 3]: chord 3/4, below the identity, which at 1 is 1/2 under 3/2. [-3, 1]: 0."""
    x = Interval(mid=double(1, -1, 2, -2, 0), rad=double(2, 2, 1, 1, 1))
    lower, upper, below, above = relu(x)
    assert lower.tolist() == [1, 0, 1, 0, 0]
    assert upper.tolist() == [0.75, 0.25, 1, 0, 0.5]
    assert below.tolist() == [0.5, 0.5, 0, 0, 0.5]
    assert above is None


class Dense:
    """CROWN-IBP in float64 with every layer as a dense matrix; lower and upper ends, biases.

    Shares no code with `ibpcore`: matrices come of the layers' values at unit vectors.
    """

    def __init__(self, model: nn.Sequential, shape: tuple[int, ...]) -> None:
        self.layers = []
        for layer in (part for whole in model for part in self.parts(whole)):
            size = math.prod(shape)
            units = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()
            with torch.no_grad():
                found = layer(units.view(-1, *shape))
            shape = tuple(found.shape[1:])
            found = found.flatten(1)
            if isinstance(layer, nn.ReLU | nn.LeakyReLU):
                self.layers.append(getattr(layer, "negative_slope", 0.0))
            else:
                self.layers.append(((found[1:] - found[0]).T, found[0]))

    @staticmethod
    def parts(layer):
        """A convolution that pads by values of the image apart from its padding."""
        if getattr(layer, "padding_mode", "zeros") == "zeros":
            return [layer]
        (rows, columns), mode = layer.padding, layer.padding_mode
        bare = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size).double()
        bare.load_state_dict(layer.state_dict())
        return [lambda x: F.pad(x, (columns, columns, rows, rows), mode=mode), bare]

    def ends(self, lower, upper, layers):
        """Interval ends before each layer."""
        for layer in layers:
            yield lower, upper
            if isinstance(layer, tuple):
                matrix, bias = layer
                plus, minus = matrix.clamp(min=0), matrix.clamp(max=0)
                lower, upper = (
                    plus @ lower + minus @ upper + bias,
                    plus @ upper + minus @ lower + bias,
                )
            else:
                lower, upper = (torch.where(e > 0, e, layer * e) for e in (lower, upper))

    def maximum(self, row, constant, lower, upper, layers):
        """Upper bound of row . y + constant, y the output of `layers`."""
        ends = list(self.ends(lower, upper, layers))
        for layer, (low, high) in zip(reversed(layers), reversed(ends), strict=True):
            if isinstance(layer, tuple):
                constant = constant + row @ layer[1]
                row = row @ layer[0]
                continue
            fresh = row.clone()
            for j in range(len(row)):
                a, b = float(low[j]), float(high[j])
                if a >= 0 or b <= 0:
                    fresh[j] = row[j] * (1 if a >= 0 else layer)
                elif row[j] > 0:
                    slope = (b - layer * a) / (b - a)
                    fresh[j] = row[j] * slope
                    constant = constant + row[j] * (b - slope * b)
                else:
                    fresh[j] = row[j] * (1 if b > -a else layer)
            row = fresh
        return constant + row.clamp(min=0) @ upper + row.clamp(max=0) @ lower

    def differences(self, ball: oracle.State, labels, elide):
        """(B, classes) bounds of f_i - f_y."""
        body, (matrix, bias) = self.layers[:-1], self.layers[-1]
        table = torch.zeros(len(labels), len(bias)).double()
        for b, y in enumerate(labels.tolist()):
            ends = ball.lower[b].flatten(), ball.upper[b].flatten()
            for i in range(len(bias)):
                if i == y:
                    continue
                if elide:
                    row = matrix[i] - matrix[y]
                    table[b, i] = self.maximum(row, bias[i] - bias[y], *ends, body)
                else:
                    table[b, i] = self.maximum(matrix[i], bias[i], *ends, body)
                    table[b, i] += self.maximum(-matrix[y], -bias[y], *ends, body)
        return table


FRONTS = {
    "strided": lambda: [IntervalConv2d(2, 4, 3, stride=2, padding=1), IntervalBatchNorm(4)],
    "rest": lambda: [IntervalConv2d(2, 3, 2, stride=3), IntervalBatchNorm(3)],
    "wide stride": lambda: [IntervalConv2d(2, 3, 3, stride=(2, 4), padding=(2, 1))],
    "dilated": lambda: [IntervalConv2d(2, 4, 3, dilation=2, padding=(2, 1)), IntervalReLU()],
    "grouped": lambda: [IntervalConv2d(2, 4, (1, 3), groups=2, bias=False), IntervalBatchNorm(4)],
    "reflect": lambda: [IntervalConv2d(2, 3, 3, padding=1, padding_mode="reflect")],
    "circular": lambda: [IntervalConv2d(2, 3, 3, padding=(2, 1), padding_mode="circular")],
    "same": lambda: [IntervalConv2d(2, 3, (1, 5), padding="same"), IntervalBatchNorm(3)],
    "valid": lambda: [IntervalConv2d(2, 3, 3, padding="valid")],
    "rows": lambda: [IntervalLinear(7, 5), IntervalBatchNorm(2)],
    "average": lambda: [LAYERS["average"](2), IntervalConv2d(2, 2, 3)],
    "transposed": lambda: [
        IntervalConvTranspose2d(2, 4, (3, 2), (2, 3), (1, 0), (1, 2), groups=2),
        IntervalBatchNorm(4),
    ],
    "transposed, dilated": lambda: [IntervalConvTranspose2d(2, 3, 3, 1, 3, 2, dilation=3)],
    "conv of rows": lambda: [
        IntervalFlatten(2),
        IntervalConv1d(2, 4, 4, stride=3, padding=2, dilation=2, groups=2),
        IntervalBatchNorm(4),
    ],
    "matrix": lambda: [LAYERS["chosen"](2), filled(IntervalMatMul(5, 4))],
    "normalize": lambda: [LAYERS["normalize"](2), IntervalConv2d(2, 2, 3)],
    "scale": lambda: [LAYERS["scale"](2), IntervalConv2d(2, 2, 3)],
    "permuted": lambda: [IntervalPermute((0, 3, 1, 2)), IntervalConv2d(7, 2, 1)],
    "reshaped": lambda: [IntervalReshape((3, 7, 4)), IntervalConv2d(3, 2, 3)],
    "padded": lambda: [IntervalZeroPad((2, 0, 1, 0)), IntervalConv2d(2, 2, 3)],
    "sliced": lambda: [IntervalSlice([[0, 2, 1], [1, 6, 2], [0, 7, 3]])],
    "upsampled": lambda: [IntervalUpsample((2, 1)), IntervalConv2d(2, 2, 3, stride=2)],
    "concatenated": lambda: [
        IntervalConcat([IntervalConv2d(2, 1, 3, padding=1), IntervalSequential()]),
        IntervalConcat([IntervalConv2d(3, 2, 1), IntervalConv2d(3, 2, 1)], dim=2),
    ],
}


@ELIDE
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("name", FRONTS)
def test_agreement_with_dense_matrices(name, clip, elide):
    torch.manual_seed(1)
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(3, 2, 6, 7, generator=rng).double()
    front = nn.Sequential(*FRONTS[name](), IntervalFlatten()).double().eval()
    width = front(images).shape[1]
    model = IntervalSequential(
        *front[:-1],
        IntervalLeakyReLU(0.1),
        IntervalFlatten(),
        IntervalLinear(width, 8),
        IntervalBatchNorm(8),
        IntervalReLU(),
        IntervalLinear(8, 3),
    ).double()
    oracle.randomize_batch_norm(model, images, rng)
    labels, radii = torch.tensor([0, 2, 1]), double(0.01, 0.05, 0.2)
    expected = Dense(model, (2, 6, 7)).differences(oracle.ball(images, radii, clip), labels, elide)
    with torch.no_grad():
        crown, _ = crown_logits(
            fold(model), images, labels, radii, BoundOptions(elide=elide, clip=clip)
        )
    torch.testing.assert_close(crown, expected, rtol=1e-10, atol=1e-10)


@settings(FREELY, max_examples=100)
@given(facts=facts_strategy)
def test_no_point_beats_the_bounds(facts):
    """Neither a difference nor the cross-entropy; IBP's bounds are those of `margins`."""
    model, images, labels, radii, clip, rng = build(facts)
    corners = worst_corners(model, images, labels, radii, clip)
    x = torch.cat([points(images, radii, clip, rng), corners])
    network = fold(model)
    with torch.no_grad():
        logits = model(x.flatten(0, 1)).view(*x.shape[:2], -1)
        reached = logits - logits.gather(2, labels.expand(len(x), -1)[..., None])
        for elide in (True, False):
            given = {"elide": elide, "clip": clip}
            crown, ibp = crown_logits(network, images, labels, radii, BoundOptions(**given))
            loss, same = fused_cross_entropy(network, images, labels, radii, BoundOptions(**given))
            expected = robust_logits(network, images, labels, radii, BoundOptions(**given))
            assert torch.equal(ibp, expected)
            torch.testing.assert_close(same, expected, rtol=1e-12, atol=1e-12)
            assert (reached <= crown + SLACK).all()
            assert (reached.logsumexp(2) <= loss + SLACK).all()
            true = torch.arange(crown.shape[1]) == labels[:, None]
            assert (crown[true] == 0).all()
            best = certified_margins(model, images, labels, radii, bound="crown-ibp", **given)
            lesser = torch.minimum(crown, ibp).masked_fill(true, -torch.inf).amax(1)
            torch.testing.assert_close(best, lesser, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_fused_is_at_most_the_chords_over_each_bound(seed):
    """With one hidden layer the lines hold at every point of the ball, not only in sum.

    So the fused bound is at most the chords of exp taken at CROWN's bounds one by one.
    """
    torch.manual_seed(seed)
    model = IntervalSequential(IntervalLinear(6, 8), IntervalReLU(), IntervalLinear(8, 4)).double()
    images, labels = torch.rand(5, 6).double(), torch.randint(4, (5,))
    network, radii = fold(model), torch.full((5,), 0.2).double()
    with torch.no_grad():
        crown, upper = crown_logits(network, images, labels, radii, BoundOptions())
        loss, _ = fused_cross_entropy(network, images, labels, radii, BoundOptions())
    # The lower ends: IBP's upper ends of the network with its signs turned.
    model[2].weight.data.neg_()
    model[2].bias.data.neg_()
    lower = -robust_logits(fold(model), images, labels, radii, BoundOptions()).detach()
    width = torch.where(upper > lower, upper - lower, 1)
    chords = lower.exp() + (upper.exp() - lower.exp()) / width * (crown - lower)
    assert (loss <= chords.sum(1).log() + 1e-12).all()
    assert (loss < chords.sum(1).log() - 1e-6).any()


def test_fused_at_radius_0_is_the_cross_entropy():
    torch.manual_seed(0)
    model, images = cnn7((1, 8, 8), 4, width=2, hidden=8).double().eval(), torch.rand(3, 1, 8, 8)
    images, labels, zeros = images.double(), torch.tensor([0, 1, 3]), torch.zeros(3).double()
    with torch.no_grad():
        loss, _ = fused_cross_entropy(fold(model), images, labels, zeros, BoundOptions())
        expected = nn.functional.cross_entropy(model(images), labels, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_fused_survives_logits_whose_exp_overflows():
    model = two_layers()
    model[2].weight.data *= 1e4
    images, labels = torch.zeros(1, 2), torch.tensor([0])
    loss, _ = fused_cross_entropy(
        fold(model.float()), images, labels, torch.ones(1), BoundOptions(clip=None)
    )
    # 2 h2 reaches 4.5e4, and log(1 + exp(4.5e4)) is that.
    assert loss.item() == pytest.approx(4.5e4)


GRADIENTS = {
    "conv": ["conv", "norm", "relu"],
    "curved": ["sigmoid", "dilated", "tanh", "average"],
    "branches": ["leaky", "residual", "max", "two branches"],
    "affine": ["transposed", "matrix", "rows", "chosen"],
    "product": ["product"],
    "concatenation": ["scale", "concatenation", "upsampled"],
    "piecewise linear": ["conv", "prelu", "conv", "hardtanh", "maximum", "conv", "abs"],
    "exponential": ["conv", "elu", "dilated", "softplus", "selu", "conv", "logsigmoid"],
    "self-gated": ["conv", "silu", "conv", "gelu", "conv", "mish", "hardswish", "gelu by tanh"],
}


@ELIDE
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, elide):
    """With respect to all parameters, through the relaxations and the intervals."""
    model, images, labels, radii, clip, _ = build(Facts(3, 1, GRADIENTS[name], None, 0.05))

    def bounds(*_):
        given = {"elide": elide, "clip": clip}
        crown, _ = crown_logits(fold(model), images, labels, radii, BoundOptions(**given))
        return crown, fused_cross_entropy(
            fold(model), images, labels, radii, BoundOptions(**given)
        )[0]

    assert torch.autograd.gradcheck(bounds, tuple(model.parameters()), fast_mode=True)


def test_gradients_of_the_kernels():
    torch.manual_seed(0)
    lines = [torch.rand(2, 3, 2).double().requires_grad_() for _ in range(4)]
    rows = torch.randn(2, 4, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(relaxed, (rows, *lines))
    assert torch.autograd.gradcheck(relaxed, (rows, *lines[:3], None))
    mid, rad = torch.randn(40).double().requires_grad_(), torch.rand(40).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, r: relu_lines(m, r)[1:], (mid, rad))


def test_intervals_of_hardly_any_width_have_finite_gradients():
    mid = torch.tensor([1.0, -1.0, 0.0, 1e-30, 1.0], requires_grad=True)
    rad = torch.tensor([0.0, 1e-40, 0.0, 1e-40, 1e-25], requires_grad=True)
    lower, upper, below = relu_lines(mid, rad)
    assert ((upper >= 0) & (upper <= 1) & (below >= 0)).all()
    (lower + upper + below).sum().backward()
    assert mid.grad.isfinite().all()
    assert rad.grad.isfinite().all()


def note(seen, step, x):
    seen.append(step)


def test_every_parameter_is_trained_in_float32():
    """As training does it: batch statistics, and any radius."""
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 4, width=2, hidden=8).train()
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    for radius in (0.0, 1e-12, 0.1):
        _, network = clean_pass(model, images)
        seen = []
        loss, logits = fused_cross_entropy(
            network,
            images,
            labels,
            torch.full((6,), radius),
            BoundOptions(),
            observe=partial(note, seen),
        )
        model.zero_grad()
        (loss.sum() + logits.sum()).backward()
        assert len(seen) == 14
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


HUGE = 3e38


@ELIDE
def test_an_overflow_in_the_interval_pass_is_not_certified(elide):
    """relu(-inf) is 0, and so would be the margin's last summand."""
    model = IntervalSequential(
        linear([[1], [1]], [0, 0]), IntervalReLU(), linear([[0, 1], [0, 0]], [-1, 0])
    ).float()
    model[0].weight.data[1] = -HUGE
    arguments = (model, torch.tensor([[10.0]]), torch.tensor([1]), 0.5)
    given = {"elide": elide, "clip": (0.0, 20.0)}
    assert certified_margins(*arguments, bound="ibp", **given).item() == math.inf
    assert certified_margins(*arguments, bound="crown-ibp", **given).item() == math.inf


def test_an_overflow_on_the_way_back_leaves_the_interval_bound():
    """Rows of 1e30 times 1e30, of intervals of width 0."""
    model = IntervalSequential(
        linear([[1e30], [0]], [0, 1]),
        IntervalReLU(),
        linear([[1e30, 0], [0, 1]]),
        linear([[1, 0], [0, 1]]),
    ).float()
    images, labels, radii = torch.zeros(1, 1), torch.tensor([1]), torch.zeros(1)
    crown, ibp = crown_logits(fold(model), images, labels, radii, BoundOptions())
    assert not crown.isfinite().all()
    assert ibp.tolist() == [[-1, 0]]
    assert BOUNDS["crown-ibp"].margins(
        fold(model), images, labels, radii, BoundOptions()
    ).tolist() == [-1]


def problem(seed=0, count=24, classes=3):
    """A trained little network in float64, so that some samples are certified."""
    torch.manual_seed(seed)
    model = IntervalSequential(
        IntervalLinear(6, 16),
        IntervalReLU(),
        IntervalLinear(16, 16),
        IntervalReLU(),
        IntervalLinear(16, classes),
    ).double()
    images = torch.rand(count, 6).double()
    labels = images[:, :classes].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels[0] = (labels[0] + 1) % classes
    return model.eval(), images, labels


@ELIDE
@pytest.mark.parametrize("solver", ["brentq", "bisect", "fused", "tracked"])
def test_radii_are_never_below_those_of_ibp(solver, elide):
    model, images, labels = problem()
    given = {"solver": solver, "elide": elide}
    ibp = certified_radii(model, images, labels, 0.3, **given)
    best = certified_radii(model, images, labels, 0.3, bound="crown-ibp", **given)
    assert (best.radius >= ibp.radius).all()
    assert (best.radius > 1.1 * ibp.radius).any()
    assert best.radius[0] == 0
    assert best.status[0] == RadiusStatus.MISCLASSIFIED
    assert (best.evaluations >= ibp.evaluations).all()
    # Both ends are points where a pass succeeded, or failed.
    at = {"elide": elide, "bound": "crown-ibp"}
    right = best.radius > 0
    assert (certified_margins(model, images, labels, best.radius, **at)[right] < 0).all()
    open_ = best.status == RadiusStatus.CONVERGED
    assert open_.any()
    assert (certified_margins(model, images, labels, best.upper, **at)[open_] >= 0).all()
    assert (best.upper - best.radius)[open_].max() < 1e-4


def test_all_may_be_certified_by_crown_alone():
    model, images, labels = problem()
    ibp = certified_radii(model, images, labels, 1.0)
    best = certified_radii(model, images, labels, 1.0, bound="crown-ibp")
    limit = float((ibp.radius[1:].min() + best.radius[1:].min()) / 2)
    one = int(best.radius[1:].argmin()) + 1
    chosen = (model, images[one : one + 1], labels[one : one + 1], limit)
    assert certified_radii(*chosen).status.tolist() == [RadiusStatus.CONVERGED]
    radii = certified_radii(*chosen, bound="crown-ibp")
    assert radii.status.tolist() == [RadiusStatus.EPSILON_MAX]
    assert radii.radius.tolist() == radii.upper.tolist() == [limit]


def replaced(monkeypatch, margins):
    """Other margins of CROWN-IBP."""
    monkeypatch.setitem(BOUNDS, "crown-ibp", replace(BOUNDS["crown-ibp"], margins=margins))


def test_a_margin_that_is_not_monotone_costs_no_sample_its_radius(monkeypatch):
    """Certified at epsilon_max, or up to it but for a stretch: the ends come first."""
    model, images, labels = problem()
    ibp = certified_radii(model, images, labels, 0.5)
    first = torch.where(ibp.status == RadiusStatus.CONVERGED, ibp.radius, torch.inf).min()

    def everywhere_but_near(network, images, labels, epsilons, options):
        return torch.where((epsilons - first).abs() < 1e-3, 1.0, -1.0).to(epsilons)

    replaced(monkeypatch, everywhere_but_near)
    best = certified_radii(model, images, labels, 0.5, bound="crown-ibp")
    assert (best.radius[1:] == 0.5).all()

    def nowhere(network, images, labels, epsilons, options):
        return torch.full_like(epsilons, torch.inf)

    replaced(monkeypatch, nowhere)
    best = certified_radii(model, images, labels, 0.5, bound="crown-ibp")
    assert (best.radius >= ibp.radius).all()
    torch.testing.assert_close(best.radius, ibp.radius, atol=1e-5, rtol=1e-4)


def test_a_batch_gets_what_its_samples_get_alone():
    model, images, labels = problem(count=6)
    whole = certified_radii(model, images, labels, 0.3, bound="crown-ibp")
    for i in range(6):
        alone = certified_radii(model, images[[i]], labels[[i]], 0.3, bound="crown-ibp")
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[[i]], b, rtol=1e-9, atol=1e-9)


def test_pieces_and_many_radii_change_nothing():
    model, images, labels = problem(count=5)
    network, radii = fold(model), torch.rand(3, 5).double() / 5
    with torch.no_grad():
        expected = torch.stack(
            [BOUNDS["crown-ibp"].margins(network, images, labels, r, BoundOptions()) for r in radii]
        )
        for budget in (1, 10_000, None):
            found = BOUNDS["crown-ibp"].margins(
                network, images, labels, radii, BoundOptions(budget=budget)
            )
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert BOUNDS["crown-ibp"].margins(
        network, images[:0], labels[:0], radii[:, :0], BoundOptions()
    ).shape == (
        3,
        0,
    )
    assert (expected <= margins(network, images, labels, radii, BoundOptions())).all()


@ELIDE
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_keeps_to_its_budget(name, elide):
    """30 samples, 10 at a time: nor is it far below."""
    torch.manual_seed(0)
    network, shape = fold(NETWORKS[name]().eval()), (3 if name == "CNN7, colours" else 1, 8, 8)
    images, labels, radii = torch.rand(30, *shape), torch.arange(30) % 5, torch.full((30,), 0.01)
    with torch.no_grad():
        # |W| is kept for all passes, so it is no part of one.
        BOUNDS["crown-ibp"].margins(
            network, images[:1], labels[:1], radii[:1], BoundOptions(elide=elide)
        )
        budget = 10 * 2**40 // backward_chunk_size(network, images, 2**40)
        assert backward_chunk_size(network, images, budget) in (9, 10)
        with LiveBytes() as memory:
            BOUNDS["crown-ibp"].margins(
                network, images, labels, radii, BoundOptions(elide=elide, budget=budget)
            )
    assert 0.5 <= memory.peak / budget <= 1.1


@pytest.mark.parametrize("function", [certified_margins, certified_radii])
def test_a_wrong_name_lists_the_bounds(function):
    model, images, labels = problem(count=2)
    with pytest.raises(UserError, match=r"'crawn' is not one of ibp, crown-ibp, crown"):
        function(model, images, labels, 0.1, bound="crawn")


def test_certificates_from_the_command_line(tmp_path):
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 10, width=2, hidden=16)
    data = load_dataset("digits", Request(limit_train=640, limit_test=40))
    images, labels = data.train.images.float() / 255, data.train.labels
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model.eval(), tmp_path / "model.safetensors")
    command = ("certify", tmp_path, "--dataset", "digits", "--limit-test", 40)
    summaries, radii = {}, {}
    for bound in BOUNDS:
        out = tmp_path / bound
        code, _, err = run_ibp(*command, "--epsilon-max", 0.05, "--bound", bound, "--out", out)
        assert (code, err) == (0, "")
        summaries[bound] = json.loads((out / "summary.json").read_text())
        with open(out / "certificates.csv", newline="") as file:
            radii[bound] = [float(row["radius"]) for row in csv.DictReader(file)]
        assert summaries[bound]["bound"] == bound
    assert all(a >= b for a, b in zip(radii["crown-ibp"], radii["ibp"], strict=True))
    assert summaries["crown-ibp"]["acr"] > summaries["ibp"]["acr"] > 0
    expected = certify(
        model, data.test, CertificationOptions(0.05, bounds=BoundOptions(bound="crown-ibp"))
    ).radius
    assert radii["crown-ibp"] == expected.double().tolist()
    assert run_ibp(*command, "--bound", "crawn").code == 2
    with pytest.raises(UserError, match="not one of"):
        certify(model, data.test, CertificationOptions(0.05, bounds=BoundOptions(bound="crawn")))


def one_channel(*layers: nn.Module, bias: float) -> IntervalSequential:
    """f_0 - f_1 = bias +- the sum of what `layers` give for an image of 1 x 2 x 2."""
    size = IntervalSequential(*layers)(torch.zeros(1, 1, 2, 2)).numel()
    last = IntervalLinear(size, 2)
    last.weight.data = torch.tensor([[-1.0 if bias > 6 else 1.0], [0.0]]).expand(2, size).clone()
    last.bias.data = torch.tensor([bias, 0.0])
    return IntervalSequential(*layers, IntervalFlatten(), last).eval()


@pytest.mark.parametrize("bound", BOUNDS)
def test_residuals_that_broadcast_are_refused(bound):
    """Four channels on one: rows that went back unsummed would certify what is wrong."""
    wide = IntervalConv2d(1, 4, 1)
    wide.weight.data.fill_(-0.25)
    wide.bias.data.zero_()
    images, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    # Its true margin at 0.5 is +5, and the sum of |rows| instead of |sum| says -1.
    model = IntervalSequential(IntervalResidual(wide), IntervalFlatten(), IntervalLinear(16, 2))
    with pytest.raises(UserError, match="must have one shape"):
        model(images)
    with pytest.raises(UserError, match="must have one shape"):
        certified_radii(model, images, labels, 0.5, bound=bound)
    with pytest.raises(UserError, match="must have one shape"):
        certified_margins(model, images, labels, 0.5, bound=bound)


@pytest.mark.parametrize("bound", BOUNDS)
def test_normalisation_of_other_channels_is_refused(bound):
    """Three means would make three channels of one."""
    narrow = IntervalConv2d(3, 1, 1)
    branch = IntervalSequential(IntervalNormalize([0.0] * 3, [1.0] * 3), narrow)
    last = IntervalLinear(4, 2)
    model = IntervalSequential(IntervalResidual(branch), IntervalFlatten(), last).eval()
    with pytest.raises(UserError, match="a layer of 3 channels cannot read"):
        certified_radii(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), 0.5, bound=bound)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 3.0, 1e3, 1e8, 1e30])
def test_an_active_neuron_has_slope_1_whatever_the_other_slope(slope):
    """a + (1 - a) would be 0 in float32 where a is large."""
    lines = leaky_relu(Interval(mid=torch.tensor([2.0]), rad=torch.tensor([1.0])), slope)
    assert lines.lower_slope.item() == lines.upper_slope.item() == 1.0
    lines = leaky_relu(Interval(mid=torch.tensor([-2.0]), rad=torch.tensor([1.0])), slope)
    assert lines.lower_slope.item() == pytest.approx(slope, rel=1e-6)
