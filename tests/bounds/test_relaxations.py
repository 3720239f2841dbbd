"""Bounds and lines of every activation over intervals of any width, and what they rest on."""

import pytest
import torch
from activations import ACTIVATIONS, CURVED, PIECEWISE_LINEAR, prelu
from torch import nn

from ibpcore import Interval
from ibpcore.bounds.network import detached, tensors_of, with_tensors
from ibpcore.nn import IntervalLeakyReLU, IntervalReLU, IntervalSigmoid, IntervalTanh
from ibpcore.nn.folding import fold

EVERY = ACTIVATIONS | {
    "relu": lambda c: IntervalReLU(),
    "leaky relu": lambda c: IntervalLeakyReLU(0.3),
    "sigmoid": lambda c: IntervalSigmoid(),
    "tanh": lambda c: IntervalTanh(),
}
SELF_GATED = ["silu", "gelu", "gelu by tanh", "mish"]
COUNT = 800
KINKS = [0.0, -3.0, 3.0, 6.0, -1.5, 0.4, -0.5, 0.5, -0.3, 0.2, -1.2785, -0.7518, -1.1924]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def intervals(dtype: torch.dtype) -> Interval:
    """(COUNT, 4): of width 0 to 1e6, every second one with an end or its middle at a kink."""
    rng = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(COUNT, 4, generator=rng, dtype=torch.float64)

    rad = 10 ** uniform(-12, 6) * (uniform(0, 1) > 0.05)
    mid = torch.randn(COUNT, 4, generator=rng, dtype=torch.float64) * 10 ** uniform(-3, 3)
    kinks = torch.tensor(KINKS, dtype=torch.float64)[
        torch.randint(len(KINKS), mid.shape, generator=rng)
    ]
    mid[::2] = (kinks + rad * torch.randint(-1, 2, mid.shape, generator=rng))[::2]
    return Interval(mid=mid.to(dtype), rad=rad.to(dtype))


def samples(x: Interval) -> torch.Tensor:
    """(P, COUNT, 4) numbers in the intervals: both ends, some between, and all kinks in it."""
    shares = torch.linspace(-1, 1, 101, dtype=x.mid.dtype)[:, None, None]
    kinks = torch.tensor(KINKS, dtype=x.mid.dtype)[:, None, None].expand(-1, *x.shape)
    return torch.cat([x.mid + shares * x.rad, kinks.clamp(x.lower, x.upper)])


@DTYPES
@pytest.mark.parametrize("name", EVERY)
def test_bounds_and_lines_hold_every_number(name, dtype):
    layer = EVERY[name](4).to(dtype)
    (operator,) = layer.operators()
    x = intervals(dtype)
    at = samples(x)
    with torch.no_grad():
        y, lines = operator(x), operator.lines(x)
        values = layer(at.flatten(0, 1)).view_as(at)
    lower, upper, below, above = lines
    dx = at - x.mid
    over = y.mid + upper * dx + (0 if above is None else above) - values
    under = values - (y.mid + lower * dx - below)
    slack = 16 * torch.finfo(dtype).eps * (1 + x.mid.abs() + x.rad)
    for gap in (y.upper - values, values - y.lower, over, under):
        assert (gap >= -slack).all()
    # Nor are they looser than the interval at its middle.
    assert (below >= 0).all()
    assert (below <= y.rad + slack).all()
    if above is not None:
        assert (above >= 0).all()
        assert (above <= y.rad + slack).all()


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_lines_of_piecewise_linear_functions_touch_them(name):
    layer = PIECEWISE_LINEAR[name](4).double()
    (operator,) = layer.operators()
    x = intervals(torch.float64)
    at = samples(x)
    with torch.no_grad():
        y, (lower, upper, below, above) = operator(x), operator.lines(x)
        values = layer(at.flatten(0, 1)).view_as(at)
    dx = at - x.mid
    slack = 1e-12 * (1 + x.mid.abs() + x.rad)
    # At 0.4 or an end the maximum of channels that differ may have no sample.
    for gap in (y.mid + upper * dx + above - values, values - (y.mid + lower * dx - below)):
        closest = gap.amin(0)
        assert (closest <= slack)[:, [0, 3]].all()
    assert (y.upper - values).amin(0).max() <= slack.max()
    assert ((values - y.lower).amin(0) <= slack)[:, [0, 3]].all()


@pytest.mark.parametrize("name", ["hardtanh", "relu6", "prelu", "abs", "hardsigmoid"])
def test_a_stable_piece_has_its_slope_and_no_gap(name):
    layer = PIECEWISE_LINEAR[name](1)
    (operator,) = layer.operators()
    mid = torch.tensor([[0.1], [-0.1], [-20.0], [20.0]]).requires_grad_()
    x = Interval(mid=mid, rad=torch.tensor([[0.01], [1e-7], [0.5], [0.0]]))
    (slopes,) = torch.autograd.grad(layer(mid).sum(), mid)
    lower, upper, below, above = (part.detach() for part in operator.lines(x))
    torch.testing.assert_close(lower[:3], slopes[:3], rtol=0.05, atol=1e-6)
    torch.testing.assert_close(upper[:3], slopes[:3], rtol=0.05, atol=1e-6)
    assert (below + above < 1e-5).all()


@pytest.mark.parametrize("name", sorted(CURVED.keys() - {"elu", "elu, steep", "elu, flat", "selu"}))
def test_gaps_of_narrow_intervals_shrink_with_the_square_of_the_radius(name):
    """Without this, the interval itself would pass for two lines."""
    (operator,) = CURVED[name](1).double().operators()
    mid = torch.linspace(-5.03, 5.02, 200, dtype=torch.float64)[:, None]
    for rad in (1e-2, 1e-4):
        lines = operator.lines(Interval(mid=mid, rad=torch.full_like(mid, rad)))
        gaps = lines.lower_gap + (0 if lines.upper_gap is None else lines.upper_gap)
        assert (gaps > 4 * rad**2).sum() <= 4  # across a kink, or the bend of an S
        assert gaps.max() <= 2 * rad


@pytest.mark.parametrize("name", SELF_GATED)
def test_the_constants_of_self_gated_functions(name):
    """Their least value and where it is, a bound on -f'', and that they keep close to relu."""
    (operator,) = CURVED[name](1).double().operators()
    given = operator.relaxation.keywords
    x = torch.cat([torch.linspace(-40, 40, 80_001), torch.tensor([-1e9, -1e3, 1e3, 1e9])])
    x = x.double().requires_grad_()
    f = operator.function(x)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    torch.testing.assert_close(given["slope_at"](x), slope, rtol=1e-9, atol=1e-9)
    (curvature,) = torch.autograd.grad(given["slope_at"](x).sum(), x)
    assert -given["concavity"] <= curvature.min() <= -0.99 * given["concavity"]
    at = torch.tensor(operator.argmin, dtype=torch.float64).requires_grad_()
    value = operator.function(at)
    (flat,) = torch.autograd.grad(value, at)
    assert abs(flat) < 1e-14
    assert operator.minimum <= value.item() <= operator.minimum + 1e-15
    assert operator.minimum == given["minimum"]
    with torch.no_grad():
        assert (f >= torch.relu(x) + operator.minimum - 1e-15).all()
        assert (f <= torch.relu(x)).all()


@pytest.mark.parametrize("name", [*SELF_GATED, "hardswish", "abs"])
def test_the_minimum_is_within_the_bounds_of_an_interval_around_it(name):
    """In float32 too, where values that are computed near it may lie below it."""
    layer = ACTIVATIONS[name](1)
    (operator,) = layer.operators()
    at = operator.argmin + torch.linspace(-1e-3, 1e-3, 4001)[:, None]
    x = Interval(mid=torch.full((1, 1), operator.argmin), rad=torch.full((1, 1), 1.5e-3))
    assert layer(at).min() >= operator(x).lower
    assert operator(x).lower >= operator.minimum - 1e-6


@pytest.mark.parametrize("name", ["prelu", "maximum", "minimum"])
def test_a_folded_network_keeps_its_slopes_and_limits(name):
    layer = ACTIVATIONS[name](3)
    network, x = fold(layer), torch.tensor([[-2.0, 0.1, -0.4], [2.0, -3.0, 1.0]])
    before = network(x)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.add_(0.2)
    assert torch.equal(network(x), before)
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["prelu", "maximum", "minimum"])
def test_tensors_of_activations_are_replaced_and_detached_like_weights(name):
    """Both are needed in training: attacks need no gradient, chunks are differentiated alone."""
    layer = ACTIVATIONS[name](2)
    tensor = layer.weight if name == "prelu" else nn.Parameter(layer.constant)
    if name != "prelu":
        layer = type(layer)(2, tensor)
    network, x = fold(layer), torch.tensor([[-2.0, 0.7]])
    assert not detached(network)(x).requires_grad
    (own,) = tensors_of(network)
    assert own.requires_grad
    moved = with_tensors(network, [own + 1])
    with torch.no_grad():
        tensor.add_(1)
    assert torch.equal(moved(x), layer(x))


@pytest.mark.parametrize("name", EVERY)
def test_intervals_of_hardly_any_width_have_finite_gradients(name):
    layer = EVERY[name](4)
    (operator,) = layer.operators()
    mid = torch.tensor([-30.0, -1.5, -0.3, 0.0, 1e-30, 0.2, 3.0, 50.0])[:, None].repeat(1, 4)
    rad = torch.tensor([0.0, 1e-40, 1e-30, 1e-12])[:, None, None].expand(4, *mid.shape)
    mid = mid.expand_as(rad).flatten(0, 1).clone().requires_grad_()
    rad = rad.flatten(0, 1).clone().requires_grad_()
    x = Interval(mid=mid, rad=rad)
    parts = [part for part in operator.lines(x) if part is not None]
    assert all(part.isfinite().all() for part in parts)
    # As a loss sees them: slopes only together with the radius.
    (operator(x).upper + sum(parts[2:]) + (parts[0] + parts[1]) * rad).sum().backward()
    assert mid.grad.isfinite().all()
    assert rad.grad.isfinite().all()


def test_slopes_of_any_sign_by_hand():
    """Over [-1, 3]: slope -1/2 gives [0, 3], slope 1/2 [-1/2, 3]; over [-3, 1] [0, 3/2]."""
    layer = prelu(3, -0.5, 0.5, -0.5)
    x = Interval(mid=torch.tensor([[1.0, 1.0, -1.0]]), rad=torch.full((1, 3), 2.0))
    y = layer(x)
    assert y.lower.tolist() == [[0.0, -0.5, 0.0]]
    assert y.upper.tolist() == [[3.0, 3.0, 1.5]]
    lines = layer.operators()[0].lines(x)
    # Chords of slope (3 - 1/2) / 4, (3 + 1/2) / 4 and (1 - 3/2) / 4 above; the branch of the
    # midpoint below.
    assert lines.upper_slope.tolist() == [[0.625, 0.875, -0.125]]
    assert lines.lower_slope.tolist() == [[1.0, 1.0, -0.5]]


def test_clamps_by_hand():
    """Over [-1, 2] with limits 0 and 1: from (-1, 0) to (1, 1) above, from (0, 0) to (2, 1) below.

    Over [-1, 4] the middle, 3/2, is above 1, so that the upper line is level.
    """
    (operator,) = ACTIVATIONS["hardtanh"](1).__class__(0.0, 1.0).operators()
    x = Interval(mid=torch.tensor([[0.5], [1.5]]), rad=torch.tensor([[1.5], [2.5]]))
    lower, upper, below, above = operator.lines(x)
    assert upper.flatten().tolist() == [0.5, 0.0]
    assert lower.flatten().tolist() == [0.5, 0.25]
    assert above.flatten().tolist() == [0.25, 0.5]
    assert below.flatten().tolist() == [0.25, 0.125]
